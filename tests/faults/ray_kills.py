"""Kills processes of a run on a real Ray: `python -m tests.faults.ray_kills -n 10`.

Starts `pipelines/train.py` with two workers and its own Ray. Draws a fault of `FAULTS`, waits for
the next step, and repeats this. If the driver ends, the same command is started again. At the end,
SIGTERM stops the driver. Then the weights, the optimizer moments and the logged losses are compared
with those of the same steps in one process.
"""

import argparse
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from orchestrator.config.experiment import load_experiment
from orchestrator.errors import EXIT_AGAIN
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker
from orchestrator.workers import marks
from tests.faults.campaign import make_source
from tests.faults.report import REPO, quantiles, write_table
from tests.helpers.checkpoints import written_by_one
from tests.helpers.curves import exact_part

SMALL = [
    "name=small",
    "data.tokenizer=char",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=32",
    "model.block_size=32",
    "model.dropout=0.1",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=4",
    "train.global_batch_size=16",
    "train.max_steps=20000",
    "train.log_interval=1",
    "train.eval_interval=500",
    "train.eval_tokens=1000",
    "train.checkpoint_interval=20",
    "schedule.warmup_steps=10",
    "compute.num_workers=2",
    "compute.cpus_per_worker=1",
    "compute.use_gpu=false",
]
EXPERIMENT = REPO / "tests" / "helpers" / "small.yaml"
WAIT_S = 120
STOP_S = 5.0
FAULTS = {
    "rank": "SIGKILL of a worker",
    "gcs_server": "SIGKILL of the GCS",
    "raylet": "SIGKILL of the raylet",
    "stopped gcs_server": f"SIGSTOP of the GCS for {STOP_S:.0f} s",
    "stopped raylet": f"SIGSTOP of the raylet for {STOP_S:.0f} s",
    "driver": "SIGKILL of the driver",
    "SIGTERM": "SIGTERM to the driver",
}
BEGIN = "<!-- ray: written by `python -m tests.faults.ray_kills --write` -->"
END = "<!-- end of ray -->"


@dataclass
class Recovery:
    """Times after a fault, in seconds.

    Attributes:
        fault: Its kind.
        process: Until the process of the new rank 0 started.
        attempt: Until that process began its attempt.
        step: Until its first step was done.
        processor: Processor time of that process until then. Unlike the others, it does not depend
            on other programs of the machine.
    """

    fault: str
    process: float
    attempt: float
    step: float
    processor: float


class Driver:
    """`pipelines/train.py` in a process of its own."""

    def __init__(self, storage: Path, data_dir: Path, corpus: Path) -> None:
        self.folder = RunFolder(storage / "small")
        words = [f"storage={storage}", f"data.dir={data_dir}", f"data.corpus={corpus}", *SMALL]
        self.log = open(storage / "driver.log", "w+")  # noqa: SIM115 - the process writes to it
        train = REPO / "pipelines" / "train.py"
        self.command = [sys.executable, str(train), str(EXPERIMENT), *words]
        self.begin()

    def begin(self) -> None:
        env = dict(os.environ)
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "ESPALIER_STORAGE"):
            env.pop(name, None)
        self.process = subprocess.Popen(self.command, env=env, stdout=self.log, stderr=self.log)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition is true."""
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self.process.poll() is None, (
                f"the driver ended with {self.process.returncode}: see {self.log.name}"
            )
            assert time.monotonic() < deadline, f"no progress: see {self.log.name}"
            time.sleep(0.02)

    def attempts(self) -> int:
        """Return the number of attempts that have begun."""
        file = self.folder.attempts_file
        return file.read_text().count("\n") if file.exists() else 0

    def last_line(self) -> dict[str, Any]:
        """Return the last line of the journal."""
        return journal.last(self.folder) or {"step": -1, "timestamp": 0}

    def last_checkpoint(self) -> int:
        return max(self.folder.checkpoint_steps(), default=0)

    def pid_of(self, name: str) -> int:
        """Return the process of a rank that is drawn, or of Ray."""
        if name == "rank":
            return random.choice([mark.pid for mark in marks.read(self.folder)])
        for process in psutil.Process(self.process.pid).children(recursive=True):
            # The processes of the dead Ray are still children of the driver.
            with contextlib.suppress(psutil.ZombieProcess):
                if f"/{name} " in f"{' '.join(process.cmdline())[:200]} ":
                    return process.pid
        raise AssertionError(f"no process {name}")

    def cause(self, fault: str) -> None:
        """Cause a fault. Start the driver again if it ended."""
        if fault == "SIGTERM":
            self.stop()
            self.begin()
        elif fault == "driver":
            self.process.kill()
            self.process.wait()
            self.begin()
        elif fault.startswith("stopped "):
            pid = self.pid_of(fault.removeprefix("stopped "))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOP_S)
            os.kill(pid, signal.SIGCONT)
        else:
            os.kill(self.pid_of(fault), signal.SIGKILL)

    def recover(self, fault: str) -> Recovery:
        """Cause a fault some steps after a new checkpoint, and wait for the next step."""
        saved = self.last_checkpoint()
        self.wait(lambda: self.last_checkpoint() > saved)
        time.sleep(random.random())
        attempts = self.attempts()
        killed_at = time.time()
        killed_since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.cause(fault)
        if fault.startswith("stopped "):
            step = self.last_line()["step"]
            self.wait(lambda: self.last_line()["step"] > step)
            return Recovery(fault, 0.0, 0.0, time.time() - killed_at, 0.0)
        self.wait(lambda: self.attempts() > attempts)
        begun_at = time.time()
        attempt = json.loads(self.folder.attempts_file.read_text().splitlines()[-1])
        started = _times(attempt["pid"])[18] - killed_since_boot
        self.wait(lambda: self.last_line()["timestamp"] > begun_at * 1000)
        user, system = _times(attempt["pid"])[10:12]
        written = [line["timestamp"] / 1000 for line in journal.read(self.folder)]
        first_step = next(at for at in written if at > begun_at)
        return Recovery(
            fault, max(0.0, started), begun_at - killed_at, first_step - killed_at, user + system
        )

    def stop(self) -> int:
        """Stop the driver by SIGTERM. Return the step after which the run stopped."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(WAIT_S) == EXIT_AGAIN, (
            f"ended with {self.process.returncode}: see {self.log.name}"
        )
        return json.loads(self.folder.ending_file.read_text())["step"]


def _times(pid: int) -> list[float]:
    """Return the numbers of /proc/<pid>/stat after the state, in seconds instead of clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return [int(field) / os.sysconf("SC_CLK_TCK") for field in fields[1:]]


def differences(run: RunFolder, data_dir: Path, golden: RunFolder, step: int) -> list[str]:
    """Train the first `step` steps in this process. Return what differs in the run."""
    golden.path.mkdir()
    experiment = load_experiment(EXPERIMENT, SMALL)
    trainer = Trainer(experiment, golden, data_dir, Worker(cpus=1), end_step=step)
    for _ in trainer.run():
        pass
    found = []
    for name in ("model.safetensors", "optimizer.safetensors"):
        if written_by_one(run.checkpoint(step), name) != written_by_one(
            golden.checkpoint(step), name
        ):
            found.append(name)
    if _curve(run, step) != _curve(golden, step):
        found.append("curve")
    return found


def _curve(folder: RunFolder, before: int) -> list[dict[str, Any]]:
    lines = journal.read(folder)
    return [exact_part(line) for line in lines if line["step"] < before]


def table(faults: list[Recovery], step: int, found: list[str]) -> str:
    """Return the results as Markdown."""
    kills = [fault for fault in faults if fault.fault == "rank"]
    rows = {
        title: [fault.step for fault in faults if fault.fault == name]
        for name, title in FAULTS.items()
    }
    rows |= {
        "of these, after SIGKILL of a worker: until a new rank 0 was started": [
            k.process for k in kills
        ],
        "until it has imported its modules and joined the group": [
            k.attempt - k.process for k in kills
        ],
        "until it has read the checkpoint and made a step": [k.step - k.attempt for k in kills],
        "processor time of the new rank 0 until then": [k.processor for k in kills],
    }
    verdict = "no difference from" if not found else f"**{found} differ** from"
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}: {len(faults)} faults in one run of "
        f"{step:,} steps on 2 workers, {verdict} the same steps in one process; "
        f"{os.cpu_count()} shared cores, average load in 5 minutes {os.getloadavg()[1]:.0f}.",
        "",
        "| under Ray, from the fault to the next step | faults | median s | p95 s |",
        "|---|--:|--:|--:|",
        *(
            f"| {title} | {len(times)} | {' | '.join(quantiles(times))} |"
            for title, times in rows.items()
        ),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=10, help="faults")
    parser.add_argument("--minutes", type=float, default=math.inf, help="or stop after this time")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=tuple(FAULTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/fault-tests.md"
    )
    args = parser.parse_args()
    random.seed(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="faults-ray-"))
    data_dir = make_source(folder) / "tokens"
    driver = Driver(folder, data_dir, folder / "corpus.txt")
    begun = time.monotonic()
    faults: list[Recovery] = []
    try:
        driver.wait(lambda: driver.last_line()["step"] > 0)
        while len(faults) < args.n and time.monotonic() - begun < 60 * args.minutes:
            # Each kind comes once before one comes twice.
            fault = args.only[len(faults) % len(args.only)]
            faults.append(driver.recover(fault))
            print(faults[-1], flush=True)
        step = driver.stop()
    finally:
        driver.process.kill()
    found = differences(driver.folder, data_dir, RunFolder(folder / "golden"), step)
    if "Traceback" in Path(driver.log.name).read_text():
        found.append("a traceback")
    text = table(faults, step, found)
    print(text)
    if args.write:
        write_table(text, BEGIN, END)
    if not found:
        shutil.rmtree(folder)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
