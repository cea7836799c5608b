"""A stage that fails ends like a lone run with the same fault: kind, exit status, reason, event."""

import contextlib
import errno
import json
import os
import re
import shutil

import pytest

from orchestrator.errors import NOT_WRITABLE, UserError
from orchestrator.objects.store import StoreAwayError
from orchestrator.runs import events
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep.outcome import ending_of
from orchestrator.sweep.report.comparison import table
from orchestrator.sweep.report.files import SweepFiles
from orchestrator.sweep.stage import run_stage
from orchestrator.train.numerics import Worker
from orchestrator.workers import fitting
from orchestrator.workers.attempts import PATIENCE, record_failure
from orchestrator.workers.diagnose import advise, diagnose
from tests.helpers import forked, stuck
from tests.helpers.datasets import change_in_place
from tests.helpers.fixtures import Killed
from tests.helpers.read_only import make_read_only

TRIAL = "sweep.trials.only.train.max_steps=10"
TWO = ["sweep.trials.a.train.max_steps=10", "sweep.trials.b={schedule.max_lr: 1e-3}"]


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    """The search for a micro-batch that fits takes a minute, and has tests of its own."""
    monkeypatch.setattr(fitting, "advice", lambda fault, *_: f"{fault.by}: use a smaller one")


def failing(error: Exception, trial: str | None = None):
    def fail(stage) -> None:
        if trial is None or trial in stage.trials:
            raise error

    return fail


def lone_ending(study, error: Exception):
    """How a lone run of the first trial ends that raises the error."""
    trial = next(iter(study.trials.values()))
    folder = RunFolder(study.folder.path.parent / "lone")
    folder.path.mkdir()
    record_failure(folder, Worker(), error)
    ending = diagnose(folder, error)
    ending = advise(ending, folder, trial.experiment, trial.dataset, study.layout)
    return ending, [event["kind"] for event in events.read(folder)]


@pytest.mark.parametrize(
    ("error", "status", "event"),
    [
        (MemoryError("cannot allocate 5 GiB"), 2, ["out_of_memory"]),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            2,
            ["out_of_memory"],
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, []),
        (UserError("train.init_from: not a checkpoint"), 2, []),
        (ValueError("a bug"), 1, []),
    ],
    ids=["out of memory", "torch out of memory", "disk full", "user error", "bug"],
)
def test_failed_stage_ends_like_a_lone_run(sweeps, error, status, event):
    study = sweeps.open(TRIAL)
    sweeps.run(study, fail=failing(error))
    ending = ending_of(study, 1)
    lone, lone_events = lone_ending(study, error)
    assert lone_events == event
    assert [e["kind"] for e in events.read(study.folder)] == ["trial_failed", *event]
    assert ending.exit_status == lone.exit_status == status
    stage = study.folder.stage(study.tree.stages[0].id)
    reason = study.reason("only").replace(str(stage.path), "FOLDER")
    assert reason == lone.reason.replace(str(study.folder.path.parent / "lone"), "FOLDER")
    if status == 2:
        assert ending.reason == study.reason("only")
    assert len(study.progress.begun) == 1
    assert list(map(len, study.progress.begun.values())) == [1]


def test_stage_on_a_node_that_does_not_share_the_sweep_fails_at_once(sweeps):
    study = sweeps.open(TRIAL)
    stage = study.progress.next()
    study.progress.ended(stage, died=False, problem="storage: node2 does not have /mnt")
    ending = ending_of(study, 1)
    assert (ending.exit_status, ending.reason) == (2, "storage: node2 does not have /mnt")


def test_killed_stage_fails_after_as_many_attempts_as_a_lone_run(sweeps):
    study = sweeps.open(TRIAL)
    ran = sweeps.run(study, fail=failing(Killed()))
    assert len(ran) == PATIENCE and len(set(ran)) == 1
    assert ending_of(study, 1).exit_status == 1
    *restarts, failed = events.read(study.folder)
    assert (failed["kind"], failed["trial"]) == ("trial_failed", "only")
    assert len(restarts) == PATIENCE - 1
    for restart in restarts:
        assert (restart["kind"], restart["stage"], restart["step"]) == ("restart", ran[0], 0)
    assert "died without a traceback" in study.reason("only")


def test_stage_that_makes_progress_between_kills_is_done(sweeps):
    study = sweeps.open("sweep.trials.only.train.max_steps=60")

    def fail(stage) -> None:
        folder = study.folder.stage(stage.id)
        before = max(folder.checkpoint_steps(), default=0)
        with contextlib.closing(run_stage(folder, Worker())) as lines:
            for _ in lines:
                if before < max(folder.checkpoint_steps(), default=0) < stage.stop:
                    break
        if stage.stop not in folder.checkpoint_steps():
            raise Killed

    ran = sweeps.run(study, fail=fail)
    assert len(ran) > PATIENCE
    assert ending_of(study, 1).kind == "done"
    assert sweeps.outcome(study.folder.trial("only")) == sweeps.alone(study, "only")


def test_stage_with_a_rank_that_hung_continues_from_its_checkpoint(sweeps):
    """The events of the sweep name the rank, and the stacks are in the folder of the stage."""
    study = sweeps.open("sweep.trials.only.train.max_steps=20", "train.checkpoint_interval=5")
    [stage] = study.tree.stages
    folder = study.folder.stage(stage.id)

    def fail(_stage) -> None:
        if not folder.checkpoint_steps():
            with contextlib.closing(run_stage(folder, Worker())) as lines:
                next(line for line in lines if line["step"] >= 10)
            job = {"folder": str(folder.path), "how": "python", "rank": 1, "phase": "gradient"}
            [rank] = forked.start(stuck.hang, [{**job, "quick": True}])
            rank.join()
            raise Killed

    sweeps.run(study, fail=fail)
    assert sweeps.outcome(study.folder.trial("only")) == sweeps.alone(study, "only")
    hang, restart = events.read(study.folder)
    assert (hang["kind"], hang["stage"]) == ("hang", stage.id)
    assert (restart["kind"], restart["stage"]) == ("restart", stage.id)
    assert hang["message"].startswith("rank 1 (process ")
    assert study.progress.wait_reasons == {
        stage.id: f"{hang['message']}; the stage starts once more"
    }
    assert [f.name for f in folder.path.glob("hangs/0001/*")] == ["hang-rank1.txt"]
    assert [*folder.path.glob("hang-rank*"), *folder.path.glob(".ranks/*")] == []
    assert json.loads(folder.result_file.read_text())["steps_run"] < 20


@pytest.mark.parametrize("times", [1, PATIENCE])
def test_stage_whose_store_is_away_begins_again_and_ends_with_status_75(sweeps, times):
    study, failures = sweeps.open(TRIAL), []
    problem = "s3://b: the store does not answer (503)"

    def fail(_) -> None:
        if len(failures) < times:
            failures.append(problem)
            raise StoreAwayError(f"{problem}; run the same command again")

    sweeps.run(study, fail=fail)
    assert ending_of(study, 1).exit_status == (0 if times == 1 else 75)
    notes = [event["message"] for event in events.read(study.folder) if event["kind"] == "restart"]
    message = f"stage {study.tree.stages[0].id} begins again: {problem}"
    assert notes == [message] * min(times, PATIENCE - 1)


def test_after_a_full_disk_nothing_begins_and_with_room_the_sweep_goes_on(sweeps):
    study = sweeps.open(*TWO)
    ran = sweeps.run(study, fail=failing(OSError(errno.ENOSPC, "No space left on device")))
    assert len(ran) == 1
    ending = ending_of(study, 1)
    assert (ending.kind, ending.cause, ending.exit_status) == ("user", "disk_full", 2)
    shown = table(study.results())
    assert re.search(r"failed +the disk is full: ", shown)
    assert re.search(r"waiting +not begun: the disk is full", shown)
    again = sweeps.open(*TWO)
    sweeps.run(again)
    assert ending_of(again, 1).kind == "done"
    for name in again.trials:
        assert sweeps.outcome(again.folder.trial(name)) == sweeps.alone(again, name)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_full_disk_of_the_driver_ends_the_sweep_before_the_next_stage(sweeps, monkeypatch, number):
    study = sweeps.open(*TWO)

    def full(folder) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(RunFolder, "reserve", full)
    assert sweeps.run(study) == []
    ending = ending_of(study, 1)
    what, advice = NOT_WRITABLE[number]
    assert ending.exit_status == 2
    assert ending.reason.startswith(f"{what}: ") and advice in ending.reason
    assert study.reason("a") == f"not begun: {what}"


def test_sweep_ends_if_its_file_system_becomes_read_only_and_goes_on_later(sweeps, monkeypatch):
    study = sweeps.open(*TWO)

    def fail(stage) -> None:
        make_read_only(monkeypatch, study.folder.path)

    with pytest.raises(OSError, match="Read-only file system"):  # Tune's loop ends with it
        sweeps.run(study, fail=fail)
    SweepFiles(study).finish(Ending("user"), 1.0)
    monkeypatch.undo()
    again = sweeps.open(*TWO)
    sweeps.run(again)
    for name in again.trials:
        assert sweeps.outcome(again.folder.trial(name)) == sweeps.alone(again, name)


def test_ending_is_recorded_on_a_full_disk_and_its_reserve_is_removed(sweeps, monkeypatch):
    study = sweeps.open(TRIAL)

    def fail(stage) -> None:
        assert study.folder.stage(stage.id).reserve_file.exists()
        # `write_ending` overwrites the reserve.
        monkeypatch.setattr("orchestrator.files.write_atomically", full)
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    sweeps.run(study, fail=fail)
    assert study.reason("only").startswith("the disk is full: ")
    assert list(study.folder.path.glob("stages/*/.reserve")) == []


def test_summary_of_each_trial_out_of_memory_has_the_advice(sweeps):
    study = sweeps.open(*TWO)
    sweeps.run(study, fail=failing(MemoryError("no memory")))
    ending = ending_of(study, 1)
    SweepFiles(study).finish(ending, 1.0)
    for name in study.trials:
        summary = json.loads(study.folder.trial(name).summary_file.read_text())
        assert summary["reason"] == ending.reason
        assert summary["reason"].endswith("use a smaller one")


def test_killed_stage_that_works_at_the_second_try_is_done(sweeps):
    study = sweeps.open(TRIAL)
    faults = iter([Killed()])

    def fail(stage) -> None:
        for fault in faults:
            raise fault

    sweeps.run(study, fail=fail)
    assert ending_of(study, 1).kind == "done"
    assert sweeps.outcome(study.folder.trial("only")) == sweeps.alone(study, "only")


def test_sweep_with_another_fault_beside_out_of_memory_has_status_1(sweeps):
    study = sweeps.open(*TWO)

    def fail(stage) -> None:
        raise MemoryError("no memory") if "a" in stage.trials else ValueError("a bug")

    sweeps.run(study, fail=fail)
    assert ending_of(study, 1).exit_status == 1
    kinds = [event["kind"] for event in events.read(study.folder)]
    assert sorted(kinds) == ["out_of_memory", "trial_failed", "trial_failed"]


def test_trial_out_of_memory_beside_one_that_is_done_has_status_2(sweeps):
    study = sweeps.open(*TWO)
    sweeps.run(study, fail=failing(MemoryError("no memory"), "b"))
    assert {row.trial: row.state for row in study.results()} == {"a": "done", "b": "failed"}
    ending = ending_of(study, 1)
    assert (ending.kind, ending.cause) == ("user", "out_of_memory")


def test_shard_changed_in_place_ends_the_stage_before_its_next_checkpoint(sweeps, tmp_path):
    sweeps.dataset_dir = shutil.copytree(sweeps.dataset_dir, tmp_path / "dataset")
    study = sweeps.open(TRIAL, "train.checkpoint_interval=2")
    [stage] = study.tree.stages
    folder = study.folder.stage(stage.id)

    def change_after_a_checkpoint() -> bool:
        if 4 in folder.checkpoint_steps():
            change_in_place(sweeps.dataset_dir / "train-00000.parquet")
        return False

    sweeps.run(study, stop_asked=change_after_a_checkpoint)
    assert "train-00000.parquet: was changed while it was read" in study.reason("only")
    assert ending_of(study, 1).exit_status == 2
    assert max(folder.checkpoint_steps()) < 10
