"""`train.dtype=auto` is replaced once: a run or sweep that has begun keeps its type."""

import json

import pytest

from orchestrator.cluster import dtypes
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import EXIT_DONE, UserError
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.space.expand import load_sweep
from tests.helpers.fixtures import SMALL
from tests.helpers.local_job import LocalSweepJob, LocalTrainJob, start

AUTO = "train.dtype=auto"


@pytest.fixture
def machine(without_ray, monkeypatch):
    """Make this machine one whose fast type this is."""

    def become(dtype: str) -> None:
        monkeypatch.setattr(dtypes, "fast_dtype", lambda on_gpu: dtype)

    monkeypatch.setattr(dtypes, "MIN_WIDTH", 16)  # the width of the small model
    return become


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_run_that_has_begun_keeps_its_type_on_another_machine(machine, tokens, tmp_path, dtype):
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    machine(dtype)
    assert start(tmp_path, [*tokens, AUTO], steps=5) == EXIT_DONE
    machine(other)
    assert start(tmp_path, [*tokens, AUTO], steps=8) == EXIT_DONE
    assert start(tmp_path, [*tokens, AUTO], steps=8) == EXIT_DONE  # it is finished

    folder = RunFolder(tmp_path / "run")
    assert folder.read_record()["params"]["train.dtype"] == dtype
    assert folder.read_experiment().train.dtype == dtype
    with pytest.raises(UserError, match=f"train.dtype: before '{dtype}', now '{other}'"):
        start(tmp_path, [*tokens, f"train.dtype={other}"], steps=8)


def sweep(storage, tokens, *words: str) -> SweepFolder:
    given = [*SMALL, "name=sweep", f"storage={storage}", "train.checkpoint_interval=null", *tokens]
    assert LocalSweepJob(load_sweep(None, [*given, *words])).run() == EXIT_DONE
    return SweepFolder(storage / "sweep")


def types(folder: SweepFolder) -> dict[str, str]:
    return {trial.name: trial.read_experiment().train.dtype for trial in folder.trials()}


def test_stages_are_those_of_the_type_that_auto_stands_for(sweeps):
    fast = Layout(1, 1, False, fast_dtype="bfloat16")
    widths = "sweep.grid={model.n_embd: [256, 512], schedule.max_lr: [0.01, 0.02]}"
    auto = sweeps.open(widths, AUTO, layout=fast)
    assert [trial.experiment.train.dtype for trial in auto.trials.values()] == [
        *["float32"] * 2,
        *["bfloat16"] * 2,
    ]
    for dtype in ("float32", "bfloat16"):
        plain = sweeps.open(widths, f"train.dtype={dtype}").trials.values()
        mine = [auto.trials[trial.name].key for trial in plain]
        assert sum(key == trial.key for key, trial in zip(mine, plain, strict=True)) == 2


def test_samples_of_optuna_have_the_type_that_auto_stands_for(sweeps):
    words = "sweep={sampler: optuna, num_samples: 2, space: {schedule.max_lr: [1e-3, 1e-2]}}"
    study = sweeps.open(
        words, AUTO, "model.n_embd=512", layout=Layout(1, 1, False, fast_dtype="bfloat16")
    )
    (trial,) = study.next_sample()
    assert trial.experiment.train.dtype == "bfloat16"


def test_sweep_that_grows_on_another_machine_keeps_its_type(machine, tokens, tmp_path):
    grid = "sweep.grid={{schedule.max_lr: [{}]}}"
    machine("float32")
    folder = sweep(tmp_path, tokens, grid.format("0.01"), "train.max_steps=6", AUTO)
    (trial,) = folder.trials()
    record = trial.read_record()
    # As a version wrote it that did not know the field.
    del record["attempts"][-1]["layout"]["fast_dtype"]
    trial.run_file.write_text(json.dumps(record))
    machine("bfloat16")
    folder = sweep(tmp_path, tokens, grid.format("0.01, 0.02"), "train.max_steps=6", AUTO)
    assert list(types(folder).values()) == ["float32", "float32"]


def test_sweep_that_goes_on_with_auto_has_one_type(machine, tokens, tmp_path, capsys):
    """The first trials had another type than auto stands for on this machine."""
    grid = "sweep.grid={{schedule.max_lr: [{}]}}"
    machine("float32")
    sweep(tmp_path, tokens, grid.format("0.01"), "train.max_steps=6", "train.dtype=bfloat16")
    folder = sweep(tmp_path, tokens, grid.format("0.01, 0.02"), "train.max_steps=6", AUTO)
    assert list(types(folder).values()) == ["bfloat16", "bfloat16"]
    assert "are compared" not in capsys.readouterr().out


def test_trials_of_several_types_are_one_line_unless_the_sweep_compares_types(sweeps):
    fast = Layout(1, 1, False, fast_dtype="bfloat16")
    mixed = sweeps.open("sweep.grid={model.n_embd: [256, 512]}", AUTO, layout=fast)
    [line] = [line for line in mixed.notes() if line.startswith("train.dtype: ")]
    assert "1 trial(s) in float32, 1 trial(s) in bfloat16 are compared" in line
    assert sweeps.open("sweep.grid={train.dtype: [float32, bfloat16]}").notes() == []


def test_emulated_type_of_a_run_that_has_begun_is_one_line(machine, tokens, tmp_path, capsys):
    machine("bfloat16")
    start(tmp_path, [*tokens, AUTO], steps=5)
    assert capsys.readouterr().err == ""
    machine("float32")
    start(tmp_path, [*tokens, AUTO], steps=8)
    [line] = [li for li in capsys.readouterr().err.splitlines() if "train.dtype=bfloat16: " in li]
    assert "use a new name" in line


def test_run_that_begins_again_has_the_type_of_a_new_one(machine, tokens, tmp_path):
    machine("float32")
    start(tmp_path, [*tokens, AUTO], steps=5)
    for weights in (tmp_path / "run" / "checkpoints").glob("*/model.safetensors"):
        weights.write_bytes(b"")
    machine("bfloat16")
    assert start(tmp_path, [*tokens, AUTO, "train.restart=true"], steps=5) == EXIT_DONE
    assert RunFolder(tmp_path / "run").read_experiment().train.dtype == "bfloat16"


def test_emulated_type_is_one_line_of_a_run(machine, tokens, tmp_path, capsys):
    machine("float32")
    words = [*SMALL, "name=run", f"storage={tmp_path}", "train.max_steps=5", *tokens]
    experiment = load_experiment(None, [*words, "train.dtype=bfloat16"])
    assert LocalTrainJob(experiment).run() == EXIT_DONE
    errors = capsys.readouterr().err.splitlines()
    assert sum("train.dtype=bfloat16" in line for line in errors) == 1
