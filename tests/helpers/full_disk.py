"""Training on a disk that fills up: `full_disk.py FOLDER DATA_DIR JSON_OVERRIDES` -> JSON; run it as `unshare --mount`.

Each disk is a tmpfs of a few MB that this process alone sees. It is filled at step 6 and, where `frees`, has room again at 14:
of bytes, so that the next checkpoint is not begun, or of files, so that the system refuses one half-way, or of both, so that
nothing at all can be written.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.files import read_json
from orchestrator.runs import events, identity, journal, metrics, stop, summary
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker
from orchestrator.workers import ray_train

FOLDER, DATA_DIR, OVERRIDES = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
LEFT_BYTES, LEFT_FILES = 500_000, 4
EXPERIMENT = load_experiment(None, OVERRIDES)


def fill_bytes(disk: Path, left: int = LEFT_BYTES) -> None:
    room = os.statvfs(disk)
    with open(disk / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - left)


def fill_files(disk: Path, left: int = LEFT_FILES) -> None:
    for number in range(os.statvfs(disk).f_favail - left):
        (disk / f"filler-{number}").touch()


def fill_all(disk: Path) -> None:
    fill_bytes(disk, 0)
    fill_files(disk, 0)


def free(disk: Path) -> None:
    for filler in disk.glob("filler*"):
        filler.unlink()


def outcome(run_dir: Path) -> dict:
    found = checkpoint.latest_valid(run_dir / "checkpoints")
    curve = [metrics.exact_part(r) for r in journal.read(RunFolder(run_dir))]
    return {
        "step": found.name,
        "weights": checkpoint.weights_sha256(checkpoint.load_tensors(found, "model")),
        "curve": curve,
    }


def end(run_dir: Path) -> str:
    """The next attempt of the workers and the driver's last word, on a disk that is full: the reason that the driver shows."""
    try:
        ray_train.begin_attempt(RunFolder(run_dir), "launch", 1)
    except OSError as error:
        ray_train.record_failure(RunFolder(run_dir), Worker(), error)
    summary.summarize(RunFolder(run_dir), Ending("failed"), EXPERIMENT.tokens_per_step, None, 0.0)
    return read_json(run_dir / "stopped.json")["reason"]


def run(name: str, fill, frees: bool) -> dict:
    """What became of a run whose disk was full for a while, or for ever; in the latter case also of the next start, with room."""
    disk = FOLDER / name
    disk.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m,nr_inodes=200", "none", str(disk)], check=True
    )
    run_dir, torn, error = disk / "run", [], None
    run_dir.mkdir()
    identity.begin_attempt(RunFolder(run_dir), EXPERIMENT, {}, {})
    training = Trainer(EXPERIMENT, RunFolder(run_dir), DATA_DIR, Worker(cpus=1))
    try:
        for line in training.run():
            if line["step"] in (6, 14):
                with contextlib.suppress(
                    UserError
                ):  # what is committed, is; the test must not race with it
                    training.checkpointer.wait()
            if line["step"] == 6:
                fill(disk)
            if line["step"] == 14:
                torn = [
                    p.name for p in (run_dir / "checkpoints").iterdir() if p.name != "step-00000004"
                ]
                if frees:
                    free(disk)
    except UserError as raised:
        error = str(raised)
    said = {
        "error": error,
        "torn": torn,
        "steps": checkpoint.steps(run_dir / "checkpoints"),
        "updates": training.state.step,
        "samples": sorted(
            int(p.stem.removeprefix("step-")) for p in (run_dir / "samples").iterdir()
        ),
        "events": [(e["kind"], e["step"]) for e in events.read(RunFolder(run_dir))],
    }
    if error:
        if fill == fill_all:
            said["stopped"] = end(run_dir)
            stop.request(RunFolder(run_dir), "SIGTERM")
            said["asked"] = stop.requested(RunFolder(run_dir))
        free(disk)
        identity.begin_attempt(RunFolder(run_dir), EXPERIMENT, {}, {})
        train(EXPERIMENT, RunFolder(run_dir), DATA_DIR, Worker(cpus=1))
    return said | outcome(run_dir)


(FOLDER / "golden").mkdir()
train(EXPERIMENT, RunFolder(FOLDER / "golden"), DATA_DIR, Worker(cpus=1))
results = {"golden": outcome(FOLDER / "golden")}
for kind, fill in (("bytes", fill_bytes), ("files", fill_files), ("all", fill_all)):
    for frees in (True, False):
        results[f"{kind} {'for a while' if frees else 'for ever'}"] = run(
            f"{kind}-{frees}", fill, frees
        )
print("\n" + json.dumps(results))
