"""Train on disks that fill up: `full_disk.py FOLDER DATA_DIR JSON_OVERRIDES` prints JSON.

Run it under `unshare --mount`. Each disk is a tmpfs of a few MB that only this process sees. It
becomes full at step 6. With "bytes", the next checkpoint is not started, because the space does not
suffice. With "files", creating a file fails in the middle of a checkpoint. With "all", nothing can
be written. "for a while": there is space again at step 14. "for ever": there is space only after
the run has ended.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs import events, identity, journal, stop, summary
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker
from orchestrator.workers import attempts
from tests.helpers.curves import exact_part

FOLDER = Path(sys.argv[1])
DATA_DIR = Path(sys.argv[2])
EXPERIMENT = load_experiment(None, json.loads(sys.argv[3]))
LEFT_BYTES = 500_000
LEFT_FILES = 4


def fill_bytes(disk: Path, left: int = LEFT_BYTES) -> None:
    space = os.statvfs(disk)
    with open(disk / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - left)


def fill_files(disk: Path, left: int = LEFT_FILES) -> None:
    for number in range(os.statvfs(disk).f_favail - left):
        (disk / f"filler-{number}").touch()


def fill_all(disk: Path) -> None:
    fill_bytes(disk, 0)
    fill_files(disk, 0)


def free(disk: Path) -> None:
    for filler in disk.glob("filler*"):
        filler.unlink()


FILLS: dict[str, Callable[[Path], None]] = {
    "bytes": fill_bytes,
    "files": fill_files,
    "all": fill_all,
}


def outcome(folder: RunFolder) -> dict[str, Any]:
    found = store.latest_valid(folder.checkpoints)
    assert found is not None
    return {
        "step": found.name,
        "weights": store.weights_sha256(store.load_tensors(found, "model")),
        "curve": [exact_part(line) for line in journal.read(folder)],
    }


def reason_of_next_attempt(folder: RunFolder) -> str:
    """Start the workers again on the full disk, and return the reason that the driver shows."""
    try:
        attempts.start_workers_attempt(folder, "launch", 1)
    except OSError as error:
        attempts.record_failure(folder, Worker(), error)
    summary.summarize(folder, Ending("failed"), EXPERIMENT.tokens, None, 0.0)
    ending = folder.read_ending()
    assert ending is not None and ending.reason is not None
    return ending.reason


def train_on_small_disk(kind: str, is_freed: bool) -> dict[str, Any]:
    """Train on a disk that becomes full, and again with space if that ended the run."""
    disk = FOLDER / f"{kind}-{is_freed}"
    disk.mkdir()
    options = "size=12m,nr_inodes=200"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], check=True)
    folder = RunFolder(disk / "run")
    folder.path.mkdir()
    identity.begin_attempt(folder, EXPERIMENT, {}, {})
    trainer = Trainer(EXPERIMENT, folder, DATA_DIR, Worker(cpus=1))
    result: dict[str, Any] = {"error": None, "torn": []}
    try:
        for line in trainer.run():
            if line["step"] not in (6, 14):
                continue
            with contextlib.suppress(UserError):  # the test must not race with the checkpointer
                trainer.checkpointer.wait()
            if line["step"] == 6:
                FILLS[kind](disk)
                continue
            present = [path.name for path in folder.checkpoints.iterdir()]
            result["torn"] = [name for name in present if name != "step-00000004"]
            if is_freed:
                free(disk)
    except UserError as error:
        result["error"] = str(error)
    samples = [int(path.stem.removeprefix("step-")) for path in folder.samples.iterdir()]
    result |= {
        "steps": folder.checkpoint_steps(),
        "updates": trainer.state.step,
        "samples": sorted(samples),
        "events": [(event["kind"], event["step"]) for event in events.read(folder)],
    }
    if result["error"] is not None:
        if kind == "all":
            result["stopped"] = reason_of_next_attempt(folder)
            stop.request(folder, "SIGTERM")
            result["asked"] = stop.requested(folder)
        free(disk)
        identity.begin_attempt(folder, EXPERIMENT, {}, {})
        train(EXPERIMENT, folder, DATA_DIR, Worker(cpus=1))
    return result | outcome(folder)


def main() -> None:
    golden = RunFolder(FOLDER / "golden")
    golden.path.mkdir()
    train(EXPERIMENT, golden, DATA_DIR, Worker(cpus=1))
    results = {"golden": outcome(golden)}
    for kind in FILLS:
        results[f"{kind} for a while"] = train_on_small_disk(kind, is_freed=True)
        results[f"{kind} for ever"] = train_on_small_disk(kind, is_freed=False)
    print("\n" + json.dumps(results))


main()
