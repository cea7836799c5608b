"""One run with faults: it is started again, on other numbers of workers, until it ends.

Eats the seed of a campaign and the number of a case; yields a `Report`. The driver's part between two attempts is the driver's own
code (`identity.check_resumable`, `identity.begin_attempt`).
"""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import time
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.data.dataset import load_manifest
from orchestrator.files import read_json
from orchestrator.runs import identity, journal, metrics, stop
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import hangs
from tests.faults import kinds, rank
from tests.faults.kinds import Fault

STEPS = 40
TINY = [
    "name=tiny",
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "model.dropout=0.1",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    f"train.max_steps={STEPS}",
    "train.eval_interval=6",
    "train.eval_tokens=400",
    "train.checkpoint_interval=4",
    "train.keep=3",
    "schedule.max_lr=1e-2",
    "schedule.warmup_steps=5",
    "compute.use_gpu=false",
]
HANG = ["compute.hang_after_s=2"]  # for an attempt with a hang: the others run on a busy machine
VARIANTS = [
    [f"train.dtype={dtype}", f"train.log_interval={interval}"]
    for dtype in ("float32", "bfloat16")
    for interval in (1, 3)
]
NAMED = re.compile(r"rank (\d+) \(process ")  # by the watchdog's verdict
ATTEMPT_S = 120.0  # one that takes longer has failed


@dataclass
class Met:
    """A fault that really happened. kills: processes that it ended by SIGKILL, without those that were ended because another had
    died. again_s: seconds to the next step, where the next attempt made one."""

    kind: str
    what: str
    kills: int = 0
    again_s: float | None = None


@dataclass
class Report:
    name: str
    met: list[Met] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    attempts: int = 0


class Forge:
    """Forks ranks from a server process that has imported torch once."""

    def __init__(self):
        os.environ |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([rank.__name__])

    def start(self, jobs: list[dict[str, Any]]) -> list[Any]:
        processes = [self.context.Process(target=rank.work, args=(job,)) for job in jobs]
        for process in processes:
            process.start()
        return processes


def outcome(run_dir: Path) -> dict[str, Any]:
    """Return what faults must not change: every logged loss, and the bytes of weights and moments."""
    curve = [metrics.exact_part(r) for r in journal.read(RunFolder(run_dir))]
    last = checkpoint.latest_valid(run_dir / "checkpoints")
    if last is None:
        return {"curve": curve, "step": None}
    parts = {
        name: (last / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors", "state.json")
    }
    weights = checkpoint.weights_sha256(checkpoint.load_tensors(last, "model"))
    return {"curve": curve, "step": last.name, "weights": weights, **parts}


class Case:
    """Args:
    tracked: whether MLflow is told between attempts and compared at the end.
    """

    def __init__(
        self,
        forge: Forge,
        folder: Path,
        data_dir: Path,
        variant: list[str],
        tracked: str | None = None,
    ):
        self.forge, self.folder, self.data_dir, self.tracked = (
            forge,
            Path(folder),
            Path(data_dir),
            tracked,
        )
        self.run_dir = self.folder / "tiny"
        self.run_dir.mkdir(parents=True)
        self.overrides = [*TINY, *variant]
        self.experiment, self.dataset = (
            load_experiment(None, self.overrides),
            load_manifest(data_dir),
        )
        self.report, self.awaiting = Report(self.folder.name), None

    # ---- one attempt ----
    def attempt(self, world: int, fault: Fault | None) -> bool:
        """Start all ranks, let the fault happen, and wait for their end; True where the run is done."""
        self.report.attempts += 1
        identity.check_resumable(
            RunFolder(self.run_dir), self.experiment, self.dataset, lambda message: None
        )
        identity.begin_attempt(RunFolder(self.run_dir), self.experiment, {}, {"workers": world})
        first_step, met, store = (
            self.folder / f"{name}-{self.report.attempts}"
            for name in ("first-step", "met", "store")
        )
        job = {
            "world": world,
            "store": store,
            "launch": self.report.attempts,
            "run_dir": self.run_dir,
            "data_dir": self.data_dir,
            "log": self.folder / "log.txt",
            "first_step": first_step,
            "met": met,
        }
        job = {k: v if isinstance(v, int) else str(v) for k, v in job.items()} | {
            "fault": asdict(fault) if fault else None,
            "overrides": [*self.overrides, *(HANG if fault and fault.kind == "hang" else [])],
        }
        processes = self.forge.start([job | {"rank": r} for r in range(world)])
        try:
            if fault and not fault.moment and fault.kind != "full":
                self._from_outside(fault, processes, first_step)
            hurt_at = self._wait_for_the_end(processes, fault)
        finally:
            for process in processes:
                process.kill()
                process.join()
        self._measure(first_step)
        codes = [process.exitcode for process in processes]
        self._book(fault, codes, met, hurt_at)
        stopped = read_json(self.run_dir / "stopped.json")
        return codes == [0] * world and stopped is None

    def _from_outside(self, fault: Fault, processes: list[Any], first_step: Path) -> None:
        deadline = time.monotonic() + ATTEMPT_S
        while (
            fault.delay > 0
            and not first_step.exists()
            and wait([p.sentinel for p in processes], 0.005) == []
        ):
            assert time.monotonic() < deadline, "no step was made"
        time.sleep(abs(fault.delay) / (2 if fault.delay > 0 else 1))
        if fault.kind in ("stop", "stop-kill"):
            stop.request(RunFolder(self.run_dir), "SIGTERM")
        if fault.kind == "stop-kill":
            time.sleep(fault.place * 0.2)
        victims = (
            []
            if fault.kind == "stop"
            else processes
            if fault.kind in ("all", *kinds.DAMAGE)
            else [processes[fault.rank]]
        )
        for process in victims:
            process.kill()

    def _wait_for_the_end(self, processes: list[Any], fault: Fault | None) -> float:
        """Until all have ended. Once one has died the others get some patience, and are then killed as Ray would; returns when."""
        deadline, hurt_at, alive = time.monotonic() + ATTEMPT_S, None, list(processes)
        while alive:
            wait([p.sentinel for p in alive], 0.5)
            alive = [p for p in processes if p.exitcode is None]
            if hurt_at is None and any(p.exitcode for p in processes):
                hurt_at = time.monotonic()
                deadline = hurt_at + (fault.patience if fault else 0.0)
            if time.monotonic() >= deadline:
                if hurt_at is None:
                    self.report.problems.append(
                        f"attempt {self.report.attempts} did not end within {ATTEMPT_S:.0f} s"
                    )
                for process in alive:
                    process.kill()
        return hurt_at or time.monotonic()

    def _measure(self, first_step: Path) -> None:
        """Record the time from the last fault to the first step of this attempt."""
        if self.awaiting and first_step.exists():
            met, since = self.awaiting
            met.again_s = _when(first_step) - since
        self.awaiting = None

    def _book(self, fault: Fault | None, codes: list[int], met: Path, hurt_at: float) -> None:
        """Count the fault if it happened: by the statuses of the processes, and by what the one that met it wrote down."""
        victims = (
            codes
            if fault and fault.kind in ("all", *kinds.DAMAGE)
            else [codes[fault.rank]]
            if fault
            else []
        )
        killed = victims.count(-signal.SIGKILL)
        stopped = read_json(self.run_dir / "stopped.json")
        if stopped and not stopped.get("again"):
            self.report.problems.append(f"stopped: {stopped['reason']}")
        from_outside = fault and not fault.moment and fault.kind != "full"
        happened = met.exists() or (
            from_outside and (killed > 0 or (fault.kind == "stop" and stopped is not None))
        )
        if not happened:
            if any(codes):
                self.report.problems.append(
                    f"attempt {self.report.attempts} ended with {codes} for no reason"
                )
            return
        if fault.kind == "hang" and (
            named := NAMED.findall(hangs.report(RunFolder(self.run_dir)) or "")
        ) != [str(fault.rank)]:
            self.report.problems.append(
                f"rank {fault.rank} was stopped in attempt {self.report.attempts}, and found: {named}"
            )
            return
        kind = (
            "all" if fault.kind in ("flip", "cut") and not self._steps() else fault.kind
        )  # nothing is there yet to be damaged
        what = f"{fault.moment or kind} of rank {fault.rank} of {fault.world}, attempt {self.report.attempts}"
        self.report.met.append(Met(kind, what, killed))
        if any(codes) or stopped:
            self.awaiting = self.report.met[-1], _when(met) if met.exists() else hurt_at
        if kind == "tail":
            self._tear_tail(fault)
        elif kind in kinds.DAMAGE:
            self._damage(fault, checkpoint.path_of(self.run_dir / "checkpoints", self._steps()[-1]))

    def _steps(self) -> list[int]:
        return checkpoint.steps(self.run_dir / "checkpoints")

    def _damage(self, fault: Fault, latest: Path) -> None:
        """Damage the latest checkpoint between two attempts: flip a bit, or cut a part short."""
        files = sorted(latest.iterdir())
        file = files[int(fault.place * 997) % len(files)]
        data = bytearray(file.read_bytes())
        at = int(fault.place * len(data))
        if fault.kind == "flip":
            data[at] ^= 1 << int(fault.place * 8191) % 8
        file.write_bytes(data if fault.kind == "flip" else data[:at])
        if checkpoint.latest_valid(self.run_dir / "checkpoints", lambda message: None) == latest:
            self.report.problems.append(f"a damaged {file.name} was not noticed")

    def _tear_tail(self, fault: Fault) -> None:
        """What comes after the latest checkpoint may be lost; what comes before it was on its way to the disk with it."""
        file = RunFolder(self.run_dir).journal_file
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        if lines and json.loads(lines[-1])["step"] > max(self._steps(), default=-1):
            last = lines.pop()
            torn = last[: int(fault.place * len(last))]
        else:
            torn = b'{"step": 41, "timestamp": 17640'
        file.write_bytes(b"".join(line + b"\n" for line in lines) + torn)

    # ---- the whole ----
    def run(
        self, rng: random.Random, faults: int, only: tuple[str, ...] = tuple(kinds.KINDS)
    ) -> Report:
        """Start attempts until the run is done, the first ones with faults. Some come too late."""
        plan: list[Fault] = []
        while len(plan) < faults:
            plan += kinds.draw(rng, only)
        try:
            for fault in map(self._possible, plan[:faults]):
                done = self.attempt(fault.world, fault)
                self._send(rng.random() < 0.5)
                if done:
                    break
            else:
                done = False
            for _ in range(3):
                done = done or self.attempt(rng.choice(kinds.WORLDS), None)
            if not done:
                self.report.problems.append("the run did not end without faults")
        except Exception as error:
            self.report.problems.append(f"{error.__class__.__name__}: {error}")
        return self.report

    def _possible(self, fault: Fault) -> Fault:
        """Where no checkpoint is there yet, there is none to die over."""
        if fault.moment not in kinds.RESTORE or self._steps():
            return fault
        return replace(
            fault,
            kind=fault.kind if fault.kind == "again" else "step",
            moment="before optimizer",
            nth=6,
        )

    def compare(self, golden: dict[str, Any]) -> None:
        """Add to the report what differs from the undisturbed run."""
        mine = outcome(self.run_dir)
        self.report.problems += [
            f"{key} differs from the golden run's" for key in golden if mine.get(key) != golden[key]
        ]
        if self.tracked:
            self._send(True)
            self.report.problems += self._compare_history(golden["curve"])

    def _send(self, now: bool) -> None:
        if self.tracked and now:
            from orchestrator.track.mlflow import resend_metrics

            if not resend_metrics(
                RunFolder(self.run_dir), f"sqlite:///{self.tracked}", "faults", 60
            ):
                self.report.problems.append("MLflow did not take everything")

    def _compare_history(self, curve: list[dict[str, Any]]) -> list[str]:
        wanted = sorted((k, r["step"], v) for r in curve for k, v in r.items() if k != "step")
        run_id = json.loads((self.run_dir / "tracking.json").read_text())["run_id"]
        with contextlib.closing(sqlite3.connect(self.tracked)) as db:
            rows = db.execute(
                "SELECT key, step, value FROM metrics WHERE run_uuid = ?", (run_id,)
            ).fetchall()
        if sorted(r for r in rows if metrics.of(r[0]).exact) != wanted:
            return ["MLflow's history differs from the golden run's"]
        return []


def _when(note: Path) -> float:
    return json.loads(note.read_text().splitlines()[0])["at"]
