"""SIGTERM stops a sweep on a cluster without losing a step, and trials equal their own runs."""

import json
import signal
import sqlite3
import subprocess
import sys

import pytest

from orchestrator.checkpoint import store as checkpoint
from tests.helpers.small_run import REPO, logged
from tests.helpers.wait import wait_until

STEPS = 300  # enough for SIGTERM to arrive before the last one
# Two stages run at a time, the longest first, and a third waits.
WORDS = [
    "sweep.grid.schedule.max_lr=[1e-2, 5e-3]",
    "sweep.trials.third={schedule.max_lr: 2e-3, train.max_steps: 30}",
    f"train.max_steps={STEPS}",
    "train.eval_interval=50",
    "train.checkpoint_interval=null",
    "compute.cpus_per_worker=1",
]


@pytest.fixture
def begin(ray_head, sweeps, tiny_corpus, tiny_dataset):
    """Return a function that starts `pipelines/sweep.py` with overrides, as a process."""

    def begin_(*words: str) -> subprocess.Popen:
        file = sweeps.folder / "experiment.yaml"
        file.write_text("{}\n")
        command = [
            sys.executable,
            str(REPO / "pipelines" / "sweep.py"),
            str(file),
            "name=sweep",
            f"storage={sweeps.folder}",
            f"data.corpus={tiny_corpus}",
            f"data.dir={tiny_dataset}",
            *sweeps.small,
            *WORDS,
            *words,
        ]
        return subprocess.Popen(
            command, env=ray_head.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return begin_


def test_sigterm_stops_every_stage_after_its_step_and_the_next_start_continues(sweeps, begin):
    """The stages start on two workers and end on one."""
    stages, process = sweeps.folder / "sweep" / "stages", begin("compute.num_workers=2")
    wait_until(lambda: sum(logged(folder) >= 6 for folder in stages.glob("*")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    begun = [file.parent for file in stages.glob("*/.writer")]
    stopped = {
        folder.name: json.loads((folder / "stopped.json").read_text())["step"] for folder in begun
    }
    assert len(begun) == len(list(stages.glob("*"))) == 2, "a stage started after SIGTERM"
    for folder in begun:
        assert not (folder / "result.json").exists()
        assert checkpoint.steps(folder / "checkpoints") == [stopped[folder.name]]
        assert logged(folder) <= stopped[folder.name] < STEPS
    summary = json.loads((sweeps.folder / "sweep" / "summary.json").read_text())
    assert (summary["status"], summary["steps_run"]) == ("KILLED", sum(stopped.values()))
    with sqlite3.connect(sweeps.folder / "mlflow" / "mlflow.db") as db:
        assert db.execute("select status from runs where name = 'sweep'").fetchall() == [
            ("KILLED",)
        ]

    again, planned = begin("compute.num_workers=1"), sweeps.open(*WORDS, name="planned")
    alone = {name: sweeps.alone(planned, name) for name in planned.trials}  # meanwhile
    out, err = again.communicate(timeout=240)
    assert again.returncode == 0, out + err
    study = sweeps.open(*WORDS)
    summary = json.loads((sweeps.folder / "sweep" / "summary.json").read_text())
    assert summary["steps_run"] == study.tree.steps_in_tree - sum(stopped.values())
    assert len(study.trials) == 3
    for name in study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == alone[name], name
