"""Damages the files of a run between two attempts."""

import json
from pathlib import Path

from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs.folder import RunFolder
from tests.faults.kinds import Fault


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

    Only a line after the latest checkpoint is shortened: earlier lines were forced to disk before
    that checkpoint was committed. Without such a line, half of a new line is appended.
    """
    file: Path = folder.journal_file
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    last_saved = max(folder.checkpoint_steps(), default=-1)
    if lines and json.loads(lines[-1])["step"] > last_saved:
        last = lines.pop()
        torn = last[: int(fault.place * len(last))]
    else:
        torn = b'{"step": 41, "timestamp": 17640'
    file.write_bytes(b"".join(line + b"\n" for line in lines) + torn)
