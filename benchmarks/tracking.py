#!/usr/bin/env python3
"""What tracking adds to a step: a training process that logs every step beside one that logs nothing, in milliseconds.

    benchmarks/tracking.py [--steps 3000] [--step-ms 5] [--rounds 3]

As in a run, the loop is in a process of its own and the sender in its driver, which follows the journal to a real server
(`pipelines/ui.py`) that is healthy, hangs (connections are accepted and never answered) or refuses them. A step is
matrix products for about `--step-ms`; then its line is appended, with fifteen numbers: the only thing that tracking does in
that process. `line` is how long the loop stands still for it, without the time for which the thread was ready and had no
core (Linux counts it): whose fault that is, a busy machine does not tell. `on the clock` has it in. Beside them stands
the loop without journal, sender and server, which in place of a line has 0.05 ms of products. Rounds take turns.
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
from pathlib import Path

import numpy as np
from sweep import markdown, spread

from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.track.mlflow import Tracker
from pipelines.common import Options, at_least, run_command

REPO = Path(__file__).resolve().parent.parent
METRICS = {f"metric/{n}": 1 / (n + 3) for n in range(15)}
SIZE = 64  # of the matrices
LINE_S = 5e-5


# ---- the process that trains ----
def train(run_dir: str, steps: int, step_ms: float, logs: bool, pipe) -> None:
    """Send [(seconds of the line without those that it waited for a core, seconds of the line, seconds of the step)]."""
    journal, matrix, laps = Journal(RunFolder(run_dir)), np.eye(SIZE, dtype=np.float32), []
    products, few = products_in(step_ms / 1000, matrix), products_in(LINE_S, matrix)
    for step in range(steps + 100):
        start = time.perf_counter()
        for _ in range(products):
            matrix = matrix @ matrix
        waited, stopped = waited_s(), time.perf_counter()
        if logs:
            journal.append(step, METRICS)
        else:
            for _ in range(few):
                matrix = matrix @ matrix
        end = time.perf_counter()
        laps.append((end - stopped - (waited_s() - waited), end - stopped, end - start))
    pipe.send(laps[100:])


def waited_s() -> float:
    """For how long this thread was ready to run, and was not running."""
    with open("/proc/thread-self/schedstat", "rb") as file:
        return int(file.read().split()[1]) / 1e9


def products_in(seconds: float, matrix: np.ndarray) -> int:
    start = time.perf_counter()
    for _ in range(2000):
        matrix = matrix @ matrix
    return max(1, round(2000 * seconds / (time.perf_counter() - start)))


def lone_loop(
    folder: Path, steps: int, step_ms: float, logs: bool
) -> list[tuple[float, float, float]]:
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
    store, port = storage / "mlflow" / "mlflow.db", free_port()
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


# ---- the race ----
def one_round(
    name: str, folder: Path, steps: int, step_ms: float
) -> list[tuple[float, float, float]]:
    """A run of `steps` steps with its tracker; the server has been at work since before the first."""
    if name == "none":
        return lone_loop(folder, steps, step_ms, logs=False)
    (folder / "run.json").write_text(
        json.dumps({"name": "race", "key": folder.name, "attempts": [{}]})
    )
    with {"healthy": healthy, "hanging": hanging, "refusing": refusing}[name](folder) as uri:
        tracker = Tracker(RunFolder(folder), uri, "race")
        tracker.start()
        laps = lone_loop(folder, steps, step_ms, logs=True)
        complete = tracker.finish("FINISHED", 60 if name == "healthy" else 0)
    assert complete == (name == "healthy")
    return laps


def quantile(seconds: list[float], percent: int) -> float:
    """In ms; 100 is the largest."""
    ordered = sorted(seconds)
    return 1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def main(argv: list[str]) -> int:
    parser = Options(__doc__)
    parser.add_argument("--steps", type=at_least(10), default=3000)
    parser.add_argument("--step-ms", type=at_least(0.1), default=5.0)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    a = parser.parse_args(argv)
    os.environ.update(dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1"))
    names, laps = ["none", "healthy", "hanging", "refusing"], {}
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
