"""SIGTERM stops a sweep on a cluster without losing a step, and trials equal their own runs."""

import json
import signal
import sqlite3

from orchestrator.checkpoint import store as checkpoint
from orchestrator.errors import EXIT_DONE
from orchestrator.sweep.report.files import SweepFiles
from orchestrator.sweep.space.expand import load_sweep
from tests.helpers import warm
from tests.helpers.local_job import LocalSweepJob, without_ray
from tests.helpers.small_run import REPO, logged
from tests.helpers.wait import wait_until

STEPS = 300  # enough for SIGTERM to arrive before the last one
# Two stages run at a time, the longest first, and a third waits.
WORDS = [
    "sweep.grid.schedule.max_lr=[1e-2, 5e-3]",
    "sweep.trials.third={schedule.max_lr: 2e-3, train.max_steps: 30}",
    f"train.max_steps={STEPS}",
    "train.micro_batch_size=4",  # two micro-batches a step: one for each worker
    "train.eval_interval=50",
    "train.checkpoint_interval=null",
    "compute.cpus_per_worker=1",
]


def test_sigterm_stops_every_stage_after_its_step_and_the_next_start_continues(
    ray_head, sweeps, tiny_corpus, tiny_dataset, monkeypatch
):
    """The stages start on two workers and end in this process."""
    file = sweeps.folder / "experiment.yaml"
    file.write_text("{}\n")
    words = [f"storage={sweeps.folder}", f"data.corpus={tiny_corpus}", f"data.dir={tiny_dataset}"]
    words += ["name=sweep", *sweeps.small, *WORDS]
    command = [str(REPO / "pipelines" / "sweep.py"), str(file), *words, "compute.num_workers=2"]
    process = warm.Process(command, ray_head.env, sweeps.folder)
    stages = sweeps.folder / "sweep" / "stages"
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

    # The figure takes a second and has its own tests.
    monkeypatch.setattr(SweepFiles, "write_figure", lambda files: None)
    with without_ray():
        again = LocalSweepJob(load_sweep(file, [*words, "compute.num_workers=1"]))
        assert again.run() == EXIT_DONE
    study = sweeps.open(*WORDS)
    summary = json.loads((sweeps.folder / "sweep" / "summary.json").read_text())
    assert summary["steps_run"] == study.tree.steps_in_tree - sum(stopped.values())
    assert len(study.trials) == 3
    for name in study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name
