"""Hangs: ends a stuck rank, keeps the thread stacks of all ranks, and names the rank that hung."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from orchestrator import files, folders
from orchestrator.cluster import calls
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import marks
from orchestrator.workers.marks import WAITING, Mark

PY_SPY_S = 10
FAR_S = 20.0  # for another machine to start a process and run py-spy


def stopped(seen: Collection[Mark]) -> set[int]:
    """Return the ranks of this machine whose processes are stopped."""
    return {m.rank for m in seen if m.is_local() and m.process_status() == "stopped"}


def stopped_far(seen: Collection[Mark]) -> set[int]:
    """Return the ranks of other machines whose processes are stopped, by Ray."""
    nodes = {mark.node for mark in seen if mark.host != socket.gethostname()}
    return set().union(*calls.on_nodes(nodes, FAR_S, stopped, seen).values())


def end_stuck(folder: RunFolder, stuck: Collection[Mark]) -> None:
    """Store the stacks of stuck processes, and kill them.

    On another machine, Ray starts a process that does it. A stopped process cannot end itself.
    """
    here = [mark for mark in stuck if mark.host == socket.gethostname()]
    far = [mark for mark in stuck if mark not in here]
    _end_stuck_here(folder, here)
    calls.on_nodes({mark.node for mark in far}, FAR_S, _end_stuck_here, folder, far)


def _end_stuck_here(folder: RunFolder, stuck: Collection[Mark]) -> None:
    for mark in stuck:
        if mark.is_local():
            _end(folder, mark)


def _end(folder: RunFolder, mark: Mark) -> None:
    """Store the stacks of a process, and kill it. Only SIGKILL ends a stopped process."""
    status = mark.process_status()
    if status == "stopped":
        # The other ranks wait for it, whatever phase it was in.
        marks.note_stopped(folder, mark)
    file = folder.hang_file(mark.rank)
    if file.exists() and file.stat().st_size == 0:
        where = f"process {mark.pid} is {status} in {mark.phase} of step {mark.step + 1}"
        files.rewrite(file, f"{where}\n{_stacks(mark.pid)}")
    with contextlib.suppress(ProcessLookupError):
        os.kill(mark.pid, signal.SIGKILL)


def has_hung(folder: RunFolder) -> bool:
    """Return whether a hang ended the last attempt and is not reported yet."""
    return len(_stack_files(folder)) > 0


def report(folder: RunFolder) -> str | None:
    """Note the hang that ended the last attempt as an event, and move the stacks to `hangs/`.

    Removes the marks of the ranks. Call it while no worker runs.

    Returns:
        Which rank hung, and where; None if no rank did.
    """
    message = None
    stacks = _stack_files(folder)
    if stacks:
        seen = marks.read(folder)
        message = f"{verdict(seen)}; {_move(folder, stacks)}"
        events.note(folder, "hang", message, marks=[asdict(mark) for mark in seen])
    with contextlib.suppress(OSError):  # the file system may have become read-only
        for file in folder.hang_files():
            file.unlink(missing_ok=True)
        marks.remove(folder)
    return message


def _stack_files(folder: RunFolder) -> list[Path]:
    return [file for file in folder.hang_files() if file.stat().st_size > 0]


def _move(folder: RunFolder, stacks: list[Path]) -> str:
    target = folder.new_hang_folder()
    try:
        folders.make_folder(target)
        for file in stacks:
            shutil.move(file, target / file.name)
    except OSError as error:  # the verdict is worth more than the stacks
        return f"the stacks are lost ({error.strerror})"
    return f"the stacks are in {target}"


def verdict(seen: list[Mark]) -> str:
    """Name the stopped ranks.

    If there are none, name those at the lowest step that did not wait for others.
    """
    behind = [mark for mark in seen if mark.is_stopped]
    if not behind:
        stuck = [mark for mark in seen if mark.phase not in WAITING]
        step = min((mark.step for mark in stuck), default=0)
        behind = [mark for mark in stuck if mark.step == step]
    if not behind:
        return "every worker waited for the others: the network between them may be broken"
    return "; ".join(map(_describe, behind))


def _describe(mark: Mark) -> str:
    text = (
        f"rank {mark.rank} (process {mark.pid} on {mark.host}) hung in {mark.phase} of step "
        f"{mark.step + 1}"
    )
    if mark.is_stopped:
        return text
    return f"{text}, longer than {mark.limit:.0f} s"


def _stacks(pid: int) -> str:
    """Return the Python stacks of another process, if py-spy is installed and allowed."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    tool = shutil.which("py-spy", path=folders)
    if tool is None:
        return "no stacks: py-spy is not installed on this machine\n"
    command = [tool, "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PY_SPY_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"py-spy: {error}\n"
    return done.stdout or f"py-spy: {done.stderr}"
