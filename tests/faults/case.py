"""One run with faults. It is started again, with other numbers of workers, until it is done.

Read `Case.run` first, then `Case.attempt`. Between two attempts, the driver's own functions run:
`identity.check_resumable` and `identity.begin_attempt`.
"""

import json
import random
import re
import signal
import time
from dataclasses import asdict, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from orchestrator.config.experiment import load_experiment
from orchestrator.data.dataset import load_manifest
from orchestrator.files import read_json
from orchestrator.runs import identity, stop
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import hangs, places
from tests.faults import kinds
from tests.faults.damage import damage_checkpoint, tear_journal
from tests.faults.kinds import Fault
from tests.faults.outcome import is_in_mlflow, outcome
from tests.faults.rank import RankStarter
from tests.faults.report import FaultRecord, Report
from tests.helpers.tiny import TINY as TINY_MODEL

STEPS = 40
TINY = [
    "name=tiny",
    *TINY_MODEL,
    f"train.max_steps={STEPS}",
    "train.eval_interval=6",
    "train.eval_tokens=400",
    "train.checkpoint_interval=4",
    "train.keep=3",
    "schedule.max_lr=1e-2",
    "schedule.warmup_steps=5",
    "compute.use_gpu=false",
]
# Only for attempts with a hang: on a busy machine, healthy ranks can take longer.
HANG = ["compute.hang_after_s=2"]
VARIANTS = [
    [f"train.dtype={dtype}", f"train.log_interval={interval}"]
    for dtype in ("float32", "bfloat16")
    for interval in (1, 3)
]
RANK_IN_VERDICT = re.compile(r"rank (\d+) \(process ")
ATTEMPT_S = 120.0  # an attempt that takes longer has failed


class Case:
    """A run, and the report on its faults.

    Args:
        starter: Starts the ranks.
        path: Folder of the case: of the run, its log and its notes.
        data_dir: Folder of the token shards.
        variant: Overrides of the experiment.
        database: MLflow's database. Between attempts, metrics are sent to it, and they are compared
            at the end. None: MLflow is not used.
    """

    def __init__(
        self,
        starter: RankStarter,
        path: Path,
        data_dir: Path,
        variant: list[str],
        database: str | None = None,
    ) -> None:
        self.starter = starter
        self.path = path
        self.data_dir = data_dir
        self.database = database
        self.folder = RunFolder(path / "tiny")
        self.folder.path.mkdir(parents=True)
        self.overrides = [*TINY, *variant]
        self.experiment = load_experiment(None, self.overrides)
        self.dataset = load_manifest(data_dir)
        self.report = Report(path.name)
        # The last fault, and when it happened, until the next attempt makes a step.
        self.last_fault: tuple[FaultRecord, float] | None = None

    # ---- one attempt ----

    def attempt(self, world: int, fault: Fault | None) -> bool:
        """Start all ranks, cause the fault, wait until they end. Return whether the run is done."""
        self.report.attempts += 1
        identity.check_resumable(self.folder, self.experiment, self.dataset, lambda message: None)
        identity.begin_attempt(self.folder, self.experiment, {}, {"workers": world})
        first_step = self.path / f"first-step-{self.report.attempts}"
        note = self.path / f"met-{self.report.attempts}"
        is_hang = fault is not None and fault.kind == "hang"
        job = {
            "world": world,
            "store": str(self.path / f"store-{self.report.attempts}"),
            "launch": str(self.report.attempts),
            "profile": 0,
            "code": [],
            **places.of_driver(self.folder, self.data_dir, None),
            "run_dir": str(self.folder.path),
            "log": str(self.path / "log.txt"),
            "first_step": str(first_step),
            "met": str(note),
            "faults": [asdict(fault)] if fault else [],
            "experiment": load_experiment(
                None, self.overrides + HANG if is_hang else self.overrides
            ).model_dump(),
        }
        processes = self.starter.start([job | {"rank": r} for r in range(world)])
        try:
            if fault and fault.is_from_outside:
                self._cause(fault, processes, first_step)
            failed_at = self._wait_for_end(processes, fault)
        finally:
            for process in processes:
                process.kill()
                process.join()
        self._measure_recovery(first_step)
        codes = [process.exitcode for process in processes]
        if self._has_happened(fault, codes, note):
            self._record(fault, codes, _time_of(note) if note.exists() else failed_at)
        elif any(codes):
            self._add_problem(f"attempt {self.report.attempts} ended with {codes} for no reason")
        return codes == [0] * world and self._stopped() is None

    def _cause(self, fault: Fault, processes: list[Any], first_step: Path) -> None:
        """Cause a fault from outside: wait for its time, then stop or kill the ranks."""
        if fault.delay > 0:
            sentinels = [process.sentinel for process in processes]
            deadline = time.monotonic() + ATTEMPT_S
            while not first_step.exists() and not wait(sentinels, 0.005):
                assert time.monotonic() < deadline, "no step was made"
            time.sleep(fault.delay / 2)
        else:
            time.sleep(-fault.delay)
        if fault.kind in ("stop", "stop-kill"):
            stop.request(self.folder, "SIGTERM")
        if fault.kind == "stop-kill":
            time.sleep(fault.place * 0.2)
        if fault.kind != "stop":
            for process in fault.victims(processes):
                process.kill()

    def _wait_for_end(self, processes: list[Any], fault: Fault | None) -> float:
        """Wait until all ranks have ended. Return when the first one failed, or the time now.

        After the first failure, the other ranks get `fault.patience` seconds. They are then killed,
        as Ray kills them.
        """
        deadline = time.monotonic() + ATTEMPT_S
        failed_at = None
        alive = list(processes)
        while alive:
            wait([process.sentinel for process in alive], 0.5)
            alive = [process for process in processes if process.exitcode is None]
            if failed_at is None and any(process.exitcode for process in processes):
                failed_at = time.monotonic()
                deadline = failed_at + (fault.patience if fault else 0.0)
            if time.monotonic() >= deadline:
                if failed_at is None:
                    self._add_problem(
                        f"attempt {self.report.attempts} did not end within {ATTEMPT_S:.0f} s"
                    )
                for process in alive:
                    process.kill()
        return failed_at or time.monotonic()

    def _measure_recovery(self, first_step: Path) -> None:
        """Record the time from the last fault to the first step of this attempt."""
        if self.last_fault and first_step.exists():
            record, since = self.last_fault
            record.recovery_s = _time_of(first_step) - since
        self.last_fault = None

    def _has_happened(self, fault: Fault | None, codes: list[int], note: Path) -> bool:
        """Return whether the fault happened: its rank wrote a note, was killed or stopped."""
        stopped = self._stopped()
        is_full = fault is not None and fault.kind == "full"
        if stopped and not stopped.get("again") and not is_full:
            self._add_problem(f"stopped: {stopped['reason']}")
        if note.exists():
            return True
        if fault is None or not fault.is_from_outside:
            return False
        if fault.kind == "stop" and stopped is not None:
            return True
        return -signal.SIGKILL in fault.victims(codes)

    def _record(self, fault: Fault, codes: list[int], at: float) -> None:
        """Add the fault to the report; damage the files if its kind requires that."""
        attempt = self.report.attempts
        if fault.kind == "hang":
            named = RANK_IN_VERDICT.findall(hangs.report(self.folder) or "")
            if named != [str(fault.rank)]:
                self._add_problem(
                    f"rank {fault.rank} was stopped in attempt {attempt}, but {named} was named"
                )
                return
        kind = fault.kind
        if kind in ("flip", "cut") and len(self.folder.checkpoint_steps()) < 2:
            kind = "all"  # a run whose only checkpoint is damaged is refused
        text = f"{fault.moment or kind} of rank {fault.rank} of {fault.world}, attempt {attempt}"
        record = FaultRecord(kind, text, fault.victims(codes).count(-signal.SIGKILL))
        self.report.happened.append(record)
        if any(codes) or self._stopped():
            self.last_fault = (record, at)
        if kind == "tail":
            tear_journal(self.folder, fault)
        elif kind in kinds.DAMAGE:
            problem = damage_checkpoint(self.folder, fault)
            if problem is not None:
                self._add_problem(problem)

    def _stopped(self) -> dict[str, Any] | None:
        return read_json(self.folder.ending_file)

    def _add_problem(self, problem: str) -> None:
        self.report.problems.append(problem)

    # ---- all attempts ----

    def run(
        self, rng: random.Random, faults: int, only: tuple[str, ...] = tuple(kinds.KINDS)
    ) -> Report:
        """Start attempts until the run is done, the first ones with faults.

        A fault does not happen if the run is done before its moment.
        """
        plan: list[Fault] = []
        while len(plan) < faults:
            plan += kinds.draw(rng, only)
        done = False
        try:
            for fault in plan[:faults]:
                done = self.attempt(fault.world, self._possible(fault))
                if rng.random() < 0.5:
                    self._send()
                if done:
                    break
            for _ in range(3):
                done = done or self.attempt(rng.choice(kinds.WORLDS), None)
            if not done:
                self._add_problem("the run did not end without faults")
        except Exception as error:
            self._add_problem(f"{type(error).__name__}: {error}")
        return self.report

    def _possible(self, fault: Fault) -> Fault:
        """Return another fault if this one needs a checkpoint and there is none yet."""
        if fault.moment not in kinds.RESTORE or self.folder.checkpoint_steps():
            return fault
        kind = "again" if fault.kind == "again" else "step"
        return replace(fault, kind=kind, moment="before optimizer", nth=6)

    def compare(self, golden: dict[str, Any]) -> None:
        """Report what differs from the run without faults."""
        mine = outcome(self.folder.path)
        for key in golden:
            if mine.get(key) != golden[key]:
                self._add_problem(f"{key} differs from the golden run's")
        if self.database:
            self._send()
            if not is_in_mlflow(self.database, self.folder.path, golden["curve"]):
                self._add_problem("MLflow's history differs from the golden run's")

    def _send(self) -> None:
        """Send all metrics to MLflow, if it is used."""
        if self.database is None:
            return
        from orchestrator.track.tracker import resend_metrics

        if not resend_metrics(self.folder, f"sqlite:///{self.database}", "faults", 60):
            self._add_problem("MLflow did not accept all metrics")


def _time_of(note: Path) -> float:
    return json.loads(note.read_text().splitlines()[0])["at"]
