"""Fixtures for sweeps and commands, which run in this process without Ray, and for tracking."""

import os
import runpy
import sys
from pathlib import Path

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cluster.layout import Layout
from orchestrator.data.dataset import load_manifest
from orchestrator.runs import journal
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.stage import run_stage
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.workers.attempts import record_failure
from tests.helpers import stores
from tests.helpers.checkpoints import written_by_one
from tests.helpers.curves import exact_part
from tests.helpers.tiny import TINY

REPO = Path(__file__).resolve().parent.parent.parent
SMALL = [
    *TINY,
    "train.max_steps=20",
    "train.log_interval=3",
    "train.eval_interval=5",
    "train.eval_tokens=400",
    "train.checkpoint_interval=4",
    "schedule.max_lr=1e-2",
    "schedule.kind=wsd",
    "schedule.warmup_steps=4",
]


class Killed(Exception):
    """Stands for a process that was killed: it leaves no traceback."""


@pytest.fixture(scope="session")
def lone_runs() -> dict[str, dict]:
    """Outcomes of experiments that were trained alone, by all of their fields."""
    return {}


@pytest.fixture
def sweeps(tiny_dataset, tmp_path, lone_runs):
    """Sweeps of a small experiment, whose stages run one after the other in this process."""
    return Sweeps(tiny_dataset, tmp_path, lone_runs)


def run_stages(
    progress,
    limit: int | None = None,
    fail=lambda stage: None,
    stop_asked=lambda: False,
    cpus: int = 1,
) -> list[str]:
    """Run stages one after the other in this process; see `Sweeps.run`."""
    worker = Worker(cpus=cpus)
    ran: list[str] = []
    while limit is None or len(ran) < limit:
        stage = progress.next()
        if not stage:
            break
        ran.append(stage)
        folder = progress.folder.stage(stage)
        try:
            fail(progress.tree.by_id[stage])
            for _ in run_stage(folder, worker, stop_asked):
                pass
            progress.ended(stage, died=False)
        except Killed:
            progress.ended(stage, died=True)
        except Exception as error:
            record_failure(folder, worker, error)
            progress.ended(stage, died=True)
    return ran


class Sweeps:
    """Opens and runs sweeps.

    Attributes:
        folder: The storage: each sweep has a folder in it.
        small: Settings of the experiment, as overrides.
    """

    small = SMALL

    def __init__(self, dataset_dir: Path, storage: Path, lone_runs: dict[str, dict]) -> None:
        self.dataset_dir = dataset_dir
        self.folder = storage
        self.lone_runs = lone_runs

    def load(self, *words: str, name: str = "sweep"):
        """Return the configuration of a sweep with these overrides."""
        from orchestrator.sweep.space.expand import load_sweep

        return load_sweep(None, [f"name={name}", f"data.dir={self.dataset_dir}", *SMALL, *words])

    def open(self, *words: str, name: str = "sweep", layout: Layout = Layout(1, 1, False)):  # noqa: B008
        """Plan a sweep."""
        from orchestrator.sweep.study import Study
        from orchestrator.sweep.trials import data_key

        sweep = self.load(*words, name=name)
        folder = SweepFolder(self.folder / name)
        folder.path.mkdir(exist_ok=True)
        dataset = load_manifest(self.dataset_dir)
        experiments = [sweep.base, *(trial.experiment for trial in sweep.trials)]
        datasets = {data_key(experiment.data): dataset for experiment in experiments}
        return Study(sweep, folder, layout, datasets).restored()

    def run(
        self,
        study,
        limit: int | None = None,
        fail=lambda stage: None,
        stop_asked=lambda: False,
    ) -> list[str]:
        """Run stages. Return the ids of those that ran.

        Args:
            study: The sweep.
            limit: Most stages to run; None: all.
            fail: Called with each stage. An exception that it raises ends the stage; `Killed`
                leaves no traceback.
            stop_asked: Returns True if the running stage should stop.
        """
        from orchestrator.sweep.report.files import SweepFiles

        progress = study.progress
        report = SweepFiles(study)
        # The figure takes a second and has its own tests.
        report.write_figure = lambda: None
        progress.on_stage_end = report.stage_ended
        report.begin()
        ran = run_stages(progress, limit, fail, stop_asked)
        study.summary = report.finish(Ending("done"), 1.0)
        return ran

    def alone(self, study, trial: str) -> dict:
        """Train a trial as a run of its own, once in the session. Return its outcome."""
        experiment = study.trials[trial].experiment
        key = experiment.replace(name="alone").model_dump_json()
        if key not in self.lone_runs:
            folder = RunFolder(self.folder / f"alone-{trial}")
            folder.path.mkdir()
            train(experiment, folder, self.dataset_dir)
            self.lone_runs[key] = self.outcome(folder)
        return self.lone_runs[key]

    @staticmethod
    def outcome(folder) -> dict:
        """Return what must not depend on how a run or trial was trained."""
        folder = RunFolder(folder)
        last = checkpoint.latest_valid(folder.checkpoints)
        tensors = checkpoint.load_tensors(last, "model")
        parts = ("optimizer.safetensors", "state.json")
        return {
            "step": last.name,
            "weights": checkpoint.weights_sha256(tensors),
            "parts": [written_by_one(last, name) for name in parts],
            "curve": [exact_part(line) for line in journal.read(folder)],
        }


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Database of an embedded MLflow store. One for each module."""
    database = tmp_path_factory.mktemp("storage") / "mlflow" / "mlflow.db"
    stores.copy_empty(database)
    return database


@pytest.fixture
def impatient(monkeypatch):
    """Let trackers send and retry after shorter pauses."""
    monkeypatch.setattr("orchestrator.track.sender.POLL_S", 0.1)
    monkeypatch.setattr("orchestrator.track.sender.PAUSES_S", (0.1, 0.5))


@pytest.fixture
def uri(store, impatient, monkeypatch, tmp_path):
    """URI of `store`. The test runs in an empty folder and must leave it empty."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield f"sqlite:///{store}"
    assert os.listdir(folder) == []


@pytest.fixture
def typed(monkeypatch, capsys):
    """Return a function that runs a command in this process, without Ray: (status, stderr)."""

    def type_(script: str, *words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [script, *words])
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        # These two change the streams and signals of the whole process, which is pytest's here.
        monkeypatch.setattr("pipelines.streams.secure", lambda: None)
        monkeypatch.setattr("orchestrator.runs.signals.begin", lambda: None)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(REPO / "pipelines" / script), run_name="__main__")
        return ended.value.code, capsys.readouterr().err

    return type_
