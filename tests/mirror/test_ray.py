"""A real run and a real sweep on Ray in a bucket, whose machine is lost."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder, SweepFolder
from tests.faults.outcome import outcome
from tests.helpers.fixtures import SMALL
from tests.helpers.wait import wait_until

REPO = Path(__file__).resolve().parents[2]


RUN = ["train.max_steps=3000", "train.checkpoint_interval=200", "train.eval_interval=500"]
RUN += ["compute.num_workers=2"]
# Tune stops some of these trials.
SWEEP = ["train.max_steps=900", "train.checkpoint_interval=100", "train.eval_interval=100"]
SWEEP += [
    "schedule.kind=constant",
    "sweep.sampler=random",
    "sweep.num_samples=4",
    "sweep.stop=asha",
]
SWEEP += ["sweep.space.schedule.max_lr={low: 1e-5, high: 1e-2, log: true}"]


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "fields"), [("train", RUN), ("sweep", SWEEP)])
def test_command_on_ray_continues_on_an_empty_machine(
    bucket, tmp_path, tiny_corpus, ray_head, verb, fields
):
    def start(storage: str, cache: str) -> subprocess.Popen:
        words = [*SMALL, "name=run", *fields, f"data.corpus={tiny_corpus}"]
        words += ["compute.cpus_per_worker=1", f"storage={storage}"]
        environment = {**ray_head.env, **bucket.env, "XDG_CACHE_HOME": str(tmp_path / cache)}
        return subprocess.Popen(
            [sys.executable, REPO / "pipelines" / f"{verb}.py", os.devnull, *words],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def manifest() -> bytes:
        place = "m/run/mirror.json"
        return bucket.get(place) if place in bucket.names("m/run/mirror") else b""

    alone = start(str(tmp_path / "alone"), "alone-cache")
    output, _ = alone.communicate(timeout=300)
    assert alone.returncode == 0, output
    process = start(f"{bucket.address}/m", "first")
    wait_until(lambda: b"checkpoints/step-" in manifest(), process, limit_s=200)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(tmp_path / "first", ignore_errors=True)
    process = start(f"{bucket.address}/m", "second")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "restoring" in output
    folder = SweepFolder(
        RunFolder(tmp_path / "second/espalier/scratch/s3" / bucket.name / "m" / "run")
    )
    if verb == "train":
        assert "resuming run from step" in output
        assert outcome(folder.path) == outcome(tmp_path / "alone" / "run")
        assert len(journal.read(folder)) > 0
        return
    states = [(trial.read_summary() or {}).get("state") for trial in folder.trials()]
    assert len(states) == 4 and set(states) <= {"done", "stopped"} and "done" in states
    for trial in folder.trials():  # which ones asha stops is a matter of time
        other = tmp_path / "alone" / "run" / "trials" / trial.name
        both = [(RunFolder(path).read_summary() or {}).get("state") for path in (trial.path, other)]
        if both == ["done", "done"]:
            assert outcome(trial.path) == outcome(other)
