"""YAML files and overrides: values that are read, and errors that name the place of a mistake."""

import pytest

from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.config.load import kind_of_model
from orchestrator.config.yaml_text import read_yaml
from orchestrator.errors import UserError
from orchestrator.sweep.space.expand import load_sweep


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an experiment file."""

    def write_file(text: str, name: str = "some.yaml"):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return write_file


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
def test_number_may_have_any_usual_form(text, value):
    assert load_experiment(None, [f"schedule.max_lr={text}"]).schedule.max_lr == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("6e5", 600000), ("600_000", 600000), ("6.0e5", 600000), ("7.0", 7), ("0x10", 16)],
)
def test_integer_may_have_an_exponent_and_stays_an_integer(text, value):
    steps = load_experiment(None, [f"train.max_steps={text}"]).train.max_steps
    assert steps == value
    assert type(steps) is int


# ---- overrides ----


def test_overrides_set_lists_sections_and_null_and_the_last_one_wins():
    overrides = [
        "data.corpus=[a.txt, 'b c/*.md']",
        "train.eval_interval=null",
        "train={max_steps: 7}",  # replaces the whole section
        "train.max_steps=8",
        "storage=/a=b",
    ]
    experiment = load_experiment(None, overrides)
    assert experiment.data.corpus == ["a.txt", "b c/*.md"]
    assert experiment.train.eval_interval == 250
    assert experiment.train.max_steps == 8
    assert experiment.storage == "/a=b"


@pytest.mark.parametrize("null", ["null", "", "~"])
def test_null_turns_an_interval_off(null):
    assert load_experiment(None, [f"train.log_interval={null}"]).train.log_interval is None


@pytest.mark.parametrize(
    "override", ["train.max_steps", "=5", "train.=5", ".max_steps=5", "train..max_steps=5"]
)
def test_malformed_override_is_quoted(override):
    with pytest.raises(UserError) as caught:
        load_experiment(None, [override])
    assert str(caught.value).startswith(f"'{override}'")


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.corpus=/a/b #c.txt", "/a/b #c.txt"),
        ("tracking.experiment=team #4", "team #4"),
        ("tracking.experiment=1.10", "1.10"),
        ("tracking.experiment=v1: final", "v1: final"),
        ("tracking.experiment=null", "null"),  # the field is not optional
        ("tracking.experiment='v1 # 2'", "v1 # 2"),  # quotes around the whole text are removed
        ("tracking.experiment='a' or 'b'", "'a' or 'b'"),
        ("name=1e5", "1e5"),
        ("data.corpus=[ab]*.txt", "[ab]*.txt"),
        ("data.corpus=['a #b', 1e5, null]", ["a #b", "1e5", "null"]),
        ("storage=null", None),
        ("storage=~", "~"),
        ("tracking.uri=", None),
    ],
)
def test_text_field_takes_its_text_as_it_is(override, value):
    key = override.partition("=")[0]
    assert load_experiment(None, [override]).flat()[key] == value


@pytest.mark.parametrize(
    "override", ["train.max_steps=100 #c", "train={max_steps: 7} # c", "train.log_interval=#5"]
)
def test_comment_in_an_override_is_refused(override):
    with pytest.raises(UserError, match="an override has no comment") as caught:
        load_experiment(None, [override])
    assert str(caught.value).startswith(f"'{override}'")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("train: {batch_schedule: {0:8, 9:16}}", "0: 8"),
        ("train: {max_steps:5}", "max_steps: 5"),
        ("sweep: {trials: {a: {schedule.kind:constant}}}", "schedule.kind: constant"),
    ],
)
def test_missing_blank_after_a_colon_is_named(write, text, right):
    joined = right.replace(" ", "")
    words = f"no blank after the colon of {joined}; write {right}$"
    with pytest.raises(UserError, match=f"some.yaml line 1: .*{words}"):
        load_sweep(write(text), [])
    key, _, value = text.partition(": ")
    with pytest.raises(UserError, match=f"^'{key}={{.*{words}"):
        load_sweep(None, [f"{key}={value}"])


def test_keys_with_colons_and_sets_of_words_are_read():
    text = "{'a:b': 1, c:d: 2, e: , f::}"
    assert read_yaml(text, "file") == {"a:b": 1, "c:d": 2, "e": None, "f:": None}


def test_number_sign_in_a_list_of_values_needs_quotes():
    with pytest.raises(UserError, match="write quotes around a text that has a #"):
        load_sweep(None, ["sweep.grid.data.corpus=[/a/b #c.txt, d.txt]"])
    sweep = load_sweep(None, ["sweep.grid.data.corpus=['/a/b #c.txt', d.txt]"])
    assert [trial.experiment.data.corpus for trial in sweep.trials] == ["/a/b #c.txt", "d.txt"]
    sweep = load_sweep(None, ["sweep.trials.a.data.corpus=/a/b #c.txt"])
    assert sweep.trials[0].experiment.data.corpus == "/a/b #c.txt"


# ---- files ----


def test_file_is_overridden_and_names_the_run(write):
    path = write("model:\n  n_layer: 2\ntrain:\noptim:\n  # all defaults\n", "my-run.yaml")
    experiment = load_experiment(path, ["model.n_head=4", "train.max_steps=3"])
    assert experiment.name == "my-run"
    assert experiment.model.n_layer == 2
    assert experiment.model.n_head == 4
    assert experiment.train.max_steps == 3
    assert experiment.optim == Experiment().optim
    assert load_experiment(path, ["name=other"]).name == "other"
    assert load_experiment(path, ["name=null"]).name == "my-run"


@pytest.mark.parametrize("section", ["optim:", "optim:\n  groups:", "optim:\n  groups:\n    head:"])
def test_section_whose_lines_are_all_comments_is_as_if_absent(write, section):
    assert load_experiment(write(f"{section}\n      # a comment\n")).optim == Experiment().optim


def test_mapping_of_a_sweep_whose_lines_are_all_comments_is_empty(write):
    sweep = load_sweep(
        write("sweep:\n  trials:\n  grid:\n    train.seed: [1, 2]\n"), ["train.max_steps=9"]
    )
    assert len(sweep.trials) == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.kind=modern"],
        ["model={kind: modern, n_layer: 2}", "model.n_layer=3"],
        ["model=null", "model.kind=modern"],
        ["model={kind: gpt2}", "model.kind=modern"],
        ["model.kind=gpt2", "model={kind: modern}"],
    ],
)
def test_kind_of_model_is_that_after_all_overrides(overrides, write):
    path = write("model:\n  kind: gpt2\n")
    assert kind_of_model(path, overrides) == "modern"
    experiment = load_experiment(path, [*overrides, "model.window=S"])
    assert experiment.model.kind == "modern"


@pytest.mark.parametrize("later", ["model=null", "model={n_layer: 2}"])
def test_override_that_would_remove_the_kind_of_model_is_refused(later):
    with pytest.raises(UserError, match="model.kind=modern: a later model=… replaces"):
        load_experiment(None, ["model.kind=modern", later])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\n  max_steps: 5\n  max_steps: 6\n", 2),
        ("train:\n  max_steps: 5\nmodel: {}\ntrain: {}\n", 1),
    ],
)
def test_duplicate_key_is_refused_with_its_line(write, text, line):
    with pytest.raises(UserError, match=rf"some.yaml line {line}.*given twice"):
        load_experiment(write(text))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "5\n"])
def test_file_without_sections_is_refused(write, text):
    with pytest.raises(UserError, match="has no sections"):
        load_experiment(write(text))


def test_unreadable_file_is_refused(tmp_path):
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
def test_invalid_yaml_is_one_line(write, text):
    with pytest.raises(UserError) as caught:
        load_experiment(write(text))
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
def test_tag_that_creates_objects_is_refused(write, tmp_path, tag):
    canary = tmp_path / "canary"
    with pytest.raises(UserError, match="not YAML"):
        load_experiment(write("data:\n  corpus: " + tag.replace("CANARY", str(canary))))
    assert not canary.exists()


def test_aliases_are_refused_before_they_are_expanded(write):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    for i in range(1, 12):  # 9**12 values in all
        lines.append(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]")
    lines.append("data: {corpus: *a11}")
    with pytest.raises(UserError, match="aliases"):
        load_experiment(write("\n".join(lines)))
    with pytest.raises(UserError, match="aliases"):
        load_experiment(None, ["train=&a {max_steps: *a}"])
