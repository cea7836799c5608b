"""Restores the journal of a run from the copy that each checkpoint has.

Steps up to a checkpoint are not trained again by a resume. Lines of these steps that were lost or
changed between two attempts are therefore taken from the checkpoint.
"""

import uuid

from orchestrator import lines
from orchestrator.checkpoint.format import verify
from orchestrator.files import write_atomically
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import parse


def restore(folder: RunFolder, step: int) -> str | None:
    """Make the journal complete up to a checkpoint. Return and note what was wrong, if anything.

    The journal as it was is kept beside the new one. Only for the writer of the run.

    Args:
        folder: Folder of the run.
        step: Step of a checkpoint. One of an earlier version has no copy: then only lines that
            cannot be read, or are there twice, are removed.

    Raises:
        UserError: The checkpoint is damaged, and it is needed.
    """
    checkpoint = RunFolder(folder.checkpoint(step))
    found = lines.read(folder.journal_file)
    if checkpoint.journal_file.exists():
        wanted = lines.read(checkpoint.journal_file)
        if _continues(folder, found, wanted, step):
            return None
        verify(checkpoint.path)
        lost = [line for line in wanted if line not in found]
        steps = ", ".join(str(_step(line)) for line in lost) or "none"
        what = f"missing or changed lines: steps {steps}; restored from {checkpoint.path}"
    else:
        wanted = _readable(found)
        if wanted == found:
            return None
        count = len(found) - len(wanted)
        what = f"{count} line(s) could not be read or were repeated, and are lost"
    if folder.journal_file.exists():
        damaged = folder.path / f"metrics.damaged-{uuid.uuid4().hex[:8]}.jsonl"
        write_atomically(damaged, _text(found), durable=True)
        what += f"; {damaged.name} has the file as it was"
    write_atomically(folder.journal_file, _text(wanted), durable=True)
    message = f"{folder.journal_file}: {what}"
    events.note(folder, "journal_damaged", message, step=step)
    return message


def _continues(folder: RunFolder, found: list[bytes], copy: list[bytes], step: int) -> bool:
    """Return whether a journal begins with its copy in the checkpoint of `step`.

    The line of `step` itself may have fewer or more metrics if the last step of the run changed;
    see `train.due`. It is then in an aside as it was, or some of its values are in the journal.
    """
    before = [line for line in copy if _step(line) < step]
    own = copy[len(before) :]
    rest = found[len(before) :]
    if found[: len(before)] != before or _readable(rest) != rest:
        return False
    if rest and _step(rest[0]) < step:
        return False
    if not own:
        return True
    was_moved = any(own[0] in lines.read(aside.path) for aside in journal.asides(folder))
    if not rest or _step(rest[0]) != step:
        return was_moved
    stored, now = parse(own[0]) or {}, parse(rest[0]) or {}
    common = (now.keys() & stored.keys()) - ({"timestamp"} if was_moved else set())
    return all(repr(now[key]) == repr(stored[key]) for key in common)


def _readable(found: list[bytes]) -> list[bytes]:
    """Return the lines that can be read and have a larger step than those before."""
    kept: list[bytes] = []
    last = -1
    for line in found:
        if parse(line) is not None and _step(line) > last:
            kept.append(line)
            last = _step(line)
    return kept


def _step(line: bytes) -> int:
    parsed = parse(line)
    return -1 if parsed is None else int(parsed["step"])


def _text(found: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in found)
