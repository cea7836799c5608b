"""Wraps functions of the product, so that the process of a rank kills itself at a drawn moment.

The product itself has no hooks. A process that sends SIGKILL to itself ends as suddenly as one that
is killed from outside.
"""

import errno
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint import store as checkpoint
from orchestrator.checkpoint import tensor_file
from orchestrator.runs import journal
from orchestrator.runs.journal import Journal
from orchestrator.train import begin, evaluate
from orchestrator.train.evaluate import Evaluator
from orchestrator.train.gradients import Gradients
from orchestrator.train.ranks import reading
from orchestrator.train.step import Step

# Name of a point: owner and name of the function.
POINTS = {
    "forward": (Step, "_forward_backward"),
    "backward": (torch.Tensor, "backward"),
    "clip": (Gradients, "clip"),
    # Not `AdamW.step`: `optim.adamw` would call it wrapped, and import torch's compiler.
    "optimizer": (torch.amp.GradScaler, "step"),
    "all_to_all": (dist, "all_to_all_single"),
    "all_gather": (dist, "all_gather_into_tensor"),
    "line": (Journal, "write"),
    "copy": (tensor_file, "fill"),
    "commit": (checkpoint, "write"),
    "prune": (checkpoint, "prune"),
    "batch": (evaluate, "agree"),
    "sample": (Evaluator, "_write_sample"),
    "verify": (reading, "read_parts"),
    "restore": (begin, "restore"),
    "rewind": (Journal, "rewind"),
    "rewrite": (journal, "write_atomically"),
    "mkdir": (os, "mkdir"),
    "write": (os, "write"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "rmdir": (os, "rmdir"),
    "unlink": (os, "unlink"),
}
WRITER = "checkpoint"  # calls of `os` count only in threads with this prefix


def install(moment: str, nth: int, note: Callable[[str], None], end: int = signal.SIGKILL) -> None:
    """Let this process kill itself at a moment.

    Args:
        moment: For example "before fsync".
        nth: The occurrence of the moment, from 1.
        note: Called with the moment just before the end.
        end: The signal: SIGKILL, or SIGSTOP to stop the process.
    """
    when, name = moment.split()
    left = nth
    lock = threading.Lock()

    def is_now() -> bool:
        nonlocal left
        with lock:
            left -= 1
            return left == 0

    def die() -> None:
        note(moment)
        os.kill(os.getpid(), end)
        time.sleep(60)

    owner, attribute = POINTS[name]
    original = getattr(owner, attribute)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if owner is os and not threading.current_thread().name.startswith(WRITER):
            return original(*args, **kwargs)
        if when in ("before", "torn") and is_now():
            if when == "torn":
                TORN[name](*args)
            die()
        result = original(*args, **kwargs)
        if when == "after" and is_now():
            die()
        return result

    setattr(owner, attribute, wrapped)


write = os.write  # the original: the functions of this module replace `os.write`


def _write_half_a_line(writer: Journal, record: dict[str, Any]) -> None:
    line = json.dumps(record).encode()
    with open(writer.file, "ab", buffering=0) as file:
        file.write(line[: len(line) // 2])


def _write_half(fd: int, data: Any) -> None:
    write(fd, data[: len(data) // 2])


TORN = {"line": _write_half_a_line, "write": _write_half}


def fill_disk(nth: int, note: Callable[[str], None]) -> None:
    """Let the writes of the n-th commit fail with a full disk, and no others."""
    write_files = checkpoint.write
    commits = 0

    def counted_write(*args: Any) -> Any:
        nonlocal commits
        commits += 1
        return write_files(*args)

    def failing_write(fd: int, data: Any) -> int:
        if threading.current_thread().name.startswith(WRITER) and commits == nth:
            note("full disk")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    checkpoint.write = counted_write
    os.write = failing_write


# ---- errors of the system, and other arithmetic ----


def fail(kind: str, fault: dict[str, Any], note: Callable[[str], None]) -> None:
    """Let a function of this process fail, or compute other bits; see `ERRORS`."""
    ERRORS[kind](fault, note)


def _fail_reads(fault: dict[str, Any], note: Callable[[str], None]) -> None:
    """Let the first `nth` reads of files of checkpoints fail with the error `code`."""
    read = checkpoint_format.hash_here
    left = fault["nth"]

    def failing_read(paths: list[str], *contents: Any) -> list[str]:
        nonlocal left
        if left == 0:
            return read(paths, *contents)
        left -= 1
        note("unreadable")
        raise OSError(fault["code"], os.strerror(fault["code"]), paths[0])

    checkpoint_format.hash_here = failing_read


def _fail_writes(fault: dict[str, Any], note: Callable[[str], None]) -> None:
    """Let all writes of journal and checkpoints fail after `nth` journal lines."""
    write_line = Journal.write
    left = fault["nth"]

    def failing_line(self: Journal, line: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            note("error of a write")
            raise OSError(fault["code"], os.strerror(fault["code"]), str(self.file))
        write_line(self, line)

    def failing_write(fd: int, data: Any) -> int:
        if left < 0 and threading.current_thread().name.startswith(WRITER):
            raise OSError(fault["code"], os.strerror(fault["code"]))
        return write(fd, data)

    Journal.write = failing_line
    os.write = failing_write


def _fail_locks(fault: dict[str, Any], note: Callable[[str], None]) -> None:
    """Let every lock fail: some network file systems have none."""

    def failing_lock(*_: Any) -> None:
        note("no locks")
        raise OSError(fault["code"], os.strerror(fault["code"]))

    fcntl.flock = failing_lock


def _change_arithmetic(fault: dict[str, Any], note: Callable[[str], None]) -> None:
    """Compute other last bits, as another processor or another version of a library does."""
    layer_norm = torch.nn.functional.layer_norm

    def other_layer_norm(*args: Any, **kwargs: Any) -> torch.Tensor:
        note("other bits")
        return layer_norm(*args, **kwargs) * (1 + 1e-6)

    torch.nn.functional.layer_norm = other_layer_norm


def _log_syncs(fault: dict[str, Any], note: Callable[[str], None]) -> None:
    """Append inode and size of each file that is forced to disk to the file `file`."""
    fsync = os.fsync

    def logged(descriptor: int) -> None:
        found = os.fstat(descriptor)
        fsync(descriptor)
        log = os.open(fault["file"], os.O_WRONLY | os.O_APPEND)
        write(log, f"{found.st_ino} {found.st_size}\n".encode())
        os.close(log)

    os.fsync = logged


ERRORS = {
    "synced": _log_syncs,
    "unreadable": _fail_reads,
    "unwritable": _fail_writes,
    "no locks": _fail_locks,
    "other bits": _change_arithmetic,
}


def on_first_step(callback: Callable[[], None]) -> None:
    """Call `callback` after the first update of this process."""
    update = Step.update

    def first_update(self: Step, lr: float) -> None:
        update(self, lr)
        Step.update = update
        callback()

    Step.update = first_update
