"""What the tests of sweeps share: a small experiment, and a way to run its tree in this process, one stage at a time.

And those of tracking: an embedded store.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cluster.layout import Layout
from orchestrator.data.dataset import load_manifest
from orchestrator.runs import journal, metrics
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.stage import run_stage
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.workers.ray_train import record_failure

SMALL = [
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "model.dropout=0.1",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.max_steps=20",
    "train.log_interval=3",
    "train.eval_interval=5",
    "train.eval_tokens=400",
    "train.checkpoint_interval=4",
    "schedule.max_lr=1e-2",
    "schedule.kind=wsd",
    "schedule.warmup_steps=4",
]


def exact(lines) -> list[dict]:
    """Of a curve all that must not depend on how it was made."""
    return [metrics.exact_part(r) for r in lines]


class Killed(Exception):
    """Stands for a process that was killed: it leaves no traceback."""


@pytest.fixture(scope="session")
def lone_runs() -> dict:
    """What experiments gave by themselves, by all of their fields."""
    return {}


@pytest.fixture
def sweeps(tiny_dataset, tmp_path, lone_runs):
    """`.open(words)` plans a sweep; `.run(study)` runs it here, without Ray; `.alone(study, trial)` runs one trial by itself."""
    from orchestrator.sweep.report.files import Report
    from orchestrator.sweep.space.expand import load_sweep
    from orchestrator.sweep.study import Study, data_key

    dataset = load_manifest(tiny_dataset)

    def load(*words: str, name: str = "sweep"):
        return load_sweep(None, [f"name={name}", f"data.dir={tiny_dataset}", *SMALL, *words])

    def open_(*words: str, name: str = "sweep"):
        sweep = load(*words, name=name)
        (tmp_path / name).mkdir(exist_ok=True)
        datasets = {
            data_key(e.data): dataset
            for e in [sweep.base, *(trial.experiment for trial in sweep.trials)]
        }
        return Study(sweep, SweepFolder(tmp_path / name), Layout(1, 1, False), datasets)

    def run(study, limit: int | None = None, fail=lambda stage: None, stop_asked=lambda: False):
        """Up to `limit` stages; `fail(stage)` may raise in place of one, `stop_asked` end one. The ids of those that ran."""
        progress = study.progress
        report, ran = Report(study, progress), []
        report.save_figure = lambda *_: (
            None
        )  # figures take a second each, and have tests of their own
        progress.on_stage_end = report.stage_ended
        report.begin()
        while (limit is None or len(ran) < limit) and (stage := progress.next()):
            ran.append(stage)
            try:
                fail(progress.tree.by_id[stage])
                for _ in run_stage(progress.folder.stage(stage), Worker(), stop_asked):
                    pass
                progress.ended(stage, died=False)
            except Killed:
                progress.ended(stage, died=True)
            except Exception as error:
                record_failure(progress.folder.stage(stage), Worker(), error)
                progress.ended(stage, died=True)
        study.summary = report.finish(Ending("done"), 1.0)
        return ran

    def alone(study, trial: str) -> dict:
        """The trial by itself: its weights' hash and its curve. Trained once for all tests."""
        experiment = study.trials[trial].experiment
        known = experiment.replace(name="alone").model_dump_json()
        if known not in lone_runs:
            run_dir = tmp_path / f"alone-{trial}"
            run_dir.mkdir()
            train(experiment, RunFolder(run_dir), tiny_dataset)
            lone_runs[known] = outcome(run_dir)
        return lone_runs[known]

    def outcome(folder) -> dict:
        run_dir = Path(folder)
        last = checkpoint.latest_valid(run_dir / "checkpoints")
        digest = checkpoint.weights_sha256(checkpoint.load_tensors(last, "model"))
        parts = [(last / name).read_bytes() for name in ("optimizer.safetensors", "state.json")]
        return {
            "step": last.name,
            "weights": digest,
            "parts": parts,
            "curve": exact(journal.read(RunFolder(run_dir))),
        }

    return SimpleNamespace(
        load=load, open=open_, run=run, alone=alone, outcome=outcome, folder=tmp_path, small=SMALL
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The database of one embedded store for the module: its schema takes seconds to create."""
    return tmp_path_factory.mktemp("storage") / "mlflow" / "mlflow.db"


@pytest.fixture
def impatient(monkeypatch):
    """Trackers that look, and try again, sooner."""
    monkeypatch.setattr("orchestrator.track.sender.POLL_S", 0.1)
    monkeypatch.setattr("orchestrator.track.sender.PAUSES_S", (0.1, 0.5))


@pytest.fixture
def uri(store, impatient, monkeypatch, tmp_path):
    """The store's URI; the test runs in an empty folder, and must leave it so."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield f"sqlite:///{store}"
    assert os.listdir(folder) == []
