"""A run that is trained in stretches equals an uninterrupted one: weights, moments, every loss.

A stretch has its own folder, like a stage of a sweep or a segment of a replay.
"""

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker
from tests.helpers.curves import exact_part
from tests.helpers.tiny import TINY

SMALL = [
    "name=small",
    *TINY,
    "train.max_steps=20",
    "train.log_interval=3",
    "train.eval_interval=5",
    "train.eval_tokens=400",
    "train.checkpoint_interval=100",
    "schedule.max_lr=1e-2",
    "schedule.kind=constant",
    "schedule.warmup_steps=4",
]


def curve(lines) -> list[dict]:
    return [exact_part(line) for line in lines]


def outcome(run_dir) -> tuple:
    """Return name and bytes of the last checkpoint, and the exact metrics."""
    last = checkpoint.latest_valid(run_dir / "checkpoints")
    parts = [
        (last / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    ]
    return last.name, parts, curve(journal.read(RunFolder(run_dir)))


def train_run(run_dir, data_dir, *words):
    """Train a run to its end. Return its outcome."""
    run_dir.mkdir(exist_ok=True)
    train(load_experiment(None, [*SMALL, *words]), RunFolder(run_dir), data_dir)
    return outcome(run_dir)


def train_stretch(run_dir, data_dir, end, parent=None, words=(), **options):
    """Train to step `end`, from the checkpoint `parent`. Return the new checkpoint."""
    run_dir.mkdir(exist_ok=True)
    trainer = Trainer(
        load_experiment(None, [*SMALL, *words]),
        RunFolder(run_dir),
        data_dir,
        Worker(),
        parent=parent,
        end_step=end,
        **options,
    )
    for _ in trainer.run():
        pass
    return checkpoint.path_of(run_dir / "checkpoints", end)


@pytest.fixture(scope="module")
def whole(tiny_dataset, tmp_path_factory):
    return train_run(tmp_path_factory.mktemp("whole") / "run", tiny_dataset)


@pytest.mark.parametrize("cut", [1, 5, 6, 7, 15, 19])
def test_two_stretches_equal_the_run(whole, tiny_dataset, tmp_path, cut):
    parent = train_stretch(tmp_path / "first", tiny_dataset, cut)
    train_stretch(tmp_path / "second", tiny_dataset, 20, parent)
    first = journal.read(RunFolder(tmp_path / "first"))
    second = journal.read(RunFolder(tmp_path / "second"))
    assert [line["step"] for line in first] == sorted(
        {0, *range(3, cut + 1, 3), *range(5, cut + 1, 5)}
    )
    name, parts, _ = outcome(tmp_path / "second")
    assert (name, parts, curve(first + second)) == whole


@pytest.mark.parametrize("end", [5, 6, 7, 15])
def test_extended_run_equals_an_uninterrupted_one(whole, tiny_dataset, tmp_path, end):
    _, _, lines = train_run(tmp_path / "run", tiny_dataset, f"train.max_steps={end}")
    assert {"train/loss", "val/loss"} <= lines[-1].keys()
    assert train_run(tmp_path / "run", tiny_dataset) == whole


@pytest.mark.parametrize("end", [5, 6, 7, 15])
def test_stretch_that_becomes_the_end_of_a_run_gets_the_metrics_of_the_end(
    tiny_dataset, tmp_path, end
):
    """In a sweep: a trial is added that ends where a stage of other trials has ended."""
    train_stretch(tmp_path / "trunk", tiny_dataset, end)
    train_stretch(tmp_path / "trunk", tiny_dataset, end, words=[f"train.max_steps={end}"])
    alone = train_run(tmp_path / "alone", tiny_dataset, f"train.max_steps={end}")
    assert outcome(tmp_path / "trunk") == alone


def test_given_learning_rates_are_used_and_logged(tiny_dataset, tmp_path):
    other = load_experiment(None, [*SMALL, "schedule.max_lr=5e-3"])
    train_run(tmp_path / "given", tiny_dataset, "schedule.max_lr=5e-3")
    train_stretch(tmp_path / "rates", tiny_dataset, 20, steps=other.steps())
    assert outcome(tmp_path / "rates")[1:] == outcome(tmp_path / "given")[1:]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("scheduled", "constant"),
    [
        (["optim.weight_decay=0.6", "schedule.weight_decay={}"], "optim.weight_decay=0.3"),
        (["optim.momentum=0.9", "schedule.momentum={}"], "optim.momentum=0.45"),
    ],
)
def test_scheduled_setting_is_that_of_the_update(tiny_dataset, tmp_path, kind, scheduled, constant):
    """Half of a value at all steps is half of the value."""
    half = "{kind: piecewise, points: {0: 0.5}}"
    words = [f"optim.kind={kind}", "train.max_steps=6"]
    words += [word.replace("={}", f"={half}") for word in scheduled]
    _, ours, _ = train_run(tmp_path / "scheduled", tiny_dataset, *words)
    _, theirs, _ = train_run(tmp_path / "constant", tiny_dataset, *words[:2], constant)
    assert ours == theirs
    _, others, _ = train_run(tmp_path / "other", tiny_dataset, *words[:3])
    assert (others[0] == ours[0]) == (kind == "adamw" and "momentum" in constant)


def test_damaged_parent_is_refused_with_the_name_of_its_file(tiny_dataset, tmp_path):
    parent = train_stretch(tmp_path / "first", tiny_dataset, 6)
    data = bytearray((parent / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (parent / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors.*SHA-256 differs"):
        train_stretch(tmp_path / "second", tiny_dataset, 20, parent)


def test_every_line_is_yielded_after_it_was_written(tiny_dataset, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    trainer = Trainer(load_experiment(None, SMALL), folder, tiny_dataset, Worker())
    for line in trainer.run():
        assert journal.read(folder)[-1] == line
    assert line["step"] == 20
