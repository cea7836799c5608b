#!/usr/bin/env python3
"""Measure what a mirror adds to a step, for a store that is fast, slow or away.

    benchmarks/mirror.py [--rounds 12] [--seconds 7] [--width 256] [--checkpoint-interval 20]

One run trains in a process of its own, and the thread of the mirror is in this process, as in a
driver. The store is moto's server behind a proxy, all on this machine. While the run goes on, the
proxy changes every `--seconds`:

none: the thread does nothing. fast: requests are passed on. slow: each after 2 s. away: connections
are closed. The thread looks for something new each second instead of each ten.

`step` is the time between the journal lines of two steps, pauses for checkpoints included, as a
mean over the time of a state; `ratio` compares it with that of `none` in the same round. On a busy
machine, this is how long the steps wait for a core. `CPU of a step` is what the training process
computes, and its ratio to `none`. `CPU of the thread` is what the mirror takes of one core, at its
low priority: without a free core, a step gets so much less. `uploads` are the checkpoints that
arrived.
"""

import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from sweep import markdown, spread

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from orchestrator.config.experiment import Experiment, load_experiment  # noqa: E402
from orchestrator.data.prepare import prepare_in  # noqa: E402
from orchestrator.mirror import upload  # noqa: E402
from orchestrator.mirror.session import mirrored  # noqa: E402
from orchestrator.mirror.upload import Uploader  # noqa: E402
from orchestrator.objects.address import parse  # noqa: E402
from orchestrator.objects.store import open_store  # noqa: E402
from orchestrator.runs import journal  # noqa: E402
from orchestrator.runs.folder import RunFolder  # noqa: E402
from pipelines.common import run_command  # noqa: E402
from pipelines.options import Options, at_least  # noqa: E402
from tests.helpers.bucket import Proxy, environment  # noqa: E402 - not installed
from tests.helpers.ports import free_port  # noqa: E402

STATES = ("none", "fast", "slow", "away")
SLOW_S = 2.0


def train_in(folder: str, storage: str, words: list[str]) -> None:
    """Train in this process."""
    from orchestrator.train.loop import train

    experiment = load_experiment(None, words)
    dataset = prepare_in(experiment.data, Path(storage))
    train(experiment, RunFolder(Path(folder)), dataset.directory)


@contextlib.contextmanager
def store() -> Iterator[Proxy]:
    """Start a store with a bucket, behind a proxy."""
    port = free_port()
    command = ["nice", "-n", "19", sys.executable, "-m", "moto.server", "-p", str(port)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=quiet) as process:
        proxy = Proxy(port)
        os.environ.update(environment(proxy.url))
        client = open_store(parse("store", "s3://bucket/m"))._client
        while True:
            with contextlib.suppress(Exception):
                client.create_bucket(Bucket="bucket")
                break
            time.sleep(0.2)
        try:
            yield proxy
        finally:
            proxy.close()
            process.kill()


def cpu_s(process: str) -> float:
    """Return the CPU time that a process or thread has taken."""
    text = Path(f"/proc/{process}/stat").read_text()
    user, system = text.rpartition(") ")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


class Bench:
    """Changes the state of the store while a run goes on, and measures its steps.

    Args:
        proxy: The proxy before the store.
        folder: Folder of the run.
        uploader: Mirrors it.
        training: Id of the process that trains.
    """

    def __init__(
        self, proxy: Proxy, folder: RunFolder, uploader: Uploader, training: int | None
    ) -> None:
        self.proxy = proxy
        self.tasks = (f"self/task/{uploader._thread.native_id}", str(training))
        self.folder = folder
        self.state = "none"
        self.steps: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self.step_cpu: dict[str, list[float]] = defaultdict(list)
        self.uploads: dict[str, int] = defaultdict(int)
        sync = uploader.sync
        uploader.sync = lambda: None if self.state == "none" else sync()  # type: ignore[method-assign]
        proxy.decide = self.decide

    def decide(self, *_: object) -> str:
        if self.state == "slow":
            time.sleep(SLOW_S)
        return "reset" if self.state == "away" else ""

    def measure(self, state: str, seconds: float) -> None:
        """Measure the steps while the store is in a state."""
        self.state = state
        before, began = [cpu_s(task) for task in self.tasks], time.time()
        sent = len(self.proxy.requests)
        time.sleep(seconds)
        used = [cpu_s(task) - then for task, then in zip(self.tasks, before, strict=True)]
        self.cpu[state].append(used[0] / seconds)
        puts = [unquote(path) for verb, path in self.proxy.requests[sent:] if verb == "PUT"]
        found = {path.partition("@")[0] for path in puts}
        self.uploads[state] += len([path for path in found if path.endswith("model.safetensors")])
        lines = journal.read(self.folder)
        times = [line["timestamp"] / 1000 for line in lines if line["timestamp"] / 1000 > began]
        self.steps[state].append((times[-1] - times[0]) / (len(times) - 1))
        self.step_cpu[state].append(used[1] / len(times))

    def table(self) -> str:
        """Return what was measured, as medians and ranges over the rounds."""
        rows = []
        for state in STATES:
            row = [state, spread([1000 * step for step in self.steps[state]], 0)]
            for found in (self.steps, self.step_cpu):
                pairs = zip(found[state], found["none"], strict=True)
                row.append(spread([one / other for one, other in pairs], 3))
            row += [f"{100 * statistics.median(self.cpu[state]):.2f} %", str(self.uploads[state])]
            rows.append(row)
        return markdown(
            ["store", "step, ms", "ratio", "CPU of a step", "CPU of the thread", "uploads"], rows
        )


def words_of(width: int, interval: int) -> list[str]:
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
        "compute.cpus_per_worker=1",
    ]


def main(argv: list[str]) -> int:
    parser = Options(__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=12)
    parser.add_argument("--seconds", type=at_least(5.0), default=7.0)
    parser.add_argument("--width", type=at_least(16), default=256)
    parser.add_argument("--checkpoint-interval", type=at_least(1), default=20)
    a = parser.parse_args(argv)
    upload.POLL_S = 1.0
    words = words_of(a.width, a.checkpoint_interval)
    experiment: Experiment = load_experiment(None, words)
    with tempfile.TemporaryDirectory() as base, store() as proxy:
        folder = RunFolder(Path(base) / "run")
        folder.path.mkdir()
        folder.run_file.write_text('{"key": "benchmark"}')
        prepare_in(experiment.data, Path(base))
        spawn = multiprocessing.get_context("spawn")
        process = spawn.Process(target=train_in, args=(str(folder.path), base, words), daemon=True)
        process.start()
        with mirrored(folder, parse("mirror", "s3://bucket/m"), Path(base)) as uploader:
            while not folder.checkpoint_steps():
                time.sleep(0.1)
            bench = Bench(proxy, folder, uploader, process.pid)
            for number in range(a.rounds):
                turn = number % len(STATES)
                for state in STATES[turn:] + STATES[:turn]:
                    bench.measure(state, a.seconds)
            bench.state = "fast"
            process.kill()
    print(f"load of the machine: {os.getloadavg()[1]:.1f} on {os.cpu_count()} CPUs")
    print(bench.table())
    return 0


if __name__ == "__main__":
    run_command(main)
