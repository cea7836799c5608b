"""A stopped run saves a checkpoint; the resumed run equals an uninterrupted one."""

import itertools

import pytest

from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker
from tests.helpers.checkpoints import damage
from tests.helpers.curves import exact_part
from tests.helpers.tiny import TINY

SMALL = [
    *TINY,
    "train.max_steps=12",
    "train.log_interval=3",
    "train.eval_interval=4",
    "train.eval_tokens=400",
    "train.checkpoint_interval=100",
    "schedule.max_lr=1e-2",
]
EXPERIMENT = load_experiment(None, SMALL)
# Step 12 is due for a loss but not for an evaluation: only the end of the run evaluates it.
LATE_EVALUATION = EXPERIMENT.replace(train__eval_interval=5)


def outcome(folder: RunFolder) -> tuple:
    """Everything that must not depend on stops: state to the byte and exact metrics."""
    last = store.latest_valid(folder.checkpoints)
    names = ("model.safetensors", "optimizer.safetensors", "state.json")
    parts = [(last / name).read_bytes() for name in names]
    return last.name, parts, [exact_part(line) for line in journal.read(folder)]


def train_until_asked(experiment, folder, dataset, questions: int) -> int:
    """Train; request a stop after this number of questions. Return the step.

    The trainer asks in each slot of each step and before each batch of each evaluation.
    """
    answers = itertools.chain(itertools.repeat(False, questions), itertools.repeat(True))
    trainer = Trainer(experiment, folder, dataset, Worker(), stop_requested=lambda: next(answers))
    for _ in trainer.run():
        pass
    return trainer.state.step


@pytest.fixture(scope="module")
def uninterrupted(tiny_dataset, tmp_path_factory):
    """Outcomes of both experiments without a stop."""
    outcomes = {}
    for experiment in (EXPERIMENT, LATE_EVALUATION):
        folder = RunFolder(tmp_path_factory.mktemp("uninterrupted"))
        train(experiment, folder, tiny_dataset)
        outcomes[experiment.train.eval_interval] = outcome(folder)
    return outcomes


def some_slow(moments: range) -> list:
    """Return parameters of which `make test` runs every third."""
    return [
        pytest.param(moment, marks=[] if index % 3 == 0 else pytest.mark.slow)
        for index, moment in enumerate(moments)
    ]


@pytest.mark.parametrize("questions", some_slow(range(0, 150, 7)))
def test_run_that_stops_at_any_moment_and_resumes_equals_an_uninterrupted_one(
    uninterrupted, tiny_dataset, folder, questions
):
    step = train_until_asked(EXPERIMENT, folder, tiny_dataset, questions)
    ending = folder.read_ending()
    assert (ending.kind, ending.facts["step"]) == ("again", step)
    assert folder.checkpoint_steps() == ([step] if step else [])
    train(EXPERIMENT, folder, tiny_dataset)
    assert outcome(folder) == uninterrupted[4]


@pytest.mark.parametrize("questions", some_slow(range(100, 185, 6)))
def test_checkpoint_has_the_log_window_after_a_stop_in_the_last_evaluation(
    uninterrupted, tiny_dataset, folder, questions
):
    train_until_asked(LATE_EVALUATION, folder, tiny_dataset, questions)
    train(LATE_EVALUATION, folder, tiny_dataset)
    assert outcome(folder) == uninterrupted[5]


def test_run_that_is_stopped_many_times_reaches_its_end(uninterrupted, tiny_dataset, folder):
    stops = 0
    while train_until_asked(EXPERIMENT, folder, tiny_dataset, 30) < 12 or folder.read_ending():
        folder.ending_file.unlink()
        stops += 1
        assert stops < 100
    assert stops > 2
    assert outcome(folder) == uninterrupted[4]


@pytest.mark.parametrize(
    "word",
    ["train.micro_batch_size=4", "train.reduction_slots=1"],
)
def test_resume_with_other_last_bits_needs_allow_drift(tiny_dataset, folder, word):
    first = EXPERIMENT.replace(train__checkpoint_interval=2)
    for line in Trainer(first, folder, tiny_dataset, Worker()).run():
        if line["step"] == 6:
            break
    drifted = load_experiment(None, [*SMALL, word])
    with pytest.raises(UserError, match="train.allow_drift=true"):
        train(drifted, folder, tiny_dataset)
    assert events.read(folder) == []
    allowed = drifted.replace(train__allow_drift=True)
    assert train(allowed, folder, tiny_dataset) == 12
    assert {(event["kind"], event["step"]) for event in events.read(folder)} == {("drift", 4)}


def test_journal_that_was_damaged_between_two_attempts_is_complete_again(
    uninterrupted, tiny_dataset, folder
):
    train_until_asked(EXPERIMENT, folder, tiny_dataset, 80)
    lines = folder.journal_file.read_bytes().splitlines(keepends=True)
    assert len(lines) > 2
    folder.journal_file.write_bytes(b"".join([lines[0], b"garbage\n", *lines[2:]]))
    train(EXPERIMENT, folder, tiny_dataset)
    assert outcome(folder) == uninterrupted[4]
    assert [event["kind"] for event in events.read(folder)] == ["journal_damaged"]


def test_run_whose_checkpoints_are_all_damaged_does_not_begin_again_by_itself(tiny_dataset, folder):
    step = train_until_asked(EXPERIMENT, folder, tiny_dataset, 80)
    damage(folder.checkpoint(step))
    journal_before = folder.journal_file.read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match="train.restart=true"):
            train(EXPERIMENT, folder, tiny_dataset)
    assert folder.journal_file.read_bytes() == journal_before
