"""One run or sweep with faults around its command, which is started again until it is done.

Read `CommandCase.run` first. A user does nothing else than to start the same command again; only
after status 2, `Cause.undo` does what the message says.
"""

import contextlib
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.runs.folder import SweepFolder
from tests.faults.cause_table import CAUSES
from tests.faults.causes import Cause
from tests.faults.command import Command, Ended
from tests.faults.outcome import Outcome, is_in_mlflow, outcome
from tests.faults.rank import RankStarter
from tests.faults.report import FaultRecord, Report
from tests.helpers.tiny import TINY

SECONDS = 90.0  # for one command
PAIRS = 0.2  # share of the starts that have two faults
WORLDS = (1, 2, 4)
SMALL = [
    "name=tiny",
    *TINY,
    "train.eval_interval=6",
    "train.eval_tokens=400",
    "train.checkpoint_interval=4",
    "train.keep=3",
    "train.log_interval=3",
    "schedule.max_lr=1e-2",
    "schedule.warmup_steps=5",
    "compute.use_gpu=false",
    "tracking.experiment=faults",
]
WORDS = {
    "train": ["train.max_steps=40"],
    "sweep": [
        "schedule.kind=wsd",
        "train.max_steps=20",
        "sweep.trials.linear.train.max_steps=20",
        "sweep.trials.cosine.schedule.decay_shape=cosine",
        "sweep.trials.long.train.max_steps=26",
    ],
}


class CommandCase:
    """A run or a sweep in its own storage, with its own copy of corpus and tokens.

    Args:
        starter: Forks the commands.
        path: Folder of the case.
        source: Folder with `corpus.txt`, `tokens/` and `empty.db`.
        verb: "train" or "sweep".
        tracked: Whether MLflow is used, and compared at the end.
        breaks: Name of a way to break the product; see `breaks.py`.
    """

    def __init__(
        self,
        starter: RankStarter,
        path: Path,
        source: Path,
        verb: str,
        tracked: bool = False,
        breaks: str | None = None,
    ) -> None:
        self.starter = starter
        self.path = path
        self.verb = verb
        self.tracked = tracked
        self.breaks = breaks
        path.mkdir()
        self.corpus = path / "corpus.txt"
        self.data_dir = path / "tokens"
        self.database = path / "mlflow.db"
        self.empty_database = source / "empty.db"
        shutil.copy2(source / "corpus.txt", self.corpus)
        shutil.copytree(source / "tokens", self.data_dir)
        if tracked:
            shutil.copyfile(self.empty_database, self.database)
        self.folder = SweepFolder(path / "runs" / "tiny")
        self.words = [
            *SMALL,
            *WORDS[verb],
            f"storage={path / 'runs'}",
            f"data.corpus={self.corpus}",
            f"data.dir={self.data_dir}",
            f"tracking.uri=sqlite:///{self.database}",
        ]
        self.report = Report(path.name)
        self.world = 1
        # What was not undone yet: files with their content before and after a change, paths that
        # were moved, and the causes, which may show only at a later start.
        self.kept: list[tuple[Path, bytes, bytes]] = []
        self.moved: list[tuple[Path, Path]] = []
        self.lasting: list[Cause] = []
        self.names: list[str] = []  # of the faults of the current start
        self.started_at = 0.0  # when it began
        self.texts = ""  # all that the commands have printed

    # ---- starts of the command ----

    def run(self, rng: random.Random, starts: int, only: tuple[str, ...]) -> Report:
        """Start the command until it is done, the first times with faults."""
        fitting = [name for name in only if self._fits(CAUSES[name])]
        try:
            for _ in range(starts):
                count = 2 if rng.random() < PAIRS else 1
                names = rng.sample(fitting, min(count, len(fitting)))
                self._start(rng, names)
                if self.tracked and rng.random() < 0.3:
                    shutil.copyfile(self.database, self.path / "backup.db")
            if not self.finish(rng):
                self.problem("manual", "the same command does not end the run")
        except Exception as error:
            self.problem("harness", f"{type(error).__name__}: {error}")
        return self.report

    def finish(self, rng: random.Random) -> bool:
        """Start the command without faults until it is done. Return whether it is."""
        for _ in range(4):
            self.world = rng.choice(WORLDS)
            ended = self._command({}).wait(SECONDS)
            if ended is not None and ended.status == 0:
                return True
            self._check(ended, [])
        return False

    def _fits(self, cause: Cause) -> bool:
        return self.verb in cause.verbs and (self.tracked or not cause.tracked)

    def _start(self, rng: random.Random, names: list[str]) -> None:
        """Start the command once with some faults; without one that ends it, also end it."""
        self.world = rng.choice(WORLDS)
        self.names = names
        possible = [name for name in names if CAUSES[name].before(self, rng)]
        self.started_at = time.time()
        causes = [CAUSES[name] for name in possible]
        facts: dict[str, Any] = {"faults": []}
        for cause in causes:
            more = cause.job(self, rng)
            facts["faults"] += more.pop("faults", [])
            facts |= more
        # A run that is done has nothing to resume: most of the starts end early.
        if not any(cause.ends for cause in causes) and rng.random() < 0.7:
            causes.append(CAUSES[rng.choice(["driver-kill", "driver-term"])])
        command = self._command(facts)
        happened = [cause.during(self, command, rng) for cause in causes]
        ended = command.wait(SECONDS)
        for cause in causes:
            cause.after(self)
        for name, did in zip(possible, happened, strict=False):
            text = f"{name} in start {self.report.attempts} of {self.verb}, {self.world} workers"
            if did:
                self.report.happened.append(FaultRecord(name, text, pair=len(possible) > 1))
        self._check(ended, causes)

    def _command(self, facts: dict[str, Any]) -> Command:
        self.report.attempts += 1
        path = self.path / f"start-{self.report.attempts}"
        more = {"world": self.world, "tracked": self.tracked, "breaks": self.breaks}
        words = [*self.words, f"compute.num_workers={self.world}"]
        return Command(self.starter, self.verb, words, path, **more, **facts)

    def wait_for_first_step(self, command: Command) -> bool:
        """Return False if the command ends before its workers make a step."""
        deadline = time.monotonic() + SECONDS
        while not command.first_step.exists():
            if command.process.exitcode is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    # ---- what must be true ----

    def _check(self, ended: Ended | None, causes: list[Cause]) -> None:
        """Report a wrong ending of a command. After a right status 2, act as the user."""
        start = self.report.attempts
        causes = [*self.lasting, *causes]
        if ended is None:
            self.problem("status", f"start {start} did not end within {SECONDS:.0f} s")
            return
        self.texts += ended.out + ended.err
        if ended.has_traceback:
            last = (ended.lines or ended.out.splitlines())[-1]
            self.problem("traceback", f"start {start}: {last[:200]}")
        right = {0, 75}.union(*(cause.statuses for cause in causes))
        if ended.status not in right:
            reason = ended.lines[-1][:200] if ended.lines else "no line"
            category = "manual" if ended.status == 2 else "status"
            self.problem(category, f"start {start} ended with {ended.status}: {reason}")
        # A sweep names the reasons of its stages in its table, on stdout.
        silent = ended.status in (1, 2) and not ended.lines and self.verb == "train"
        if silent and not any("closed" in cause.job(self, random) for cause in causes):
            self.problem("status", f"start {start} ended with {ended.status} and no line")
        if ended.status in (1, 2):
            for cause in causes:
                cause.undo(self)
            self._restore_files()
        else:
            self.lasting = [cause for cause in causes if cause.lasts]

    # ---- files that were changed ----

    @contextlib.contextmanager
    def changing(self, file: Path) -> Iterator[None]:
        """Remember the content of a file before and after the `with` block."""
        before = file.read_bytes()
        yield
        self.kept.append((file, before, file.read_bytes()))

    def forget_changes(self) -> None:
        """Forget what was changed: it cannot be undone, or it was undone."""
        self.kept.clear()
        self.moved.clear()
        self.lasting.clear()

    def _restore_files(self) -> None:
        """Restore what was changed, the newest change first, and what no command wrote since."""
        for file, before, after in reversed(self.kept):
            if file.exists() and file.read_bytes() == after:
                file.write_bytes(before)
        for kept, path in reversed(self.moved):
            if not path.exists() and path.parent.is_dir():
                os.rename(kept, path)
        self.forget_changes()

    # ---- the result ----

    def problem(self, category: str, text: str) -> None:
        """Record a problem; see `report.CATEGORIES`."""
        self.report.problems.append(f"{category}: {text}")

    def outcomes(self) -> dict[str, Outcome]:
        """Return the outcome of the run, or of every trial of the sweep."""
        if self.verb == "train":
            return {"run": outcome(self.folder.path)}
        return {trial.name: outcome(trial.path) for trial in self.folder.trials()}

    def compare(self, golden: dict[str, Outcome]) -> None:
        """Report what differs from the run without faults."""
        if any(problem.startswith("harness") for problem in self.report.problems):
            return
        mine = self.outcomes()
        for name, expected in golden.items():
            found = mine.get(name, {})
            if any(found.get(key) != expected[key] for key in expected if key != "curve"):
                self.problem("bits", f"{name} has other weights, moments or state")
            self._compare_curves(name, found.get("curve", []), expected["curve"])
        if self.tracked:
            curve = [json.loads(json.dumps(line)) for line in golden["run"]["curve"]]
            if not is_in_mlflow(str(self.database), self.folder.path, curve):
                self.problem("loss", "MLflow's history differs from the golden run's")

    def _compare_curves(
        self, name: str, found: list[dict[str, Any]], expected: list[dict[str, Any]]
    ) -> None:
        steps = [line["step"] for line in found]
        missing = [line["step"] for line in expected if line["step"] not in steps]
        wrong = [line["step"] for line in found if line not in expected]
        if wrong or len(set(steps)) < len(steps):
            self.problem("bits", f"{name}: the curve has other or repeated lines at {wrong}")
        if missing and "lost" not in self.texts:
            self.problem("loss", f"{name}: the lines of the steps {missing} are lost")
