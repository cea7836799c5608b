"""Workers of a real Ray, killed one after another in one run: `python -m tests.faults.ray_kills -n 10`; `--write` as `campaign`.

Starts `pipelines/train.py` with two workers on a Ray of its own, kills a rank by SIGKILL, waits for the next step, and again.
The driver is stopped by SIGTERM at the end, and weights, moments and curve are compared with the same steps made in one process.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import EXIT_AGAIN
from orchestrator.runs import journal, metrics
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker
from orchestrator.workers import marks
from tests.faults import campaign
from tests.faults.campaign import REPO, quantiles

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
EXPERIMENT = REPO / "configs" / "quickstart.yaml"
WAIT_S = 120
BEGIN, END = (
    "<!-- ray: written by `python -m tests.faults.ray_kills --write` -->",
    "<!-- end of ray -->",
)


@dataclass
class Again:
    """Seconds after a kill until the new rank 0 is a process, until that begins its attempt, until its first step is made;
    and the processor time that it has taken by then, which does not depend on what else the machine does."""

    process: float
    attempt: float
    step: float
    processor: float


class Driver:
    """`pipelines/train.py` in a process of its own."""

    def __init__(self, storage: Path, data_dir: Path, corpus: Path):
        self.run_dir = storage / "small"
        words = [f"storage={storage}", f"data.dir={data_dir}", f"data.corpus={corpus}", *SMALL]
        env = {
            k: v
            for k, v in os.environ.items()
            if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI", "ESPALIER_STORAGE")
        }
        self.log = open(storage / "driver.log", "w+")  # noqa: SIM115 - the process writes to it
        command = [sys.executable, str(REPO / "pipelines" / "train.py"), str(EXPERIMENT), *words]
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log)

    def wait(self, condition) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert self.process.poll() is None, (
                f"the driver ended with {self.process.returncode}: see {self.log.name}"
            )
            assert time.monotonic() < deadline, f"waited in vain: see {self.log.name}"
            time.sleep(0.02)

    def attempts(self) -> int:
        file = self.run_dir / "attempts.jsonl"
        return file.read_text().count("\n") if file.exists() else 0

    def last(self) -> dict:
        return journal.last(RunFolder(self.run_dir)) or {"step": -1, "timestamp": 0}

    def kill(self, rank: int) -> Again:
        """Kill a rank some steps after a new checkpoint, and wait for the next step."""
        at = max(checkpoint.steps(self.run_dir / "checkpoints"), default=0)
        self.wait(lambda: max(checkpoint.steps(self.run_dir / "checkpoints"), default=0) > at)
        time.sleep(random.random())
        attempts, since = self.attempts(), (time.time(), time.clock_gettime(time.CLOCK_BOOTTIME))
        os.kill(
            next(m.pid for m in marks.read(RunFolder(self.run_dir)) if m.rank == rank),
            signal.SIGKILL,
        )
        self.wait(lambda: self.attempts() > attempts)
        begun = time.time() - since[0]
        pid = json.loads((self.run_dir / "attempts.jsonl").read_text().splitlines()[-1])["pid"]
        born = _seconds(pid)[18] - since[1]
        self.wait(lambda: self.last()["timestamp"] > (since[0] + begun) * 1000)
        user, system = _seconds(pid)[10:12]
        lines = [r["timestamp"] / 1000 - since[0] for r in journal.read(RunFolder(self.run_dir))]
        return Again(max(0.0, born), begun, next(t for t in lines if t > begun), user + system)

    def stop(self) -> int:
        """Ask by SIGTERM; returns the step that the run stopped after."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(WAIT_S) == EXIT_AGAIN, (
            f"ended with {self.process.returncode}: see {self.log.name}"
        )
        return json.loads((self.run_dir / "stopped.json").read_text())["step"]


def _seconds(pid: int) -> list[float]:
    """The times among the fields of /proc/<pid>/stat that follow the name."""
    return [
        int(word) / os.sysconf("SC_CLK_TCK")
        for word in Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1:]
    ]


def differences(run_dir: Path, data_dir: Path, folder: Path, step: int) -> list[str]:
    """What of the run's first `step` steps is not what one process makes of them."""
    golden = folder / "golden"
    golden.mkdir()
    experiment = load_experiment(EXPERIMENT, SMALL)
    trainer = Trainer(experiment, RunFolder(golden), data_dir, Worker(cpus=1), end_step=step)
    for _ in trainer.run():
        pass
    found = []
    for name in ("model.safetensors", "optimizer.safetensors"):
        mine, other = (
            (checkpoint.path_of(d / "checkpoints", step) / name).read_bytes()
            for d in (run_dir, golden)
        )
        found += [] if mine == other else [name]
    mine, other = (_curve(d, step) for d in (run_dir, golden))
    return found + ([] if mine == other else ["curve"])


def _curve(run_dir: Path, before: int) -> list[dict]:
    lines = (r for r in journal.read(RunFolder(run_dir)) if r["step"] < before)
    return [metrics.exact_part(r) for r in lines]


def table(again: list[Again], step: int, found: list[str]) -> str:
    rows = [
        ("Ray has seen it and started another rank 0", [a.process for a in again]),
        ("that has imported, found its group and begun", [a.attempt - a.process for a in again]),
        ("checkpoint read, first step made", [a.step - a.attempt for a in again]),
        ("**from the kill to the next step**", [a.step for a in again]),
        ("processor time of the new rank 0 until then", [a.processor for a in again]),
    ]
    verdict = "no difference" if not found else f"**{found} differ**"
    return "\n".join(
        [
            f"{datetime.now(UTC):%Y-%m-%d}: {len(again)} times SIGKILL of a worker in one run of {step:,} steps on 2 workers, "
            f"{verdict} to the same steps in one process; {os.cpu_count()} shared cores with a load of {os.getloadavg()[1]:.0f} "
            f"(5 minutes' average).",
            "",
            "| under Ray | median s | p95 s |",
            "|---|--:|--:|",
            *(f"| {words} | {' | '.join(quantiles(times))} |" for words, times in rows),
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=10, help="kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/RELIABILITY.md"
    )
    args = parser.parse_args()
    random.seed(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="faults-ray-"))
    data_dir = campaign.make_dataset(folder)
    driver, again = Driver(folder, data_dir, folder / "corpus.txt"), []
    try:
        driver.wait(lambda: driver.last()["step"] > 0)
        for _ in range(args.n):
            again.append(driver.kill(random.randrange(2)))
            print(again[-1], flush=True)
        step = driver.stop()
    finally:
        driver.process.kill()
    found = differences(driver.run_dir, data_dir, folder, step)
    text = table(again, step, found)
    print(text)
    if args.write:
        campaign.write(text, BEGIN, END)
    if not found:
        shutil.rmtree(folder)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
