"""Configuration: refused values, error messages, derived values, and the round trip of a file."""

import re
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from model.schedule import SCHEDULES, learning_rate
from orchestrator.config.experiment import Experiment, field_docs, load_experiment, parse_experiment
from orchestrator.config.yaml_text import read_yaml
from orchestrator.errors import UserError
from pipelines.common import help_text, split_words

# Names that users have in their files: none may be removed.
PROMISED = [
    "name",
    "storage",
    "data.corpus",
    "data.dir",
    "data.text_field",
    "data.invalid_utf8",
    "data.on_null",
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
    "train.restart",
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
    "compute.wait_for_nodes_s",
    "tracking.uri",
    "tracking.experiment",
    "tracking.alert",
]

# field: values as YAML text that must be refused. A test checks that every field is here.
REFUSED = {
    "model.kind": ["gpt", "gpt3", "5", "null", "true", "[gpt2]"],
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
    "mirror": ["1", "''", "[a]", "true"],
    "data.corpus": ["null", "1", "''", "[]", "[a, 1]", "[a, null]", "['']", "[[a]]", "{a: b}"],
    "data.dir": ["1", "''", "[a]"],
    "data.text_field": ["null", "1", "''"],
    "data.invalid_utf8": ["null", "true", "strict", "ignore"],
    "data.on_null": ["null", "true", "drop", "''"],
    "data.tokenizer": ["null", "1", "''", "true"],
    "data.encoder": ["null", "fast", "1", "Tiktoken"],
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
    "model.loss_chunk": ["0", "-1", "1.5", "x", "true"],
    "model.pad_vocab_to": ["null", "0", "-1", "1.5", "x"],
    "optim.kind": ["null", "sgd", "1"],
    "optim.beta1": ["null", "-0.1", "1", "x", ".nan"],
    "optim.beta2": ["null", "-0.1", "1", "x", ".nan"],
    "optim.weight_decay": ["null", "-0.1", "x", ".inf"],
    "optim.max_grad_norm": ["0", "-1", "x", ".inf"],
    "optim.momentum": ["null", "-0.1", "1", "x"],
    "optim.momentum_warmup_steps": ["null", "-1", "1.5", "x"],
    "optim.cautious": ["null", "1", "x"],
    "optim.polar_steps": ["0", "6", "1.5", "x"],
    **{
        f"optim.groups.{group}.{field}": values
        for group in ("matrix", "embedding", "head", "scalar")
        for field, values in {
            "lr_scale": ["-1", "x", ".inf"],
            "weight_decay": ["-0.1", "x"],
            "beta1": ["1", "-0.1", "x"],
            "beta2": ["1", "-0.1", "x"],
        }.items()
    },
    "schedule.kind": ["null", "cosin", "1", "[cosine]"],
    "schedule.max_lr": ["null", "0", "-0.001", "x", ".inf", ".nan", "6e-4x", "'6e-4'"],
    "schedule.min_lr_ratio": ["null", "-0.1", "1.1", "x"],
    "schedule.warmup_steps": ["null", "-1", "0.5", "x"],
    "schedule.decay_steps": ["0", "-1", "0.5", "x"],
    "schedule.decay_fraction": ["null", "0", "1.1", "x"],
    "schedule.decay_shape": ["null", "sqrt", "1"],
    "schedule.exponent": ["null", "0", "-1", "x"],
    "schedule.points": ["1", "x", "[1]", "{x: 1}", "{-1: 1}", "{0: -1}", "{0: x}"],
    **{
        f"schedule.{name}.{field}": values
        for name in ("weight_decay", "momentum")
        for field, values in {
            "kind": ["null", "cosin", "1"],
            "decay_steps": ["0", "-1", "0.5", "x"],
            "decay_fraction": ["0", "1.1", "x"],
            "points": ["1", "x", "{0: -1}"],
        }.items()
    },
    "schedule.weight_decay.min_ratio": ["null", "-0.1", "1.1", "x"],
    "schedule.momentum.final": ["-0.1", "1", "x"],
    "train.max_steps": ["null", "0", "-1", "0.5", "x", "true", "'5'", "2024-01-01"],
    "train.micro_batch_size": ["null", "0", "-1", "0.5", "x"],
    "train.global_batch_size": ["null", "0", "-1", "0.5", "x"],
    "train.batch_schedule": ["1", "x", "{0: 0}", "{-1: 4}", "{x: 4}", "{0: 1.5}"],
    "train.shard_optimizer": ["1", "null", "x"],
    "train.overlap_exchange": ["1", "null", "x"],
    "train.activation_checkpointing": ["1", "null", "x"],
    "train.ema": ["0", "1", "-0.1", "x"],
    "train.reduction_slots": ["0", "-1", "0.5", "x"],
    "train.seed": ["null", "-1", "0.5", "x", "010", "1:30", "1e300", str(2**64)],
    "train.dtype": ["null", "float64", "bf16", "16"],
    "train.compile": ["null", "1", "x"],
    "train.on_nonfinite": ["null", "raise", "1"],
    "train.allow_drift": ["null", "1", "maybe"],
    "train.restart": ["null", "1", "maybe"],
    "train.log_interval": ["0", "-1", "0.5", "x"],
    "train.eval_interval": ["0", "-1", "0.5", "x"],
    "train.eval_tokens": ["0", "1", "-1", "2.5", "x"],
    "train.checkpoint_interval": ["0", "-1", "0.5", "x"],
    "train.sample_prompt": ["1", "''"],
    "train.sample_tokens": ["0", "-1", "0.5", "x"],
    "train.keep": ["null", "0", "-1", "0.5", "x"],
    "train.init_from": ["null", "1", "''"],
    "compute.num_workers": ["null", "0", "-1", "1.5", "all", "true", "[]", "[1, x]", "[0, 1]"],
    "compute.cpus_per_worker": ["null", "0", "-1", "1.5", "all", "true"],
    "compute.use_gpu": ["null", "1", "0", "maybe"],
    "compute.wait_for_nodes_s": ["null", "0", "-1", "auto", "nan"],
    "compute.hang_after_s": ["null", "0", "-1", "auto", "nan"],
    "tracking.uri": [
        "1",
        "''",
        "mlruns",
        "file:///tmp/mlruns",
        "ftp://x",
        "http://h:99999",
        "'http://a b'",
    ],
    "tracking.experiment": ["null", "1", "''"],
    "tracking.alert": ["null", "true", "failed"],
}

# (overrides, field that the one line must name, value that it must quote)
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
    (["compute.num_workers=[1, 2]"], "compute.num_workers", "2"),
    (["train.global_batch_size=null"], "train.global_batch_size", "null"),
    (
        ["train.global_batch_size=24", "train.batch_schedule={0: 24}"],
        "train.batch_schedule",
        "train.global_batch_size=24",
    ),
    (["train.batch_schedule={}"], "train.batch_schedule", "0"),
    (["train.batch_schedule={1: 24}"], "train.batch_schedule", "0"),
    (["train.batch_schedule={0: 12, 9: 24, 5: 12}"], "train.batch_schedule", "0, 9, 5"),
    (["train.batch_schedule={0: 12, 2000: 24}"], "train.batch_schedule", "2000"),
    (["train.batch_schedule={0: 12, 9: 20}"], "train.batch_schedule", "step 9: 20"),
    (
        ["train.micro_batch_size=2", "train.batch_schedule={0: 16, 9: 12}"],
        "train.reduction_slots",
        "6 micro-batches",
    ),
    (["model.n_head=5"], "model.n_head", "5"),
    (["schedule.warmup_steps=2000"], "schedule.warmup_steps", "2000"),
    (["schedule.warmup_steps=300", "schedule.decay_steps=300"], "schedule.warmup_steps", "300"),
    (["schedule.kind=constant", "schedule.warmup_steps=2000"], "schedule.warmup_steps", "2000"),
    (["schedule.kind=inverse_sqrt", "schedule.warmup_steps=2000"], "schedule.warmup_steps", "2000"),
    (["schedule.kind=wsd", "schedule.warmup_steps=1601"], "schedule.decay_fraction", "0.2"),
    (["schedule.kind=power", "schedule.warmup_steps=1601"], "schedule.decay_fraction", "0.2"),
    (
        ["schedule.momentum.kind=linear", "optim.momentum_warmup_steps=2000"],
        "optim.momentum_warmup_steps",
        "2000",
    ),
    (["schedule.kind=piecewise"], "schedule.points", "missing"),
    (["schedule.points={0: 1}"], "schedule.points", "cosine"),
    (["schedule.weight_decay.points={0: 1}"], "schedule.weight_decay.points", "constant"),
    (
        ["schedule.kind=piecewise", "schedule.points={9: 1, 0: 0.5}"],
        "schedule.points",
        "9, 0",
    ),
    (["data.tokenizer=char", "data.append_eot=true"], "data.append_eot", "char"),
    (["name=data"], "name", "data"),
    (["name=mlflow"], "name", "mlflow"),
    (["data.corpus=https://me:pw@host/x#sha256=1"], "data.corpus", "$NAME"),
    (["data.corpus=[a.txt, 'https://host/x?token=abc']"], "data.corpus", "$NAME"),
    (["tracking.uri=postgresql://me:pw@host/x"], "tracking.uri", "MLFLOW_TRACKING_URI"),
    (["tracking.uri=postgresql://host/x?password=pw"], "tracking.uri", "MLFLOW_TRACKING_URI"),
]


def refusal(*overrides: str) -> str:
    """Return the message of the UserError for these overrides."""
    with pytest.raises(UserError) as caught:
        load_experiment(None, list(overrides))
    return str(caught.value)


def read_back(experiment: Experiment) -> Experiment:
    return parse_experiment(read_yaml(experiment.to_yaml(), "again"), "again")


# ---- refused values ----


def test_every_field_has_refused_values():
    assert set(PROMISED) <= set(field_docs())
    assert set(field_docs()) == set(REFUSED) == set(Experiment().flat())


@pytest.mark.parametrize(
    ("field", "text"), [(field, text) for field, values in REFUSED.items() for text in values]
)
def test_wrong_value_is_one_line_with_field_and_value(field, text):
    """In a file: an override of a text field takes 5 and true as text."""
    parts = field.split(".")
    lines = "\n".join(f"{'  ' * depth}{part}:" for depth, part in enumerate(parts)) + f" {text}"
    with pytest.raises(UserError) as caught:
        parse_experiment(read_yaml(lines, "file"), "file")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 260
    assert message.startswith(f"file: {field}: ")
    # These are shown as JSON or as Python writes them.
    if text not in (".nan", ".inf", '"a\\n"', "1e300", "1e5") and text[:1] != "{":
        shown = text.strip("'\"[]{}").split(",")[0][:60]
        assert shown in message


@pytest.mark.parametrize("field", list(REFUSED))
def test_default_is_accepted_as_override(field):
    default = yaml.safe_dump(Experiment().flat()[field], default_flow_style=True).split("\n")[0]
    assert load_experiment(None, [f"{field}={default}"]) == Experiment()


@pytest.mark.parametrize(("overrides", "field", "value"), DISAGREE)
def test_contradiction_is_one_line_with_field_and_value(overrides, field, value):
    message = refusal(*overrides)
    assert "\n" not in message
    assert message.startswith(f"command line: {field}: ")
    assert value in message


FORM = "write it as {0: 64, 1000: 128}"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.batch_schedule={0: 0}", f"step 0: 0 is not an integer at least 1; {FORM}"),
        ("train.batch_schedule={0: 8, 9: x}", f'step 9: "x" is not an integer; {FORM}'),
        (
            "train.batch_schedule={x: 4}",
            f'"x" is not a step, which is an integer of at least 0; {FORM}',
        ),
        (
            "train.batch_schedule=0:8",
            f'"0:8" is not a mapping of steps to an integer or null; {FORM}',
        ),
        (
            "schedule.momentum.points={0: -1}",
            "step 0: -1 is not a number at least 0.0; write it as {0: 1, 1000: 0.1}",
        ),
    ],
)
def test_wrong_value_of_a_step_is_named_and_the_right_form_is_shown(override, says):
    assert refusal(override) == f"command line: {override.partition('=')[0]}: {says}"


def test_each_mistake_has_its_own_line():
    message = refusal(
        "data.val_fraction=2", "model.n_head=0", "compute.num_workers=0", "train.foo=3"
    )
    fields = re.findall(r"^command line: ([\w.]+): ", message, re.MULTILINE)
    assert fields == ["data.val_fraction", "model.n_head", "train.foo", "compute.num_workers"]
    message = refusal("model.n_head=5", "name=data", "schedule.warmup_steps=2000")
    assert message.count("\n") == 2


@pytest.mark.parametrize(
    ("unknown", "similar"),
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
        ("trian.max_steps", "train.max_steps"),
        ("optim.groups.matrx.lr_scale", "optim.groups.matrix.lr_scale"),
        ("optim.groups.head.lr_scal", "optim.groups.head.lr_scale"),
        ("optim.group.embedding.beta1", "optim.groups.embedding.beta1"),
        ("optm.groups.scalar.beta2", "optim.groups.scalar.beta2"),
        ("optim.groups.heads.x", "optim.groups.head"),
    ],
)
def test_unknown_field_suggests_the_most_similar_one(unknown, similar):
    message = refusal(f"{unknown}=3")
    assert f"no such field; did you mean {similar}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["optim={groups.matrix.lr_scale: 3}"],
            "optim.groups.matrix.lr_scale: one key with dots; nest it: "
            "optim: {groups: {matrix: {lr_scale: …}}}",
        ),
        (["model.n_kv_head=2"], "model.n_kv_head: no such field; only model.kind=modern has it"),
        *(
            (
                [f"{field}=3"],
                f"{field}: no such field; the vocabulary is that of data.tokenizer, rounded up to "
                "a multiple of model.pad_vocab_to",
            )
            for field in ("model.vocab_size", "data.vocab_size", "vocab_size")
        ),
    ],
)
def test_field_that_exists_elsewhere_is_refused_with_its_place(overrides, line):
    assert refusal(*overrides) == f"command line: {line}"


@pytest.mark.parametrize(
    "override", ["train.zzzzqqq=1", "7=1", "[1]=1", "train={1: 3}", "train={null: 3}"]
)
def test_field_without_similar_name_is_refused(override):
    assert "no such field" in refusal(override)


def test_experiment_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Experiment().train.max_steps = 3


# ---- round trip ----


@pytest.mark.parametrize(
    "name",
    ["1e5", "5", "0x1f", "1_0", "010", "2024-01-01", "true", "null", "no", "1.5", "-", "a.b-c_d"],
)
def test_name_that_looks_like_a_yaml_value_is_read_back(name):
    assert read_back(Experiment(name=name)).name == name


@given(
    name=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(
        lambda name: name not in ("data", "mlflow")
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
def test_written_experiment_reads_back_equal(name, corpus, lr, ratio, seed, steps, storage):
    tree = {
        "name": name,
        "storage": storage,
        "data": {"corpus": corpus},
        "schedule": {"max_lr": lr, "min_lr_ratio": ratio},
        "train": {"seed": seed, "max_steps": steps},
    }
    experiment = parse_experiment(tree, "drawn")
    again = read_back(experiment)
    assert again == experiment
    assert again.to_yaml() == experiment.to_yaml()


@given(
    totals=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    micro=st.integers(1, 300),
    slots=st.none() | st.integers(1, 64),
    workers=st.integers(1, 64),
)
@example(totals=[64], micro=1, slots=None, workers=16)
@example(totals=[48], micro=12, slots=None, workers=16)
@example(totals=[480], micro=12, slots=4, workers=32)
@example(totals=[8], micro=16, slots=6, workers=4)
@example(totals=[64, 24], micro=12, slots=4, workers=48)
def test_changes_that_a_refusal_names_are_accepted(totals, micro, slots, workers):
    words = [
        "train.global_batch_size=null",
        f"train.batch_schedule={dict(enumerate(totals))}",
        f"train.micro_batch_size={micro}",
        f"train.reduction_slots={'null' if slots is None else slots}",
        f"compute.num_workers={workers}",
    ]
    try:
        load_experiment(None, words)
    except UserError as error:
        [line] = str(error).splitlines()
        for changes in line.partition("; set ")[2].split(", or "):
            load_experiment(None, [*words, *changes.split(" and ")])


def test_sixteen_workers_need_sixteen_slots():
    message = refusal(
        "train.global_batch_size=64", "train.micro_batch_size=1", "compute.num_workers=16"
    )
    assert message.endswith("; set train.reduction_slots=16, or compute.num_workers=8")


@pytest.mark.parametrize("workers", [3, 5, 6, 7, 8])
def test_any_number_of_workers_up_to_the_slots_is_valid(workers):
    load_experiment(
        None,
        [
            "train.global_batch_size=24",
            "train.micro_batch_size=1",
            f"compute.num_workers={workers}",
        ],
    )


# ---- derived values ----


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
def test_micro_batches_and_slots_follow_from_batch_sizes(total, micro, asked, micro_batches, slots):
    overrides = [
        f"train.global_batch_size={total}",
        f"train.micro_batch_size={micro}",
        f"train.reduction_slots={asked}",
        "model.block_size=100",
    ]
    experiment = load_experiment(None, overrides)
    assert experiment.micro_batches == micro_batches
    assert experiment.slots == slots
    assert experiment.tokens_per_step == total * 100


@pytest.mark.parametrize(
    ("n_vocab", "pad", "rows"),
    [(50257, 128, 50304), (50257, 1, 50257), (65, 1, 65), (256, 128, 256), (257, 128, 384)],
)
def test_vocabulary_is_padded_to_a_multiple(n_vocab, pad, rows):
    experiment = load_experiment(None, [f"model.pad_vocab_to={pad}"])
    assert experiment.vocab_size(n_vocab) == rows
    assert experiment.model_config_for(n_vocab).vocab_size == rows


def test_model_has_the_shape_of_its_fields():
    shape = {"block_size": 8, "n_layer": 2, "n_head": 3, "n_embd": 12, "dropout": 0.5}
    choices = {"bias": True, "activation": "gelu_tanh", "loss_chunk": 3}
    experiment = parse_experiment({"model": {**shape, **choices, "pad_vocab_to": 1}}, "test")
    config = experiment.new_model(65).config
    assert vars(config) == {**shape, **choices, "vocab_size": 65}


def test_schedule_has_the_values_of_its_fields():
    overrides = [
        "schedule.kind=wsd",
        "schedule.max_lr=1.0",
        "schedule.min_lr_ratio=0.5",
        "schedule.warmup_steps=3",
        "schedule.decay_fraction=0.5",
        "schedule.decay_shape=1-sqrt",
        "train.max_steps=100",
    ]
    schedule = load_experiment(None, overrides).lr_schedule()
    rates = [learning_rate(schedule, step) for step in (0, 3, 49, 50, 75, 100)]
    assert rates == pytest.approx([0.25, 1, 1, 1, 0.5 + 0.5 * (1 - 0.5**0.5), 0.5])


def test_decay_ends_at_max_steps_unless_set():
    assert load_experiment(None, ["train.max_steps=100"]).lr_schedule().decay_steps == 100
    overrides = ["schedule.decay_steps=50", "train.max_steps=100"]
    assert load_experiment(None, overrides).lr_schedule().decay_steps == 50


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("decay", ["null", 5, 8, 12])
def test_accepted_schedule_has_a_rate_at_every_step(kind, warmup, decay):
    overrides = [
        f"schedule.kind={kind}",
        f"schedule.warmup_steps={warmup}",
        f"schedule.decay_steps={decay}",
        "train.max_steps=10",
    ]
    try:
        experiment = load_experiment(None, overrides)
    except UserError:
        if kind == "piecewise":  # needs points
            return
        assert SCHEDULES[kind].has_end
        assert warmup > 0
        return
    schedule = experiment.lr_schedule()
    assert all(0 < learning_rate(schedule, step) <= schedule.max_lr for step in range(11))


# ---- command line ----


def test_help_lists_type_and_default_of_every_field():
    text = help_text("Does things.", field_docs())
    entries = dict(re.findall(r"^  (\S+)  \((.*)\)\n      \S", text, re.MULTILINE))
    assert list(entries) == list(Experiment().flat())
    assert entries["train.max_steps"] == "an integer; 2000"
    assert entries["optim.max_grad_norm"] == "a number or null; 1.0"
    assert entries["schedule.kind"] == f"{' | '.join(SCHEDULES)}; cosine"
    assert entries["compute.num_workers"] == "an integer or auto or a list of integers; auto"
    assert entries["data.corpus"] == "text or a list of texts; builtin:stdlib"
    assert entries["data.append_eot"] == "true or false; false"
    assert entries["train.eval_tokens"] == "an integer or null; null"
    assert "--dry-run" in text


def test_help_explains_every_choice_of_a_table():
    text = help_text("Does things.", field_docs())
    for kind, entry in SCHEDULES.items():
        assert f"        {kind}: {entry.help}" in text


def test_overrides_are_separated_from_the_experiment():
    assert split_words(["runs/lr=0.1/a.yaml"]) == (Path("runs/lr=0.1/a.yaml"), [])
    assert split_words(["x.y=runs/a=b"])[1] == ["x.y=runs/a=b"]
    path, overrides = split_words(["a.yaml", "x.y=1", "z=2"])
    assert str(path) == "a.yaml"
    assert overrides == ["x.y=1", "z=2"]
    assert split_words(["x.y=1"])[0].name == "quickstart.yaml"
    with pytest.raises(UserError, match=r"b\.yaml"):
        split_words(["a.yaml", "b.yaml"])
    with pytest.raises(UserError, match="EXPERIMENT.yaml: 's3://b/x=1.yaml' is an address"):
        split_words(["s3://b/x=1.yaml"])
