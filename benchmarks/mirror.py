#!/usr/bin/env python3
"""Measure what a mirror adds to a step, for a store that is slow, away or fast.

    benchmarks/mirror.py [--rounds 70] [--threads 1] [--width 64] [--interval 10] [--nice 0]

One run trains in this process, with `--threads` of torch. As in the product, the thread of the
mirror is in another process, the driver. The store is moto's server and a proxy, in a third process
at the lowest priority. The proxy reads the parts of checkpoints and forgets them.

slow: the store takes each request after 2 s. away: it closes connections. fast: it answers at once.
The mirror looks for something new each second instead of each ten.

On a busy machine, `setsid benchmarks/mirror.py --nice -19` (as root) sets the three processes above
all others (Linux, autogroup). Among themselves they keep their priorities. Under `taskset -c 1`,
training and driver share one core; the store may use all.

A block is `--interval` steps and one checkpoint. Blocks in which the driver works (S) and in which
it is held with SIGSTOP (N) alternate as SNNS NSSN, so that slow changes of the machine cancel. What
became due in N is done in S: per step, the driver works up to twice as much as in a run. Of each
four blocks, the table compares S with N: median, and its 95 % interval by bootstrap.

`clock`: time of the steps, ratio. `CPU`: what the training thread computes, ratio; time in which it
waits for a core is not in it. `waits`: that time, difference in percent of the clock. `driver`: CPU
of the driver, in percent of one core, mean. `read`: what it reads of checkpoints. `bound`: upper
end of `CPU` - 1, plus `driver`: the most that the mirror costs, if the training waits whenever the
driver computes. `switches`: how often another thread took the core from the training, per step.
"""

import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
from sweep import markdown

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from orchestrator.config.experiment import load_experiment  # noqa: E402
from orchestrator.data.prepare import prepare_in  # noqa: E402
from orchestrator.mirror import upload  # noqa: E402
from orchestrator.mirror.session import mirrored  # noqa: E402
from orchestrator.objects.address import parse  # noqa: E402
from orchestrator.runs.folder import RunFolder  # noqa: E402
from orchestrator.train.loop import Trainer  # noqa: E402
from orchestrator.train.numerics import Worker  # noqa: E402
from pipelines.common import run_command  # noqa: E402
from pipelines.options import Options, at_least  # noqa: E402
from tests.helpers.bucket import Proxy, environment  # noqa: E402 - not installed

STATES = ("fast", "slow", "away")
SLOW_S = 2.0
PARTS = ".safetensors%40"  # in the path of a part of a checkpoint
FIELDS = ("clock", "cpu", "waits", "switches", "driver", "read")


# ---- the other processes ----
def serve(state: "Synchronized[int]", pipe: Connection) -> None:
    """Be the store; send its URL."""
    import boto3
    from moto.server import ThreadedMotoServer

    os.nice(19)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(environment(f"http://{host}:{port}"))
    boto3.client("s3").create_bucket(Bucket="bucket")
    proxy = Proxy(port)

    def decide(_: int, verb: str, path: str) -> str:
        name = STATES[state.value]
        if name == "slow":
            time.sleep(SLOW_S)
        if name == "away":
            return "reset"
        return "200" if verb == "PUT" and PARTS in path else ""

    proxy.decide = decide
    pipe.send(proxy.url)
    signal.pause()


def drive(folder: str, url: str, pipe: Connection) -> None:
    """Be the driver: mirror the run."""
    os.environ.update(environment(url))
    upload.POLL_S = 1.0
    run = RunFolder(folder)
    with mirrored(run, parse("mirror", "s3://bucket/m"), run.path.parent):
        pipe.send(None)
        signal.pause()


@contextlib.contextmanager
def process(target: Callable[..., None], *args: Any) -> Iterator[tuple[int, Any]]:
    """Start a process; yield its id and what it sends when it is ready."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    started = context.Process(target=target, args=(*args, there), daemon=True)
    started.start()
    there.close()
    try:
        assert started.pid
        yield started.pid, here.recv()
    finally:
        started.kill()  # also if it is held


# ---- the process that trains ----
def schedstat(task: Path) -> tuple[float, float]:
    """Return for how many seconds a thread has computed, and has waited for a core."""
    computed, waited, _ = (task / "schedstat").read_text().split()
    return int(computed) / 1e9, int(waited) / 1e9


def counters(driver: int) -> np.ndarray:
    """Return the present values of `FIELDS`."""
    cpu, waits = schedstat(Path("/proc/thread-self"))
    switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
    tasks = Path(f"/proc/{driver}/task").iterdir()
    used = sum(schedstat(task)[0] for task in tasks)
    read = int(Path(f"/proc/{driver}/io").read_text().split()[1])
    return np.array([time.perf_counter(), cpu, waits, switches, used, read])


def measure(a: Any, base: Path) -> dict[str, np.ndarray]:
    """Train. Return `FIELDS` by state, round, (N, S)."""
    experiment = load_experiment(None, words_of(a.width, a.interval, a.threads))
    dataset = prepare_in(experiment.data, base)
    folder = RunFolder(base / "run")
    folder.path.mkdir()
    folder.run_file.write_text('{"key": "benchmark"}')
    trainer = Trainer(experiment, folder, dataset.directory, Worker(cpus=a.threads))
    state = multiprocessing.get_context("spawn").Value("i", 0)
    found: dict[str, np.ndarray] = {}
    with process(serve, state) as (_, url), process(drive, str(folder.path), url) as (driver, _):
        lines = trainer.run()

        def block(works: int) -> np.ndarray:
            os.kill(driver, signal.SIGCONT if works else signal.SIGSTOP)
            before = counters(driver)
            for _ in range(a.interval):
                next(lines)
            return counters(driver) - before

        for state.value, name in enumerate(STATES):
            for _ in range(3):  # the driver finds out how the store is now
                block(1)
            found[name] = np.zeros((a.rounds, 2, len(FIELDS)))
            for number, turn in enumerate(found[name]):
                for works in (0, 1, 1, 0) if number % 2 else (1, 0, 0, 1):
                    turn[works] += block(works)
        lines.close()
    return found


# ---- the table ----
def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the median and its 95 % interval by bootstrap."""
    draws = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)


def row(name: str, found: np.ndarray, steps: int) -> list[str]:
    """Return a row of the table from rounds × (N, S) × `FIELDS`."""
    clock, cpu, waits, switches, driver, read = np.moveaxis(found, 2, 0)
    texts = []
    for values in (clock[:, 1] / clock[:, 0], cpu[:, 1] / cpu[:, 0]):
        middle, low, high = interval(values)
        texts.append(f"{middle:.4f} ({low:.4f} – {high:.4f})")
    added = interval(100 * (waits[:, 1] - waits[:, 0]) / clock[:, 0])
    used = 100 * driver[:, 1].sum() / clock[:, 1].sum()
    bound = 100 * (high - 1) + used
    return [
        name,
        f"{1000 * np.median(clock[:, 0]) / steps:.1f}",
        *texts,
        "{:.2f} ({:.2f} – {:.2f})".format(*added),
        f"{used:.2f} %",
        f"{read[:, 1].sum() / clock[:, 1].sum() / 1e6:.1f} MB/s",
        f"{bound:.2f} %",
        " / ".join(f"{count:.2f}" for count in switches.mean(axis=0) / steps),
    ]


def words_of(width: int, interval: int, threads: int) -> list[str]:
    """Return the overrides of the run, which does not end by itself."""
    return [
        "name=run",
        f"data.corpus={REPO / 'docs' / '*.md'}",
        "data.tokenizer=char",
        "model.n_layer=4",
        "model.n_head=4",
        f"model.n_embd={width}",
        "model.block_size=128",
        "train.dtype=float32",
        "train.micro_batch_size=4",
        "train.global_batch_size=4",
        "train.max_steps=1000000",
        "train.log_interval=1",
        "train.eval_interval=null",
        f"train.checkpoint_interval={interval}",
        f"compute.cpus_per_worker={threads}",
    ]


def main(argv: list[str]) -> int:
    parser = Options(__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=70)
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--width", type=at_least(16), default=64)
    parser.add_argument("--interval", type=at_least(1), default=10)
    parser.add_argument("--nice", type=int, default=0)
    a = parser.parse_args(argv)
    if a.nice:
        Path("/proc/self/autogroup").write_text(str(a.nice))
    with tempfile.TemporaryDirectory() as base:
        found = measure(a, Path(base))
    print(f"load of the machine: {os.getloadavg()[1]:.1f} on {os.cpu_count()} CPUs")
    heads = ["store", "step, ms", "clock", "CPU", "waits, %", "driver", "read", "bound"]
    rows = [row(name, values, 2 * a.interval) for name, values in found.items()]
    print(markdown([*heads, "switches, N / S"], rows))
    return 0


if __name__ == "__main__":
    run_command(main)
