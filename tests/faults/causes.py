"""Kinds of faults around a command: processes, data, the system. The table is `cause_table.py`.

A cause acts before the command (it damages files), in it (it sends a signal, or lets a call fail),
or both. It says which ending is right; `command_case.py` checks that, and the result at the end.
"""

import os
import random
import shutil
import signal
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from orchestrator.checkpoint import store
from orchestrator.runs.folder import RunFolder, SweepFolder
from tests.faults import kinds

if TYPE_CHECKING:
    from tests.faults.command import Command
    from tests.faults.command_case import CommandCase


@dataclass(frozen=True)
class Cause:
    """A kind of fault. The base class does nothing.

    Attributes:
        title: Name in the table.
        verbs: Commands that it fits.
        statuses: Further right statuses, besides 0 and 75. With 2, the user has to do something
            first: `undo` does it.
        ends: The command ends early.
        tracked: It needs a tracking store.
        lasts: It changes files, which may show only at a later start of the command.
    """

    lasts: ClassVar[bool] = False

    title: str
    verbs: tuple[str, ...] = ("train", "sweep")
    statuses: tuple[int, ...] = ()
    ends: bool = False
    tracked: bool = False

    def before(self, case: "CommandCase", rng: random.Random) -> bool:
        """Act before the command. Return False if the fault is not possible now."""
        return True

    def job(self, case: "CommandCase", rng: random.Random) -> dict[str, Any]:
        """Return facts for `command.work`."""
        return {}

    def during(self, case: "CommandCase", command: "Command", rng: random.Random) -> bool:
        """Act while the command runs. Return whether the fault happened."""
        return True

    def after(self, case: "CommandCase") -> None:
        """Act after the command has ended, or check what it left."""

    def undo(self, case: "CommandCase") -> None:
        """Remove the cause of the fault, as the error message tells the user to do.

        `CommandCase` itself restores the files that a cause has changed or moved.
        """


def latest_checkpoint(folder: SweepFolder) -> list[Path]:
    """Return the files of the latest checkpoint of a run, or of each stage of a sweep."""
    found: list[Path] = []
    for place in (folder, *folder.stages()):
        for step in place.checkpoint_steps()[-1:]:
            found += place.checkpoint(step).iterdir()
    return found


# ---- data ----


@dataclass(frozen=True)
class OtherTokens(Cause):
    """A shard is changed in place: before the command, or while it reads the file."""

    lasts = True
    in_run: bool = False

    def _change(self, case: "CommandCase") -> None:
        for file in sorted(case.data_dir.glob("train-*.parquet")):
            middle = file.stat().st_size // 4
            with case.changing(file), open(file, "r+b") as opened:
                opened.seek(middle)
                opened.write(b"\x01\x00" * (middle // 2))

    def before(self, case: "CommandCase", rng: random.Random) -> bool:
        if not self.in_run:
            self._change(case)
        return True

    def during(self, case: "CommandCase", command: "Command", rng: random.Random) -> bool:
        if not self.in_run:
            return True
        if not case.wait_for_first_step(command):
            return False
        self._change(case)
        return command.process.exitcode is None


@dataclass(frozen=True)
class OtherCorpus(Cause):
    """The corpus has another text of the same size; `old`: and an older time."""

    lasts = True
    old: bool = False

    def before(self, case: "CommandCase", rng: random.Random) -> bool:
        found = case.corpus.stat()
        with case.changing(case.corpus):
            case.corpus.write_bytes(case.corpus.read_bytes().swapcase())
        past = found.st_mtime_ns - 10**12
        if self.old:
            os.utime(case.corpus, ns=(past, past))
        return True


@dataclass(frozen=True)
class Touched(Cause):
    """Files get another time, as a copy or a restore gives them; their content stays."""

    def before(self, case: "CommandCase", rng: random.Random) -> bool:
        for file in [case.corpus, *case.data_dir.iterdir()]:
            os.utime(file)
        return True


# ---- signals, streams, environment ----


@dataclass(frozen=True)
class Signal(Cause):
    """The command gets a signal while its workers train."""

    number: int = signal.SIGTERM

    def during(self, case: "CommandCase", command: "Command", rng: random.Random) -> bool:
        if not case.wait_for_first_step(command):
            return False
        time.sleep(rng.uniform(0.0, 0.4))
        command.kill(self.number)
        return command.process.exitcode is None


@dataclass(frozen=True)
class Early(Cause):
    """The command gets a signal before its workers train."""

    number: int = signal.SIGKILL

    def during(self, case: "CommandCase", command: "Command", rng: random.Random) -> bool:
        time.sleep(rng.uniform(0.0, 0.3))
        command.kill(self.number)
        return command.process.exitcode is None


@dataclass(frozen=True)
class Facts(Cause):
    """The command has other facts, such as a closed stream or another environment."""

    facts: dict[str, Any] = field(default_factory=dict)

    def job(self, case: "CommandCase", rng: random.Random) -> dict[str, Any]:
        return self.facts


@dataclass(frozen=True)
class InRank(Cause):
    """A fault in the workers: a kill at a moment of the code, or an error of the system.

    Attributes:
        kind: A kind of `kinds.KINDS`, or a name of `hooks.ERRORS`.
        codes: Numbers of the error; one is drawn.
        nth: Bounds of the number of calls.
        stays: Every start of the workers has it.
        everywhere: All ranks have it, and the driver.
    """

    kind: str = "step"
    codes: tuple[int, ...] = (0,)
    nth: tuple[int, int] = (1, 1)
    stays: bool = False
    everywhere: bool = False

    def before(self, case: "CommandCase", rng: random.Random) -> bool:
        # An error at reading checkpoints needs one.
        return self.kind not in ("unreadable", "other bits") or bool(latest_checkpoint(case.folder))

    def job(self, case: "CommandCase", rng: random.Random) -> dict[str, Any]:
        if self.kind in kinds.SELF:
            [drawn] = kinds.draw(rng, (self.kind,))
            found = vars(drawn) | {"rank": drawn.rank % case.world}
        else:
            found = {"kind": self.kind, "rank": 0, "moment": "", "nth": rng.randint(*self.nth)}
        found |= {"code": rng.choice(self.codes), "place": rng.random()}
        return {"faults": [found | {"stays": self.stays, "everywhere": self.everywhere}]}


@dataclass(frozen=True)
class Power(Signal):
    """The machine loses its power: what was not forced to disk is gone.

    Only journals and checkpoints are cut. A committed checkpoint must still be valid.
    """

    def job(self, case: "CommandCase", rng: random.Random) -> dict[str, Any]:
        (case.path / "synced").write_text("")
        facts = {"kind": "synced", "rank": 0, "nth": 0, "file": str(case.path / "synced")}
        return {"faults": [facts | {"stays": True, "everywhere": True}]}

    def after(self, case: "CommandCase") -> None:
        log = case.path / "synced"
        synced = {}
        for line in log.read_text().splitlines():
            inode, size = map(int, line.split())
            synced[inode] = size
        for place in (case.folder, *case.folder.stages()):
            steps = [  # earlier ones may be damaged
                step
                for step in place.checkpoint_steps()
                if place.checkpoint(step).stat().st_mtime >= case.started_at
            ]
            for file in [place.journal_file, *place.checkpoints.rglob("*")]:
                found = file.stat() if file.is_file() else None
                if found is None or found.st_mtime < case.started_at:
                    continue
                if synced.get(found.st_ino, 0) < found.st_size:
                    os.truncate(file, synced.get(found.st_ino, 0))
            if steps:
                latest = store.latest_valid(place.checkpoints, lambda message: None)
                if latest != place.checkpoint(steps[-1]) and "checkpoint" not in case.names:
                    case.problem("loss", f"{place.name}: step {steps[-1]} was not on disk")


# ---- the folder, the tracking store ----


@dataclass(frozen=True)
class Moved(Cause):
    """The folder of a running run is moved away, or removed."""

    removed: bool = False

    def during(self, case: "CommandCase", command: "Command", rng: random.Random) -> bool:
        if not case.wait_for_first_step(command):
            return False
        time.sleep(rng.uniform(0.0, 0.2))
        if (case.path / "away").exists():
            return False  # by the other fault of this start
        os.rename(case.folder.path, case.path / "away")
        if self.removed:
            shutil.rmtree(case.path / "away", ignore_errors=True)
            (case.path / "away").mkdir(exist_ok=True)
        return True  # also if the command was killed: its workers may go on

    def after(self, case: "CommandCase") -> None:
        """Put the folder back, also after a kill: the user knows that it was moved."""
        away = case.path / "away"
        if not away.exists():
            return
        if case.folder.path.exists():
            case.problem("loss", "a folder was begun in the place of the one that was moved")
            shutil.rmtree(case.folder.path)
        if self.removed:
            shutil.rmtree(away)
            case.forget_changes()
        else:
            os.rename(away, case.folder.path)


@dataclass(frozen=True)
class Store(Cause):
    """The tracking store is another one between two commands: see `change`."""

    change: str = "lost"

    def before(self, case: "CommandCase", rng: random.Random) -> bool:
        database = case.database
        backup = case.path / "backup.db"
        if not database.exists() or not RunFolder(case.folder).tracking_file.exists():
            return False
        if self.change == "lost":
            shutil.copyfile(case.empty_database, database)
        elif self.change == "restored":
            if not backup.exists():
                return False
            shutil.copyfile(backup, database)
        else:
            with closing(sqlite3.connect(database)) as db, db:
                db.execute("UPDATE runs SET lifecycle_stage = 'deleted'")
        return True
