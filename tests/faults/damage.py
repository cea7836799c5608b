"""Damages the files of a run or a sweep between two attempts."""

import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.checkpoint import store as checkpoint
from orchestrator.files import read_json
from orchestrator.runs.folder import RunFolder, SweepFolder
from tests.faults.causes import Cause
from tests.faults.kinds import Fault

if TYPE_CHECKING:
    from tests.faults.command_case import CommandCase


def damage_checkpoint(folder: RunFolder, fault: Fault) -> str | None:
    """Flip a bit in the latest checkpoint, or cut the end of one of its files.

    Returns:
        The problem if the damage is not noticed, else None.
    """
    latest = folder.checkpoint(folder.checkpoint_steps()[-1])
    files = sorted(latest.iterdir())
    file = files[int(fault.place * 997) % len(files)]
    content = bytearray(file.read_bytes())
    position = int(fault.place * len(content))
    if fault.kind == "flip":
        content[position] ^= 1 << int(fault.place * 8191) % 8
    else:
        content = content[:position]
    file.write_bytes(content)
    if checkpoint.latest_valid(folder.checkpoints, lambda message: None) == latest:
        return f"a damaged {file.name} was not noticed"
    return None


def tear_journal(folder: RunFolder, fault: Fault) -> None:
    """Leave half a line at the end of the journal.

    Only a line that no fsync has forced to disk is shortened: one after the latest checkpoint, and
    after the last line that was sent to MLflow. Without such a line, half of a new line is
    appended.
    """
    file: Path = folder.journal_file
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    sent = read_json(folder.tracking_file) or {"sent_step": -1}
    last_synced = max([*folder.checkpoint_steps(), sent["sent_step"]], default=-1)
    if lines and json.loads(lines[-1])["step"] > last_synced:
        last = lines.pop()
        torn = last[: int(fault.place * len(last))]
    else:
        torn = b'{"step": 41, "timestamp": 17640'
    file.write_bytes(b"".join(line + b"\n" for line in lines) + torn)


# ---- between two commands ----


def emptied(content: bytes, rng: random.Random) -> bytes:
    return b""


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def zeroed(content: bytes, rng: random.Random) -> bytes:
    return bytes(len(content))


def doubled(content: bytes, rng: random.Random) -> bytes:
    return content + content


def with_garbage(content: bytes, rng: random.Random) -> bytes:
    lines = content.splitlines(keepends=True)
    lines.insert(rng.randrange(len(lines) + 1), b'\x00{"step": garbage\n')
    return b"".join(lines)


def with_other_numbers(content: bytes, rng: random.Random) -> bytes:
    """Change one digit after a decimal point: the file stays valid JSON."""
    places = [i for i in range(2, len(content)) if content[i - 1 : i] == b"." and i < len(content)]
    if not places:
        return content + b" "
    place = rng.choice(places)
    digit = b"1" if content[place : place + 1] != b"1" else b"2"
    return content[:place] + digit + content[place + 1 :]


Change = Callable[[bytes, random.Random], bytes]
ANY: tuple[Change, ...] = (emptied, cut, zeroed, doubled)


@dataclass(frozen=True)
class Damage(Cause):
    """A file is changed between two commands.

    Attributes:
        files: Returns the candidates in the folder of the run or sweep.
        changes: One of them is made.
    """

    lasts = True
    files: Callable[[SweepFolder], list[Path]] = lambda folder: []
    changes: tuple[Change, ...] = ANY

    def before(self, case: "CommandCase", rng: random.Random) -> bool:
        found = [f for f in self.files(case.folder) if f.is_file() and f.stat().st_size > 1]
        if not found:
            return False
        file = rng.choice(sorted(found))
        with case.changing(file):
            file.write_bytes(rng.choice(self.changes)(file.read_bytes(), rng))
        return True


@dataclass(frozen=True)
class Removal(Damage):
    """A file or folder is removed between two commands."""

    def before(self, case: "CommandCase", rng: random.Random) -> bool:
        found = [path for path in self.files(case.folder) if path.exists()]
        if not found:
            return False
        path = rng.choice(sorted(found))
        kept = case.path / f"removed-{case.report.attempts}-{len(case.moved)}"
        os.rename(path, kept)
        case.moved.append((kept, path))
        return True


@dataclass(frozen=True)
class AllCheckpoints(Damage):
    """Every checkpoint of a run has a changed byte."""

    def before(self, case: "CommandCase", rng: random.Random) -> bool:
        files = [
            min(case.folder.checkpoint(step).glob("model*.safetensors"))
            for step in case.folder.checkpoint_steps()
        ]
        for file in files:
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return bool(files)

    def undo(self, case: "CommandCase") -> None:
        """Ask for a new start, as the message says."""
        case.words.append("train.restart=true")
