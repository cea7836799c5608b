"""Configuration: what is refused and in which words, and that what is accepted survives being written and read."""

import re
import string
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from model.schedule import learning_rate
from orchestrator.config.experiment import Experiment, field_docs, load_experiment, parse_experiment
from orchestrator.config.load import read_yaml
from orchestrator.errors import UserError
from pipelines.common import help_text, split_words

PROMISED = [
    "name",
    "storage",
    "data.corpus",
    "data.dir",
    "data.text_field",
    "data.invalid_utf8",
    "data.tokenizer",
    "data.split",
    "data.val_fraction",
    "data.append_eot",
    "model.block_size",
    "model.n_layer",
    "model.n_head",
    "model.n_embd",
    "model.dropout",
    "model.bias",
    "model.pad_vocab_to",
    "optim.kind",
    "optim.beta1",
    "optim.beta2",
    "optim.weight_decay",
    "optim.max_grad_norm",
    "schedule.kind",
    "schedule.max_lr",
    "schedule.min_lr_ratio",
    "schedule.warmup_steps",
    "schedule.decay_steps",
    "schedule.decay_fraction",
    "schedule.decay_shape",
    "train.max_steps",
    "train.micro_batch_size",
    "train.global_batch_size",
    "train.reduction_slots",
    "train.seed",
    "train.dtype",
    "train.compile",
    "train.on_nonfinite",
    "train.allow_drift",
    "train.log_interval",
    "train.eval_interval",
    "train.eval_tokens",
    "train.checkpoint_interval",
    "train.keep",
    "train.init_from",
    "compute.num_workers",
    "compute.cpus_per_worker",
    "compute.use_gpu",
    "compute.hang_after_s",
    "tracking.uri",
    "tracking.experiment",
]

# field: values as YAML text that must be refused. Every field has a row; a test holds that.
REFUSED = {
    "name": [
        "5",
        "1e5",
        "''",
        "a/b",
        "..",
        ".hidden",
        "'a b'",
        '"a\\n"',
        "ä",
        "[a]",
        "true",
        "x" * 129,
    ],
    "storage": ["1", "''", "[a]", "true"],
    "data.corpus": ["null", "1", "''", "[]", "[a, 1]", "[a, null]", "['']", "[[a]]", "{a: b}"],
    "data.dir": ["1", "''", "[a]"],
    "data.text_field": ["null", "1", "''"],
    "data.invalid_utf8": ["null", "true", "strict", "ignore"],
    "data.tokenizer": ["null", "1", "''", "true"],
    "data.split": ["null", "head", "1", "TAIL"],
    "data.val_fraction": ["null", "0", "1", "-0.1", "x", "true", ".nan", ".inf", "'0.1'"],
    "data.append_eot": ["null", "1", "0", "x", "'true'"],
    "model.block_size": ["null", "0", "-1", "1.5", "x", "true", "'8'"],
    "model.n_layer": ["null", "0", "-1", "1.5", "x", "true"],
    "model.n_head": ["null", "0", "-1", "1.5", "x", "true"],
    "model.n_embd": ["null", "0", "-1", "1.5", "x", "true"],
    "model.dropout": ["null", "-0.1", "1", "x", "true", ".nan"],
    "model.bias": ["null", "1", "x"],
    "model.activation": ["null", "relu", "1"],
    "model.pad_vocab_to": ["null", "0", "-1", "1.5", "x"],
    "optim.kind": ["null", "sgd", "1"],
    "optim.beta1": ["null", "-0.1", "1", "x", ".nan"],
    "optim.beta2": ["null", "-0.1", "1", "x", ".nan"],
    "optim.weight_decay": ["null", "-0.1", "x", ".inf"],
    "optim.max_grad_norm": ["0", "-1", "x", ".inf"],
    "schedule.kind": ["null", "cosin", "1", "[cosine]"],
    "schedule.max_lr": ["null", "0", "-0.001", "x", ".inf", ".nan", "6e-4x", "'6e-4'"],
    "schedule.min_lr_ratio": ["null", "-0.1", "1.1", "x"],
    "schedule.warmup_steps": ["null", "-1", "0.5", "x"],
    "schedule.decay_steps": ["0", "-1", "0.5", "x"],
    "schedule.decay_fraction": ["null", "0", "1.1", "x"],
    "schedule.decay_shape": ["null", "sqrt", "1"],
    "train.max_steps": ["null", "0", "-1", "0.5", "x", "true", "'5'", "2024-01-01"],
    "train.micro_batch_size": ["null", "0", "-1", "0.5", "x"],
    "train.global_batch_size": ["null", "0", "-1", "0.5", "x"],
    "train.reduction_slots": ["0", "-1", "0.5", "x"],
    "train.seed": ["null", "-1", "0.5", "x", "010", "1:30", "1e300", str(2**64)],
    "train.dtype": ["null", "float64", "bf16", "16"],
    "train.compile": ["null", "1", "x"],
    "train.on_nonfinite": ["null", "raise", "1"],
    "train.allow_drift": ["null", "1", "maybe"],
    "train.log_interval": ["0", "-1", "0.5", "x"],
    "train.eval_interval": ["0", "-1", "0.5", "x"],
    "train.eval_tokens": ["0", "1", "-1", "2.5", "x"],
    "train.checkpoint_interval": ["0", "-1", "0.5", "x"],
    "train.keep": ["null", "0", "-1", "0.5", "x"],
    "train.init_from": ["null", "1", "''"],
    "compute.num_workers": ["null", "0", "-1", "1.5", "all", "true"],
    "compute.cpus_per_worker": ["null", "0", "-1", "1.5", "all", "true"],
    "compute.use_gpu": ["null", "1", "0", "maybe"],
    "compute.hang_after_s": ["null", "0", "-1", "auto", "nan"],
    "tracking.uri": ["1", "''", "mlruns", "file:///tmp/mlruns", "ftp://x"],
    "tracking.experiment": ["null", "1", "''"],
}

# override words -> a field that the one line must name and a value that it must quote
DISAGREE = [
    (["train.global_batch_size=10", "train.micro_batch_size=4"], "train.global_batch_size", "10"),
    (["train.global_batch_size=4", "train.micro_batch_size=8"], "train.global_batch_size", "4"),
    (
        ["train.global_batch_size=24", "train.micro_batch_size=4", "train.reduction_slots=3"],
        "train.reduction_slots",
        "3",
    ),
    (
        ["train.global_batch_size=24", "train.micro_batch_size=4", "train.reduction_slots=4"],
        "train.reduction_slots",
        "4",
    ),
    (
        ["train.global_batch_size=24", "train.micro_batch_size=4", "compute.num_workers=3"],
        "compute.num_workers",
        "3",
    ),
    (["compute.num_workers=2"], "compute.num_workers", "2"),
    (["model.n_head=5"], "model.n_head", "5"),
    (["schedule.warmup_steps=2000"], "schedule.warmup_steps", "2000"),
    (["schedule.warmup_steps=300", "schedule.decay_steps=300"], "schedule.warmup_steps", "300"),
    (["schedule.kind=constant", "schedule.warmup_steps=2000"], "schedule.warmup_steps", "2000"),
    (["schedule.kind=inverse_sqrt", "schedule.warmup_steps=2000"], "schedule.warmup_steps", "2000"),
    (["schedule.kind=wsd", "schedule.warmup_steps=1601"], "schedule.decay_fraction", "0.2"),
    (["data.tokenizer=char", "data.append_eot=true"], "data.append_eot", "char"),
    (["name=data"], "name", "data"),
    (["name=mlflow"], "name", "mlflow"),
]


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        load_experiment(None, list(words))
    return str(caught.value)


def written(tmp_path, text: str, name: str = "some.yaml"):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return path


def reread(experiment: Experiment) -> Experiment:
    return parse_experiment(read_yaml(experiment.to_yaml(), "again"), "again")


# ---- fields ----
def test_the_promised_field_names_exist_and_every_field_has_a_row_of_refused_values():
    assert set(PROMISED) <= set(field_docs()) == set(REFUSED) == set(Experiment().flat())


@pytest.mark.parametrize(
    ("field", "text"), [(f, v) for f, values in REFUSED.items() for v in values]
)
def test_a_wrong_value_is_one_line_that_names_the_field_and_quotes_the_value(field, text):
    message = refusal(f"{field}={text}")
    assert "\n" not in message
    assert len(message) < 260
    assert re.match(rf"command line: {re.escape(field)}: ", message), message
    shown = text.strip("'\"[]{}").split(",")[0][:60]
    if text not in (
        ".nan",
        ".inf",
        '"a\\n"',
        "1e300",
        "1e5",
        "{a: b}",
    ):  # shown in JSON's or Python's words
        assert shown in message, message


@pytest.mark.parametrize("field", list(REFUSED))
def test_every_default_is_accepted_when_it_is_said(field):
    default = Experiment().flat()[field]
    assert (
        load_experiment(
            None, [f"{field}={yaml.safe_dump(default, default_flow_style=True).split(chr(10))[0]}"]
        )
        == Experiment()
    )


@pytest.mark.parametrize(("words", "field", "value"), DISAGREE)
def test_fields_that_contradict_each_other_are_one_line_that_names_one_of_them(words, field, value):
    message = refusal(*words)
    assert "\n" not in message
    assert message.startswith(f"command line: {field}: ")
    assert value in message


def test_several_mistakes_are_several_lines():
    lines = refusal(
        "data.val_fraction=2", "model.n_head=0", "compute.num_workers=0", "train.foo=3"
    ).split("\n")
    assert [re.match(r"command line: ([\w.]+): ", line)[1] for line in lines] == [
        "data.val_fraction",
        "model.n_head",
        "train.foo",
        "compute.num_workers",
    ]
    assert (
        len(refusal("model.n_head=5", "name=data", "schedule.warmup_steps=2000").split("\n")) == 3
    )


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [
        ("train.max_step", "train.max_steps"),
        ("train.batch_size", "train.micro_batch_size"),
        ("trian.max_steps", "train"),
        ("schedule.max_lrs", "schedule.max_lr"),
        ("max_steps", "train.max_steps"),
        ("model.max_steps", "train.max_steps"),
        ("nam", "name"),
        ("optim.beta", "optim.beta"),
        ("data.corpora", "data.corpus"),
    ],
)
def test_an_unknown_key_suggests_the_nearest_one(unknown, meant):
    message = refusal(f"{unknown}=3")
    assert "no such field; did you mean " + meant in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "word", ["train.zzzzqqq=1", "7=1", "[1]=1", "train={1: 3}", "train={null: 3}"]
)
def test_a_key_like_no_other_points_to_help_or_is_called_no_field(word):
    assert "no such field" in refusal(word)


@pytest.mark.parametrize(
    "word", ["train.max_steps", "=5", "train.=5", ".max_steps=5", "train..max_steps=5"]
)
def test_a_word_that_is_no_override_is_quoted(word):
    assert refusal(word).startswith(f"'{word}'")


# ---- numbers ----
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-4", 6e-4),
        ("6E-4", 6e-4),
        ("6.e-4", 6e-4),
        (".6e-3", 6e-4),
        ("6.0e-4", 6e-4),
        ("0.0006", 6e-4),
        ("+6e-4", 6e-4),
        ("1", 1.0),
        ("1_000", 1000.0),
        ("1e3", 1000.0),
    ],
)
def test_a_number_is_read_as_a_person_means_it(text, value):
    assert load_experiment(None, [f"schedule.max_lr={text}"]).schedule.max_lr == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("6e5", 600000), ("600_000", 600000), ("6.0e5", 600000), ("7.0", 7), ("0x10", 16)],
)
def test_a_whole_number_may_be_written_with_an_exponent_and_stays_an_integer(text, value):
    steps = load_experiment(None, [f"train.max_steps={text}"]).train.max_steps
    assert steps == value
    assert type(steps) is int


@pytest.mark.parametrize(
    "name",
    ["1e5", "5", "0x1f", "1_0", "010", "2024-01-01", "true", "null", "no", "1.5", "-", "a.b-c_d"],
)
def test_a_run_named_like_a_number_or_a_word_of_yaml_survives_its_own_file(name):
    experiment = Experiment(name=name)
    assert reread(experiment).name == name


# ---- files and overrides ----
def test_overrides_reach_lists_null_and_whole_sections_and_the_last_one_wins():
    e = load_experiment(
        None,
        [
            "data.corpus=[a.txt, 'b c/*.md']",
            "train.eval_interval=null",
            "train.log_interval=",
            "train={max_steps: 7}",
            "train.max_steps=8",
            "storage=/a=b",
        ],
    )
    assert e.data.corpus == ["a.txt", "b c/*.md"]
    assert (e.train.eval_interval, e.train.max_steps, e.storage) == (250, 8, "/a=b")
    later = load_experiment(
        None, ["train.eval_interval=null", "train.log_interval=", "train.checkpoint_interval=~"]
    )
    assert (
        later.train.eval_interval,
        later.train.log_interval,
        later.train.checkpoint_interval,
    ) == (None, None, None)


def test_a_file_is_read_and_overridden_and_names_the_run(tmp_path):
    path = written(
        tmp_path, "model:\n  n_layer: 2\ntrain:\noptim:\n  # all defaults\n", "my-run.yaml"
    )
    e = load_experiment(path, ["model.n_head=4", "train.max_steps=3"])
    assert (e.name, e.model.n_layer, e.model.n_head, e.train.max_steps) == ("my-run", 2, 4, 3)
    assert load_experiment(path, ["name=other"]).name == "other"
    assert load_experiment(path, ["name=null"]).name == "my-run"
    assert load_experiment(path).optim == Experiment().optim


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  max_steps: 5\n  max_steps: 6\n", 2),
        ("train:\n  max_steps: 5\nmodel: {}\ntrain: {}\n", 1),
    ],
)
def test_a_key_given_twice_is_refused_with_its_place(tmp_path, text, line):
    with pytest.raises(UserError, match=rf"some.yaml line {line}.*given twice"):
        load_experiment(written(tmp_path, text))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "5\n"])
def test_a_file_without_sections_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="has no sections"):
        load_experiment(written(tmp_path, text))


def test_a_file_that_is_absent_a_folder_or_no_text_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(UserError, match="cannot be read as an experiment"):
            load_experiment(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: b: c",
        "\tx: 1",
        "a: 'b",
        "{[1]: 2}",
        "a: 2024-99-99",
        "[" * 5000,
        "a: \x00",
        "a: !!int x",
        "%YAML 9\n--- a",
    ],
)
def test_what_is_not_yaml_is_one_line(tmp_path, text):
    with pytest.raises(UserError) as caught:
        load_experiment(written(tmp_path, text))
    assert "not YAML" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [CANARY]",
        "!!python/object/new:os.mkdir [CANARY]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!<tag:yaml.org,2002:python/object:x.Y> {}",
    ],
)
def test_a_tag_that_makes_objects_is_refused_and_makes_none(tmp_path, tag):
    canary = tmp_path / "canary"
    with pytest.raises(UserError, match="not YAML"):
        load_experiment(written(tmp_path, "data:\n  corpus: " + tag.replace("CANARY", str(canary))))
    assert not canary.exists()


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    start = time.monotonic()
    with pytest.raises(UserError, match="aliases"):
        load_experiment(written(tmp_path, "\n".join([*lines, "data: {corpus: *a11}"])))
    with pytest.raises(UserError, match="aliases"):
        load_experiment(None, ["train=&a {max_steps: *a}"])
    assert time.monotonic() - start < 2


# ---- round trip ----
@settings(max_examples=60, deadline=None)
@given(
    name=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(
        lambda n: n not in ("data", "mlflow")
    ),
    corpus=st.lists(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=12), min_size=1, max_size=3
    ),
    lr=st.floats(1e-12, 1e3),
    ratio=st.floats(0, 1),
    seed=st.integers(0, 2**53),
    steps=st.integers(1, 10**9),
    storage=st.none() | st.text(string.printable, min_size=1, max_size=12),
)
def test_what_is_written_reads_back_equal(name, corpus, lr, ratio, seed, steps, storage):
    experiment = parse_experiment(
        {
            "name": name,
            "storage": storage,
            "data": {"corpus": corpus},
            "schedule": {"max_lr": lr, "min_lr_ratio": ratio},
            "train": {"seed": seed, "max_steps": steps},
        },
        "drawn",
    )
    again = reread(experiment)
    assert again == experiment
    assert again.to_yaml() == experiment.to_yaml()


def test_an_experiment_cannot_be_changed_after_it_was_checked():
    with pytest.raises(ValueError, match="frozen"):
        Experiment().train.max_steps = 3


# ---- what follows by arithmetic ----
@pytest.mark.parametrize(
    ("total", "micro", "asked", "micro_batches", "slots"),
    [
        (12, 12, "null", 1, 1),
        (480, 12, "null", 40, 8),
        (32, 1, "null", 32, 8),
        (24, 4, "null", 6, 2),
        (20, 4, "null", 5, 1),
        (64, 1, 16, 64, 16),
        (64, 1, 1, 64, 1),
    ],
)
def test_micro_batches_and_slots_follow_from_the_batch(total, micro, asked, micro_batches, slots):
    e = load_experiment(
        None,
        [
            f"train.global_batch_size={total}",
            f"train.micro_batch_size={micro}",
            f"train.reduction_slots={asked}",
            "model.block_size=100",
        ],
    )
    assert (e.micro_batches, e.slots, e.tokens_per_step) == (micro_batches, slots, total * 100)


@pytest.mark.parametrize(
    ("n_vocab", "pad", "rows"),
    [(50257, 128, 50304), (50257, 1, 50257), (65, 1, 65), (256, 128, 256), (257, 128, 384)],
)
def test_the_vocabulary_is_padded_to_a_multiple(n_vocab, pad, rows):
    e = load_experiment(None, [f"model.pad_vocab_to={pad}"])
    assert e.vocab_size(n_vocab) == e.gpt_config(n_vocab).vocab_size == rows


def test_the_schedule_is_made_of_the_fields_that_are_called_like_it():
    e = load_experiment(
        None,
        [
            "schedule.kind=wsd",
            "schedule.max_lr=1.0",
            "schedule.min_lr_ratio=0.5",
            "schedule.warmup_steps=3",
            "schedule.decay_fraction=0.5",
            "schedule.decay_shape=1-sqrt",
            "train.max_steps=100",
        ],
    )
    rates = [learning_rate(e.lr_schedule(), n) for n in (0, 3, 49, 50, 75, 100)]
    assert rates == pytest.approx([0.25, 1, 1, 1, 0.5 + 0.5 * (1 - 0.5**0.5), 0.5])
    longer = load_experiment(None, ["schedule.decay_steps=50", "train.max_steps=100"])
    assert longer.lr_schedule().decay_steps == 50
    assert load_experiment(None, ["train.max_steps=100"]).lr_schedule().decay_steps == 100


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("decay", ["null", 5, 8, 12])
def test_every_schedule_that_is_accepted_can_be_computed_to_its_end(kind, warmup, decay):
    words = [
        f"schedule.kind={kind}",
        f"schedule.warmup_steps={warmup}",
        f"schedule.decay_steps={decay}",
        "train.max_steps=10",
    ]
    try:
        e = load_experiment(None, words)
    except UserError:
        assert kind not in ("constant", "inverse_sqrt")
        assert warmup > 0
        return
    assert all(0 < learning_rate(e.lr_schedule(), n) <= e.schedule.max_lr for n in range(11))


# ---- help ----
def test_help_lists_every_field_with_its_type_its_default_and_what_it_is():
    text = help_text("Does things.", field_docs())
    entries = dict(re.findall(r"^  (\S+)  \((.*)\)\n      \S", text, re.MULTILINE))
    assert list(entries) == list(Experiment().flat())
    assert entries["train.max_steps"] == "an integer; 2000"
    assert entries["optim.max_grad_norm"] == "a number or null; 1.0"
    assert entries["schedule.kind"] == "cosine | linear | wsd | constant | inverse_sqrt; cosine"
    assert entries["compute.num_workers"] == "an integer or auto; auto"
    assert entries["data.corpus"] == "text or a list of texts; builtin:stdlib"
    assert entries["data.append_eot"] == "true or false; false"
    assert entries["train.eval_tokens"] == "an integer or null; null"
    assert "--dry-run" in text


def test_words_are_told_apart_from_the_experiment():
    path, words = split_words(["a.yaml", "x.y=1", "z=2"])
    assert (str(path), words) == ("a.yaml", ["x.y=1", "z=2"])
    assert split_words(["x.y=1"])[0].name == "quickstart.yaml"
    with pytest.raises(UserError, match=r"b\.yaml"):
        split_words(["a.yaml", "b.yaml"])
