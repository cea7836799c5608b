"""A worker that the system ended for its memory: told apart from other deaths, and answered with what would fit.

The kernel and Ray's memory monitor take memory back by SIGKILL, so the dead say nothing. Eats where the workers of the last
attempt were last seen; yields who ended one, and a micro-batch that was tried in a process of its own (`python -m
orchestrator.workers.oom_kill`), from small to large and never past what is left.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from orchestrator.cluster.layout import WORKER_ENVIRONMENT, Layout, oom_causes
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.cost import measure as calibrate
from orchestrator.cost.measure import be_expendable
from orchestrator.data.dataset import load_manifest
from orchestrator.files import read_json
from orchestrator.runs import events
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.train import state
from orchestrator.train.numerics import Worker, prepare_process
from orchestrator.workers import memory, system_memory, watchdog

GIB = 2**30
RESERVED = 0.05  # of the memory, which must stay free where nobody told Ray's monitor otherwise
MARGIN = 0.9  # of what is left: other processes breathe
TRY_S = 120.0
FITS = b"fits: "
THRESHOLD = re.compile(
    r"exceeded threshold of (\d+)B \(\S+ of (\d+)B limit\)"
)  # in the words of Ray's monitor


@dataclass(frozen=True)
class OomKill:
    """A worker that was ended: by whom, on which host, how many workers were there, and the bytes that must stay free."""

    by: str
    host: str
    workers: int
    reserved: int


# ---- who ended it ----
def find(run_dir: Path) -> OomKill | None:
    """The kill that ended the last attempt; None: it ended in another way.

    Called where no worker runs, and before `watchdog.report`, which clears the marks. What the kernel did on another
    machine than this one is not seen.
    """
    marks, causes = watchdog.marks(run_dir), oom_causes()
    kills = (
        0 if watchdog.has_hung(run_dir) else system_memory.oom_kills()
    )  # who hung was ended for that
    for mark in marks:
        workers = sum(m["host"] == mark["host"] for m in marks)
        if (said := causes.get((mark["node"], mark["pid"]))) is not None:
            return OomKill(
                "Ray's memory monitor ended a worker", mark["host"], workers, _reserved(said)
            )
        vanished = mark["host"] == socket.gethostname() and mark["phase"] not in (
            watchdog.DONE,
            watchdog.FAILED,
        )
        if vanished and kills > mark["oom_kills"]:
            return OomKill("the kernel ended a worker", mark["host"], workers, _reserved())
    return None


def in_error(error: BaseException, workers: int) -> OomKill | None:
    """The kill of the process that leads the workers, which Ray's monitor may choose as well; it runs beside the driver."""
    said = str(error)
    return (
        OomKill(
            "Ray's memory monitor ended what leads the workers",
            socket.gethostname(),
            workers,
            _reserved(said),
        )
        if "running low on memory" in said
        else None
    )


def _reserved(said: str = "") -> int:
    """Bytes that must stay free, or Ray's monitor kills: in its own words, or as it does by default."""
    numbers = THRESHOLD.search(said)
    return (
        int(numbers[2]) - int(numbers[1])
        if numbers
        else int(RESERVED * system_memory.total_bytes())
    )


# ---- what becomes of the run ----
def stop(run_dir: Path, kill: OomKill) -> None:
    """The same again would meet the same end: leave word that the run is not to be tried again."""
    ending = Ending("user", kill.by, {"oom_kill": asdict(kill)}, "out_of_memory")
    RunFolder(run_dir).write_ending(ending)


def conclude(run_dir: Path, experiment: Experiment, data_dir: Path, layout: Layout) -> str | None:
    """The reason to show, with what would fit: what `stop` left is completed by it. None: no such kill ended the run."""
    stored = (read_json(run_dir / "stopped.json") or {}).get("oom_kill")
    if not stored:
        return None
    kill = OomKill(**stored)
    print(f"{kill.by} for want of memory; looking for a micro-batch that fits …", flush=True)
    reason = advice(kill, experiment, load_manifest(data_dir).tokenizer["n_vocab"], layout)
    events.note(RunFolder(run_dir), "out_of_memory", reason)
    with contextlib.suppress(
        OSError
    ):  # no room: the one that stands says that it is not to be tried again
        RunFolder(run_dir).write_ending(Ending("user", reason, cause="out_of_memory"))
    return reason


def advice(kill: OomKill, experiment: Experiment, n_vocab: int, layout: Layout) -> str:
    """What to do about it, in one line; takes as long as trying does."""
    what = f"out of memory on {kill.host} with {memory.named(experiment)}: {kill.by}"
    if layout.use_gpu:
        return f"{what}. It was the machine's memory, not the GPU's: give it more, or to fewer processes"
    if kill.host != socket.gethostname():
        return f"{what}. Use a smaller train.micro_batch_size, a smaller model or more memory"
    limit = int(MARGIN * (system_memory.available_bytes() - kill.reserved) / kill.workers)
    fits, needs = largest_fitting(
        experiment, n_vocab, Worker(0, layout.num_workers, "cpu", layout.cpus_per_worker), limit
    )
    room = f"in the {max(0, limit) / GIB:.2f} GiB that a worker has there now"
    if fits == experiment.train.micro_batch_size:
        return (
            f"{what}. It needs {needs / GIB:.2f} GiB and would fit {room}: something else took the memory; free it and run "
            f"the same command again"
        )
    return f"{what}. {memory.remedy(fits, room)}"


def largest_fitting(
    experiment: Experiment, n_vocab: int, worker: Worker, limit: int
) -> tuple[int | None, int]:
    """(the largest micro-batch whose step holds at most `limit` bytes, the bytes that it held); (None, 0): none does."""
    job = {
        "experiment": experiment.model_dump(),
        "n_vocab": n_vocab,
        "cpus": worker.cpus,
        "world_size": worker.world_size,
        "limit": limit,
    }
    try:
        out = subprocess.run(
            [sys.executable, "-m", "orchestrator.workers.oom_kill"],
            input=json.dumps(job).encode(),
            stdout=subprocess.PIPE,
            timeout=TRY_S,
            cwd=calibrate.SOURCES,
            env={**os.environ, **WORKER_ENVIRONMENT},
        ).stdout
    except subprocess.TimeoutExpired as slow:
        out = slow.stdout or b""
    tried = [
        json.loads(line.removeprefix(FITS))
        for line in out.split(b"\n")[:-1]
        if line.startswith(FITS)
    ]
    return tuple(tried[-1]) if tried else (None, 0)


def main() -> None:
    """A job on stdin; a line `fits: [sequences, bytes]` on stdout for each micro-batch that does, from the smallest."""
    be_expendable()
    job = json.loads(sys.stdin.read())
    experiment, worker = (
        parse_experiment(job["experiment"], "job"),
        Worker(cpus=job["cpus"], world_size=job["world_size"]),
    )
    for size, held in _try_in_turn(experiment, job["n_vocab"], worker, job["limit"]):
        print(f"{FITS.decode()}{json.dumps([size, held])}", flush=True)


def _try_in_turn(
    experiment: Experiment, n_vocab: int, worker: Worker, limit: int
) -> Iterator[tuple[int, int]]:
    """(micro-batch, bytes held at the peak) while they fit. What grows from one to the next grows with the sequences."""
    one = calibrate.one_micro_batch(experiment)
    prepare_process(one, worker)
    s = state.build(one, one.new_model(n_vocab), Worker(cpus=worker.cpus))
    candidates = [*reversed(memory.smaller(experiment, worker.world_size)), experiment]
    held = memory.rest_of_a_step(max(candidates, key=lambda e: e.slots), worker, s)
    held.append(
        torch.ones(3 * s.gradients.n_params)
    )  # the copy of which a checkpoint is written beside training
    base = peak = _peak(worker)
    last = 0
    for candidate in candidates:
        size = candidate.train.micro_batch_size
        if last and base + (peak - base) * size / last > limit:
            return
        memory.hold_a_micro_batch(candidate, worker, s)
        peak, last = _peak(worker), size
        if peak > limit:
            return
        yield size, peak


def _peak(worker: Worker) -> int:
    return int(calibrate.peak_gib(worker.device) * GIB)


if __name__ == "__main__":
    main()
