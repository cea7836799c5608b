"""Faults of nodes, drawn from a seed: `python -m tests.machines.campaign -n 10 --seed 1`.

Each case is a run on three machines with one or two faults. At its end it is compared with a run of
one process without faults. The same command is run again for as long as its status is 75.
"""

import argparse
import contextlib
import itertools
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.config.experiment import load_experiment
from orchestrator.errors import EXIT_AGAIN, EXIT_DONE
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.workers import marks
from tests.faults.campaign import make_source
from tests.faults.report import FaultRecord, Report, table, write_table
from tests.helpers import machines as helper
from tests.helpers.curves import final_outcome
from tests.helpers.machines import SLOW_RUN, Machines

BEGIN = "<!-- cluster campaign: written by `make faults-cluster` -->"
END = "<!-- end of the cluster campaign -->"
STEPS = 150
COMMANDS = 6  # starts of the command until a case fails
PAIRS = 0.2  # share of cases with two faults at once
SMALL = ["name=run", *SLOW_RUN, "train.log_interval=1", f"train.max_steps={STEPS}"]


@dataclass
class Case:
    """One run and its faults.

    Attributes:
        cluster: Where it runs.
        storage: Its folder, which all machines share.
        words: Overrides of the run.
        rng: Draws the moments.
        undo: What makes the cluster whole again.
        signs: Words of which one must be printed or noted after each fault.
    """

    cluster: Machines
    storage: Path
    words: list[str]
    rng: random.Random
    report: Report
    driver: subprocess.Popen | None = None
    undo: list[Callable[[], None]] = field(default_factory=list)
    signs: list[str] = field(default_factory=list)

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.storage / "run")

    @property
    def text(self) -> str:
        """What the commands printed, and the events."""
        logs = [log.read_text() for log in sorted(self.storage.glob("*.log"))]
        return "\n".join([*logs, *(event["message"] for event in events.read(self.folder))])

    def start(self) -> None:
        self.report.attempts += 1
        command = ["pipelines/train.py", str(self.storage / "run.yaml"), *self.words]
        log = self.storage / f"{self.report.attempts}.log"
        self.driver = self.cluster.drive([*command, f"storage={self.storage}"], log)

    def run(self, kinds: list[str]) -> None:
        """Train to the end, with the faults at a step that is drawn."""
        self.start()
        step = self.rng.randint(10, STEPS // 2)
        if not self._reaches(step):
            self.report.problems.append(f"status: no step {step}:\n{self.text[-3000:]}")
            return
        for kind in kinds:
            KINDS[kind][1](self)
            record = FaultRecord(kind, f"{kind} at step {step}", None, pair=len(kinds) > 1)
            self.report.happened.append(record)
        begun, last = time.monotonic(), self._last_step()
        reached = self._goes_on(last)
        for record in self.report.happened:
            record.recovery_s = time.monotonic() - begun if reached else None
        self._end()

    def _goes_on(self, step: int) -> bool:
        """Wait for a later step. Repair the cluster once it is there, or the run has no room."""
        reached = self._reaches(step + 1, or_waits=bool(self.undo))
        for repair in self.undo:
            repair()
        return reached or self._reaches(step + 1)

    def _end(self) -> None:
        for _ in range(COMMANDS):
            assert self.driver is not None
            try:
                status = self.driver.wait(180)
            except subprocess.TimeoutExpired:
                self.report.problems.append(f"manual: it does not end:\n{self.text[-3000:]}")
                return
            if status == EXIT_DONE:
                break
            if status != EXIT_AGAIN and not self.cluster.lost_head:
                self.report.problems.append(f"status: {status}:\n{self.text[-3000:]}")
                return
            self.cluster.lost_head = False
            self.start()
        missing = [sign for sign in self.signs if sign not in self.text]
        if missing:
            self.report.problems.append(f"silent: no {missing} in\n{self.text[-3000:]}")
        if "Traceback" in self.text:
            self.report.problems.append(f"traceback: {self.text[-3000:]}")

    def _reaches(self, step: int, or_waits: bool = False) -> bool:
        """Wait for a step; start the command again if its status is 75.

        Args:
            step: The step.
            or_waits: Whether to return also if the run waits for room, or has ended and would be
                refused: a new start needs room for a fixed number of workers.
        """
        deadline = time.monotonic() + 180
        while self._last_step() < step:
            assert self.driver is not None
            status = self.driver.poll()
            if status == EXIT_AGAIN and or_waits and "compute.num_workers=2" in self.words:
                return False
            if status is not None and (status == EXIT_AGAIN or self.cluster.lost_head):
                self.cluster.lost_head = False
                self.start()
            elif status is not None:
                return status == EXIT_DONE
            if time.monotonic() > deadline or or_waits and "no room for" in self.text:
                return False
            time.sleep(0.1)
        return True

    def _last_step(self) -> int:
        line = journal.last(self.folder) if self.folder.path.exists() else None
        return 0 if line is None else line["step"]

    def node(self) -> int:
        """Draw one of the two nodes with workers; not one that has had a fault."""
        return self.rng.choice([node for node in (1, 2) if node not in self.cluster.changed])

    def forget(self) -> None:
        """Expect no more of the faults before: the run ends, perhaps before it has seen them."""
        self.signs.clear()


# ---- the faults ----


def _kill(case: Case) -> None:
    node = case.node()
    case.cluster.kill(node)
    case.undo.append(lambda: case.cluster.start_again(node))
    case.signs.append(f"node{node}")


def _blink(case: Case) -> None:
    """Kill a node that boots again at once."""
    node = case.node()
    case.cluster.kill(node)
    case.cluster.start_again(node)


def _cut(case: Case) -> None:
    node, seconds = case.node(), case.rng.uniform(8, 15)
    case.cluster.cut(node)
    time.sleep(seconds)
    case.cluster.mend(node)
    case.signs.append(f"node{node} does not answer")


def _cut_off(case: Case) -> None:
    """Cut a node off until the run has gone on without it."""
    node = case.node()
    case.cluster.cut(node)
    case.undo.append(lambda: case.cluster.start_again(node))
    case.signs.append(f"node{node} does not answer")


def _worker(case: Case) -> None:
    lost = {f"node{node}" for node in case.cluster.changed}
    rank = case.rng.choice([rank for rank in marks.read(case.folder) if rank.host not in lost])
    with contextlib.suppress(subprocess.CalledProcessError):  # it has ended after another fault
        case.cluster.run(int(rank.host.removeprefix("node")), ["kill", "-9", str(rank.pid)])
    case.signs.append("begins at step")


def _drain(case: Case) -> None:
    node = case.node()
    case.cluster.drain(node)
    case.undo.append(lambda: case.cluster.start_again(node))
    case.signs.append(f"node{node} is drained")


def _stop(case: Case) -> None:
    assert case.driver is not None
    case.forget()
    case.cluster.signal_driver(case.driver, signal.SIGTERM)


def _head(case: Case) -> None:
    """Kill the head with the driver. All machines get a new head."""
    case.forget()
    case.undo.clear()
    case.cluster.lost_head = True
    for node in range(3):
        case.cluster.kill(node)
    case.cluster.restore(keep_drivers=True)


KINDS: dict[str, tuple[str, Callable[[Case], None]]] = {
    "kill": ("a node is killed, and comes back later", _kill),
    "blink": ("a node is killed, and boots again at once", _blink),
    "cut": ("the network of a node is cut for 8 to 15 s", _cut),
    "cut-off": ("a node is cut off for good, and replaced later", _cut_off),
    "worker": ("a worker is killed", _worker),
    "drain": ("a node is drained", _drain),
    # These end the run, so they come last of two faults.
    "stop": ("SIGTERM of the driver", _stop),
    "head": ("all machines are killed, also the head and its driver", _head),
}


def golden(words: list[str], folder: Path, tokens: Path) -> dict[str, Any]:
    """Train the run in this process, without faults."""
    folder.mkdir()
    train(load_experiment(None, [*words, "compute.num_workers=1"]), RunFolder(folder), tokens)
    return final_outcome(RunFolder(folder))


def run_case(cluster: Machines, seed: str, words: list[str], expected: dict[str, Any]) -> Report:
    """Run one case; see `Case`."""
    rng = random.Random(seed)
    storage = cluster.shared / f"case-{seed.replace('/', '-')}"
    storage.mkdir()
    (storage / "run.yaml").write_text("data: {tokenizer: char}\n")
    more = rng.choice(["compute.num_workers=[1, 2]", "compute.num_workers=2"])
    case = Case(cluster, storage, [*words, more], rng, Report(seed))
    kinds = [rng.choice(list(KINDS))]
    if rng.random() < PAIRS:
        kinds.append(rng.choice([kind for kind in KINDS if kind not in ("head", kinds[0])]))
        kinds.sort(key=list(KINDS).index)
    begun = time.monotonic()
    try:
        case.run(kinds)
        found = final_outcome(case.folder)
        different = [key for key in expected if found.get(key) != expected[key]]
        case.report.problems += [f"bits: {key} differs" for key in different]
    except Exception as error:
        case.report.problems.append(f"harness: {type(error).__name__}: {error}")
    seconds = time.monotonic() - begun
    print(f"case {seed}: {', '.join(kinds)}, {more}: {seconds:.0f} s", flush=True)
    for problem in case.report.problems:
        print(f"  {problem}", flush=True)
    cluster.restore()
    return case.report


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=10, help="stop after this many faults")
    parser.add_argument("--minutes", type=float, default=math.inf, help="or after this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/fault-tests.md"
    )
    args = parser.parse_args()
    reason = helper.reason_to_skip()
    if reason is not None:
        sys.exit(f"machines: {reason}")
    base = Path(tempfile.mkdtemp(prefix="nodes-"))
    source = base / "source"
    source.mkdir()
    make_source(source, with_store=False)
    begun = time.monotonic()
    reports: list[Report] = []
    with helper.machines(base, cpus=[0, 1, 1]) as cluster:
        for name in ("corpus.txt", "tokens"):
            shutil.move(source / name, cluster.shared / name)
        words = [*SMALL, f"data.corpus={cluster.shared}/corpus.txt"]
        words.append(f"data.dir={cluster.shared}/tokens")
        expected = golden(words, base / "golden", cluster.shared / "tokens")
        for number in itertools.count(args.first):
            minutes = (time.monotonic() - begun) / 60
            if sum(len(report.happened) for report in reports) >= args.n or minutes > args.minutes:
                break
            reports.append(run_case(cluster, f"{args.seed}/{number}", words, expected))
    titles = {name: title for name, (title, _) in KINDS.items()}
    text = table(reports, titles, args.seed, time.monotonic() - begun)
    print(text)
    if args.write:
        write_table(text, BEGIN, END)
    if any(report.problems for report in reports):
        print(f"the folders are kept in {base}")
        return 1
    shutil.rmtree(base)
    return 0


if __name__ == "__main__":
    os.chdir(helper.REPO)
    sys.exit(main())
