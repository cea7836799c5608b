#!/usr/bin/env python3
"""Measure what tracking adds to a step, in milliseconds.

    benchmarks/tracking.py [--steps 3000] [--step-ms 5] [--rounds 3]

As in a run, the loop has its own process, and the sender is in the driver. The sender follows the
journal and sends it to a real server (`pipelines/ui.py`) that works, or to one that hangs (it
accepts connections and never answers), or to one that refuses connections. A step is matrix
products for about `--step-ms`. Then a line with fifteen numbers is appended to the journal;
tracking does nothing else in that process. `line` is the time that the loop waits for it, without
the time for which its thread was ready but had no core (Linux counts this), because a busy machine
causes it. `on the clock` includes that time. For comparison, a loop without journal, sender and
server computes 0.05 ms of products in place of a line. The loops take turns.
"""

import contextlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from sweep import markdown, spread

from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.track.tracker import Tracker
from pipelines.common import run_command
from pipelines.options import Options, at_least

REPO = Path(__file__).resolve().parent.parent
METRICS = {f"metric/{n}": 1 / (n + 3) for n in range(15)}
SIZE = 64  # rows of the matrices
LINE_S = 5e-5  # time of the products in place of a line


# ---- the process that trains ----
# Seconds of a line without waiting for a core, seconds of a line, seconds of the step.
Lap = tuple[float, float, float]


def train(run_dir: str, steps: int, step_ms: float, logs: bool, pipe: Connection) -> None:
    """Send a `Lap` for each step through `pipe`; the first 100 steps are not counted."""
    journal = Journal(RunFolder(run_dir))
    matrix = np.eye(SIZE, dtype=np.float32)
    products = products_in(step_ms / 1000, matrix)
    few = products_in(LINE_S, matrix)
    laps: list[Lap] = []
    for step in range(steps + 100):
        start = time.perf_counter()
        for _ in range(products):
            matrix = matrix @ matrix
        waited = waited_s()
        stopped = time.perf_counter()
        if logs:
            journal.append(step, METRICS)
        else:
            for _ in range(few):
                matrix = matrix @ matrix
        end = time.perf_counter()
        laps.append((end - stopped - (waited_s() - waited), end - stopped, end - start))
    pipe.send(laps[100:])


def waited_s() -> float:
    """Return for how long this thread was ready to run but had no core."""
    with open("/proc/thread-self/schedstat", "rb") as file:
        return int(file.read().split()[1]) / 1e9


def products_in(seconds: float, matrix: np.ndarray) -> int:
    """Return the number of matrix products that take about this time."""
    start = time.perf_counter()
    for _ in range(2000):
        matrix = matrix @ matrix
    return max(1, round(2000 * seconds / (time.perf_counter() - start)))


def lone_loop(folder: Path, steps: int, step_ms: float, logs: bool) -> list[Lap]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=train, args=(str(folder), steps, step_ms, logs, there))
    process.start()
    laps = here.recv()
    process.join()
    return laps


# ---- servers ----
@contextlib.contextmanager
def healthy(storage: Path) -> Iterator[str]:
    store = storage / "mlflow" / "mlflow.db"
    port = free_port()
    store.parent.mkdir(parents=True, exist_ok=True)
    store.touch()
    process = subprocess.Popen(
        [sys.executable, str(REPO / "pipelines" / "ui.py"), str(storage), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None:
                raise RuntimeError("the server did not start")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def hanging(storage: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextlib.contextmanager
def refusing(storage: Path) -> Iterator[str]:
    yield f"http://127.0.0.1:{free_port()}"


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as answer:
        return answer.status == 200
    return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


# ---- rounds ----
SERVERS = {"healthy": healthy, "hanging": hanging, "refusing": refusing}


def one_round(name: str, folder: Path, steps: int, step_ms: float) -> list[Lap]:
    """Run the loop with a tracker and the server `name`, which starts before the first step."""
    if name == "none":
        return lone_loop(folder, steps, step_ms, logs=False)
    (folder / "run.json").write_text(
        json.dumps({"name": "race", "key": folder.name, "attempts": [{}]})
    )
    with SERVERS[name](folder) as uri:
        tracker = Tracker(RunFolder(folder), uri, "race")
        tracker.start()
        laps = lone_loop(folder, steps, step_ms, logs=True)
        complete = tracker.finish("FINISHED", 60 if name == "healthy" else 0)
    assert complete == (name == "healthy")
    return laps


def quantile(seconds: list[float], percent: int) -> float:
    """Return a percentile in ms; 100 is the largest value."""
    ordered = sorted(seconds)
    return 1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def main(argv: list[str]) -> int:
    parser = Options(__doc__)
    parser.add_argument("--steps", type=at_least(10), default=3000)
    parser.add_argument("--step-ms", type=at_least(0.1), default=5.0)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    a = parser.parse_args(argv)
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1"))
    names = ["none", *SERVERS]
    laps: dict[str, list[list[Lap]]] = {}
    for number in range(a.rounds):
        for name in names[number % 4 :] + names[: number % 4]:
            with tempfile.TemporaryDirectory() as folder:
                laps.setdefault(name, []).append(one_round(name, Path(folder), a.steps, a.step_ms))
    rows = [
        [
            name,
            *(
                spread([quantile([lap[part] for lap in one], percent) for one in laps[name]], 3)
                for part, percent in ((0, 50), (0, 99), (0, 100), (1, 99), (2, 50), (2, 99))
            ),
        ]
        for name in names
    ]
    print(
        markdown(
            [
                "server",
                "line: p50, ms",
                "p99",
                "largest",
                "p99 on the clock",
                "step: p50, ms",
                "p99",
            ],
            rows,
        )
    )
    return 0


if __name__ == "__main__":
    run_command(main)
