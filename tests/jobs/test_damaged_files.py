"""Every file of a run's and a sweep's folder is damaged in several ways, one at a time.

The next start then gives the same weights, curves and points in MLflow. Journals and checkpoints
have tests of their own.
"""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import EXIT_DONE
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.track.tracker import resend_metrics
from tests.helpers.curves import exact_part
from tests.helpers.fixtures import Sweeps
from tests.helpers.local_job import start
from tests.helpers.tracked import expected, rows

DAMAGES = {
    "cut": lambda content: content[: len(content) // 2],
    "emptied": lambda content: b"",
    "zeroed": lambda content: bytes(len(content)),
    "doubled": lambda content: content * 2,
    "foreign": lambda content: b'{"a": 1}\n',
}
GRID = ["sweep.grid={schedule.max_lr: [0.01, 0.02], train.max_steps: [12, 16]}"]


def outcome(storage):
    folder = RunFolder(storage / "run")
    summary = json.loads(folder.summary_file.read_text())
    curve = [exact_part(line) for line in journal.read(folder)]
    return summary["weights_sha256"], curve


def files_of(folder):
    """Return the files that the tests damage, by their path in the folder."""
    own_tests = ("metrics.", "checkpoints/")
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    return [
        name
        for name in names
        if (folder / name).is_file() and not any(part in name for part in own_tests)
    ]


@pytest.fixture(scope="module")
def runs(without_ray, tokens, tmp_path_factory):
    """Storages with a run that has made 8 of 20 steps, and with one that is finished."""
    begun, finished = (tmp_path_factory.mktemp(name) for name in ("begun", "finished"))
    assert start(begun, tokens, 8) == EXIT_DONE
    shutil.copytree(begun, finished, dirs_exist_ok=True)
    assert start(finished, tokens, 20) == EXIT_DONE
    return {"begun": begun, "finished": finished}


@given(st.data())
def test_damaged_file_of_a_run(runs, tokens, data):
    state = data.draw(st.sampled_from(sorted(runs)))
    name = data.draw(st.sampled_from(files_of(runs[state] / "run")))
    damage = data.draw(st.sampled_from(sorted(DAMAGES)))
    with tempfile.TemporaryDirectory() as temporary:
        storage = Path(temporary) / "storage"
        shutil.copytree(runs[state], storage, symlinks=True)
        file = storage / "run" / name
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
        assert start(storage, tokens, 20) == EXIT_DONE
        assert outcome(storage) == outcome(runs["finished"])
        database = storage / "mlflow" / "mlflow.db"
        assert resend_metrics(RunFolder(storage / "run"), f"sqlite:///{database}", "espalier")
        assert rows(database, storage / "run") == expected(storage / "run")


@pytest.mark.parametrize("name", ["run.json", "summary.json", "tracking.json", "experiment.yaml"])
def test_lost_file_of_a_finished_run_is_made_again(runs, tokens, tmp_path, name, capfd):
    for remove in (False, True):
        storage = tmp_path / str(remove)
        shutil.copytree(runs["finished"], storage)
        file = storage / "run" / name
        key = json.loads((storage / "run" / "run.json").read_text())["key"]
        if remove:
            file.unlink()
        else:
            file.write_bytes(b"")
        assert start(storage, tokens, 20) == EXIT_DONE
        assert outcome(storage) == outcome(runs["finished"])
        assert json.loads((storage / "run" / "run.json").read_text())["key"] == key
        said = f"{file}: empty, cut or overwritten; it counts as missing" in capfd.readouterr().err
        assert said == (not remove and name != "experiment.yaml")


# ---- a sweep ----


def sweep_outcome(study):
    return {row.trial: (row.state, row.final, row.weights_sha256) for row in study.results()}


@pytest.fixture(scope="module")
def sweep(tiny_dataset, tmp_path_factory):
    """A finished sweep whose trials share stages: (its storage, outcome of its trials)."""
    sweeps = Sweeps(tiny_dataset, tmp_path_factory.mktemp("swept"), {})
    study = sweeps.open(*GRID)
    sweeps.run(study)
    return sweeps.folder, sweep_outcome(study)


def test_other_files_in_the_folder_of_a_sweep_are_skipped(sweep, tiny_dataset, tmp_path):
    golden, result = sweep
    shutil.copytree(golden, tmp_path / "storage", symlinks=True)
    for folder in ("trials", "stages"):
        (tmp_path / "storage" / "sweep" / folder / ".DS_Store").write_bytes(b"x")
        (tmp_path / "storage" / "sweep" / folder / "notes").mkdir()
    sweeps = Sweeps(tiny_dataset, tmp_path / "storage", {})
    study = sweeps.open(*GRID)
    sweeps.run(study)
    assert sweep_outcome(study) == result


@given(st.data())
def test_damaged_file_of_a_sweep(sweep, tiny_dataset, data):
    golden, result = sweep
    name = data.draw(st.sampled_from(files_of(golden / "sweep")))
    damage = data.draw(st.sampled_from(sorted(DAMAGES)))
    with tempfile.TemporaryDirectory() as temporary:
        sweeps = Sweeps(tiny_dataset, Path(temporary) / "storage", {})
        shutil.copytree(golden, sweeps.folder, symlinks=True)
        file = sweeps.folder / "sweep" / name
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
        study = sweeps.open(*GRID)
        sweeps.run(study)
        assert sweep_outcome(study) == result
        for trial in study.trials.values():
            lines = [
                (sweep_folder / "trials" / trial.name / "metrics.jsonl").read_bytes()
                for sweep_folder in (golden / "sweep", sweeps.folder / "sweep")
            ]
            assert lines[0] == lines[1]
