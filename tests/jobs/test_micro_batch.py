"""`train.micro_batch_size=auto` is replaced once, as if the number had been written."""

import pytest

from orchestrator.cluster import layout
from orchestrator.config.experiment import load_experiment
from orchestrator.cost.timing import Timing
from orchestrator.errors import EXIT_DONE, UserError
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep import cost
from orchestrator.sweep.space.expand import load_sweep
from orchestrator.workers import fitting
from tests.helpers.curves import final_outcome
from tests.helpers.fixtures import SMALL
from tests.helpers.local_job import LocalSweepJob, start

AUTO = ["train.micro_batch_size=auto", "train.global_batch_size=8"]


@pytest.fixture
def machine(without_ray, monkeypatch):
    """Make this machine one on which this micro-batch is the largest that fits."""
    monkeypatch.setattr("orchestrator.cluster.device.has_several_nodes", lambda: False)
    monkeypatch.setattr(fitting, "_room", lambda layout, stages: 1.0)

    def become(size: int) -> None:
        def time_worker(experiment, *_, **__) -> Timing:
            fits = experiment.train.micro_batch_size <= size
            return Timing(1, 1, 1, 1, 1, 0 if fits else 1, 1)

        monkeypatch.setattr(fitting, "time_worker", time_worker)

    return become


def test_run_is_that_of_the_number_and_keeps_it_on_another_machine(machine, tokens, tmp_path):
    machine(4)
    assert start(tmp_path, [*tokens, *AUTO], steps=5) == EXIT_DONE
    machine(2)
    assert start(tmp_path, [*tokens, *AUTO], steps=8) == EXIT_DONE
    assert start(tmp_path, [*tokens, *AUTO], steps=8) == EXIT_DONE  # it is finished

    folder = RunFolder(tmp_path / "run")
    assert folder.read_record()["params"]["train.micro_batch_size"] == 4
    assert folder.read_experiment().train.micro_batch_size == 4
    written = [*AUTO, "train.micro_batch_size=4"]
    assert start(tmp_path, [*tokens, *written], steps=8) == EXIT_DONE  # as if it had been written
    assert start(tmp_path / "other", [*tokens, *written], steps=8) == EXIT_DONE
    assert final_outcome(folder) == final_outcome(RunFolder(tmp_path / "other" / "run"))
    with pytest.raises(UserError, match="train.micro_batch_size: before 4, now 2"):
        start(tmp_path, [*tokens, *AUTO, "train.micro_batch_size=2"], steps=8)


def test_dry_run_of_a_run_and_of_a_sweep_find_the_number_without_ray(
    tokens, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(fitting, "_find_size", lambda layout, trials, stages: 4)
    words = [*SMALL, "name=new", f"storage={tmp_path}", *AUTO, *tokens]
    assert fitting.resolved_here(load_experiment(None, words)).train.micro_batch_size == 4
    monkeypatch.setattr("orchestrator.sweep.cost.estimate_of", lambda *_, **__: "not measured")
    assert cost.show(load_sweep(None, [*words, "sweep.grid={schedule.max_lr: [0.01]}"])) == 0
    assert capsys.readouterr().out.count("train.micro_batch_size=auto: 4") == 2


def sweep(storage, tokens, *words: str) -> SweepFolder:
    given = [*SMALL, "name=sweep", f"storage={storage}", "train.max_steps=6", *AUTO, *tokens]
    assert LocalSweepJob(load_sweep(None, [*given, *words])).run() == EXIT_DONE
    return SweepFolder(storage / "sweep")


def test_trials_of_a_sweep_have_one_number_also_when_it_grows(machine, tokens, tmp_path):
    grid = "sweep.grid={{schedule.max_lr: [{}]}}"
    machine(4)
    folder = sweep(tmp_path, tokens, grid.format("0.01"))
    machine(2)
    sweep(tmp_path, tokens, grid.format("0.01, 0.02"))
    assert [t.read_experiment().train.micro_batch_size for t in folder.trials()] == [4, 4]

    stages = {stage.name for stage in folder.stages()}
    sweep(tmp_path, tokens, grid.format("0.01, 0.02"), "train.micro_batch_size=4")
    assert {stage.name for stage in folder.stages()} == stages


def test_trial_whose_batch_the_number_does_not_divide_is_refused(machine, tokens, tmp_path):
    grid = "sweep.grid={{train.global_batch_size: [{}]}}"
    machine(8)
    folder = sweep(tmp_path, tokens, grid.format("8"))
    with pytest.raises(UserError, match=r"^trial .*12.*: train.micro_batch_size: auto is 8 here"):
        sweep(tmp_path, tokens, grid.format("8, 12"))
    assert len(list(folder.trials())) == 1


def test_slots_are_those_of_the_number_on_more_workers(machine, tokens, tmp_path, monkeypatch):
    machine(8)
    assert start(tmp_path, [*tokens, *AUTO], steps=5) == EXIT_DONE
    words = [*SMALL, "name=run", f"storage={tmp_path}", *AUTO, *tokens]
    one = "sweep.grid={schedule.max_lr: [0.01]}"
    sweep(tmp_path, tokens, one)
    monkeypatch.setattr(layout, "alive_nodes", lambda: [layout.Node(8, 2)])
    monkeypatch.setattr("orchestrator.cluster.device.of_workers", lambda found, _: found)
    job = LocalSweepJob(load_sweep(None, [*words, "name=sweep", one]))
    assert job._layout().num_workers == 1
    with pytest.raises(
        UserError, match="auto is 8 here; compute.num_workers: 2 is more than the 1"
    ):
        start(tmp_path, [*tokens, *AUTO, "compute.num_workers=2"], steps=8)
