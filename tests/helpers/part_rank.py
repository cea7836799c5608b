"""Ranks that save checkpoints in parts, without training: in forked processes.

As a script, it kills ranks in the middle of their commits: `part_rank.py FOLDER RANKS ROUNDS`.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from orchestrator.checkpoint import store
from orchestrator.checkpoint.format import step_of
from orchestrator.errors import NoRoomError
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.train import checkpointer
from orchestrator.train.checkpointer import Checkpointer
from orchestrator.train.numerics import Worker
from orchestrator.train.ranks import reading
from tests.helpers.facts import FACTS

ENDS_S = 60  # a rank ends by itself when another one is dead: at once, or after `LEAVES_S`


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    """Return tensors of several sizes and dtypes."""
    return {
        "model": {"w": torch.full((50_000,), value), "half": torch.full((3, 5), value).bfloat16()},
        "optimizer": {"w/exp_avg": torch.full((100, 300), value), "w/step": torch.tensor(value)},
    }


def holds(path: Path, value: float) -> bool:
    """Verify a checkpoint, and return whether it has the tensors of `state`."""
    store.verify(path)
    for group, expected in state(value).items():
        loaded = store.load_tensors(path, group)
        if not all(torch.equal(loaded[name], tensor) for name, tensor in expected.items()):
            return False
    return True


def work(job: dict) -> None:
    """Save `job["steps"]` checkpoints as a rank, and end the process.

    A job has "rank", "ranks", "store", "folder", "first" and "steps". It may have "full_at", the
    step at which this rank has a full disk; "read", a step to read first; "loses", if no other rank
    sees its files; "away", if it knows that it does not have the folder of rank 0; and "pipe",
    which gets a byte before each write.
    """
    rank, ranks = job["rank"], job["ranks"]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{job['store']}", rank=rank, world_size=ranks
    )
    folder = RunFolder(job["folder"])
    worker = Worker(rank, ranks, has_folder=not job.get("away"))
    status = 0
    try:
        if "read" in job:
            reading.read_together(folder.checkpoint(job["read"]), worker)
        with Checkpointer(folder, 2, Journal(folder), worker) as saver:
            dist.barrier()
            if "pipe" in job:
                _report_writes(job["pipe"])
            for step in range(job["first"], job["first"] + job["steps"]):
                with contextlib.suppress(NoRoomError):
                    saver.wait()
                if step == job.get("full_at"):
                    _fill_disk()
                if job.get("loses"):
                    _lose_files()
                texts = {"state.json": json.dumps({"step": step})} if rank == 0 else {}
                saver.save(step, state(step), texts, FACTS)
                dist.barrier()
    except Exception as error:
        status = 1
        (folder.path / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
    os._exit(status)  # the shutdown of gloo can deadlock


def _fill_disk() -> None:
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.write = write
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    os.write = full


def _lose_files() -> None:
    write = store.write

    def write_and_lose(temporary: Path, parts: store.Parts) -> dict:
        entries = write(temporary, parts)
        for name in entries:
            (temporary / name).unlink()
        return entries

    store.write = write_and_lose


# ---- kills ----


def kill_one(folder: Path, ranks: int, first: int, draw: random.Random, leader: bool) -> bool:
    """Let ranks save checkpoints until one is killed. Return whether it left a commit half done.

    With `leader`, it is rank 0: another rank's death is an error there, which removes the commit.
    """
    reader, pipe = os.pipe()
    store_file = folder / f"store-{os.urandom(4).hex()}"
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            job = {"rank": rank, "ranks": ranks, "store": store_file, "folder": folder}
            work(job | {"first": first, "steps": 10**6, "pipe": pipe})
        children.append(child)
    os.close(pipe)
    for _ in range(draw.randrange(1, 40 * ranks)):
        os.read(reader, 1)
    os.kill(children[0] if leader else draw.choice(children), signal.SIGKILL)
    deadline = time.monotonic() + ENDS_S
    while children and time.monotonic() < deadline:
        pid, _ = os.waitpid(-1, os.WNOHANG)
        if pid:
            children.remove(pid)
        time.sleep(0.002)
    os.close(reader)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert not children, "a rank waits for a dead one"
    return any((folder / "checkpoints").glob(".step-*"))


def _report_writes(pipe: int) -> None:
    """Write a byte to the pipe before each write, fsync and rename."""
    real = os.write
    for name in ("write", "fsync", "rename"):
        function = getattr(os, name)

        def report(*args, function=function):
            real(pipe, b".")
            return function(*args)

        setattr(os, name, report)


def main(folder: Path, ranks: int, rounds: int) -> None:
    checkpointer.LEAVES_S = 1.0
    draw = random.Random(f"{ranks}")
    newest = torn = 0
    for number in range(rounds):
        torn += kill_one(folder, ranks, newest + 1, draw, leader=number % 2 == 0)
        found = store.latest_valid(folder / "checkpoints", warn=sys.exit)
        step = step_of(found) if found else 0
        assert step >= newest, (step, newest)
        for other in store.steps(folder / "checkpoints"):
            assert holds(store.path_of(folder / "checkpoints", other), other)
        newest = step
    print(json.dumps({"newest": newest, "torn": torn}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
