"""Wraps functions of the product, so that the process of a rank kills itself at a drawn moment.

Only tests do this: the product knows no hooks. A SIGKILL to oneself is as final as one from outside.
"""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.checkpoint import store as checkpoint
from orchestrator.checkpoint import tensor_file
from orchestrator.runs import journal
from orchestrator.runs.journal import Journal
from orchestrator.train import begin, evaluate
from orchestrator.train.evaluate import Evaluator
from orchestrator.train.gradients import Gradients
from orchestrator.train.step import Step

POINTS = {
    "forward": (Step, "_forward_backward"),
    "backward": (torch.Tensor, "backward"),
    "clip": (Gradients, "clip"),
    "optimizer": (torch.optim.AdamW, "step"),
    "all_to_all": (dist, "all_to_all_single"),
    "all_gather": (dist, "all_gather_into_tensor"),
    "line": (Journal, "write"),
    "copy": (tensor_file, "fill"),
    "commit": (checkpoint, "commit"),
    "prune": (checkpoint, "prune"),
    "batch": (evaluate, "agree"),
    "sample": (Evaluator, "_write_sample"),
    "verify": (checkpoint, "verify"),
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
WRITER = "checkpoint"  # the calls of `os` count in the thread of this name


def install(moment: str, nth: int, note: Callable[[str], None], end: int = signal.SIGKILL) -> None:
    """Die (SIGSTOP as the `end`: stop) at the n-th occurrence of `moment`, say "before fsync"; `note` is told just before."""
    when, name = moment.split()
    left, lock = [nth], threading.Lock()

    def is_now() -> bool:
        with lock:
            left[0] -= 1
            return left[0] == 0

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
                _TORN[name](*args)
            die()
        result = original(*args, **kwargs)
        if when == "after" and is_now():
            die()
        return result

    setattr(owner, attribute, wrapped)


def _half_a_line(writer: Journal, record: dict[str, Any]) -> None:
    line = journal.json.dumps(record).encode()
    with open(writer.file, "ab", buffering=0) as file:
        file.write(line[: len(line) // 2])


write = os.write  # the system's, whatever is put in its place
_TORN = {"line": _half_a_line, "write": lambda fd, data: write(fd, data[: len(data) // 2])}


def fill_disk(nth: int, note: Callable[[str], None]) -> None:
    """Let only the writes of the n-th commit fail with a full disk."""
    commit, commits = checkpoint.commit, [0]

    def counted(*args: Any) -> Path:
        commits[0] += 1
        return commit(*args)

    def refusing(fd: int, data: Any) -> int:
        if threading.current_thread().name.startswith(WRITER) and commits[0] == nth:
            note("full disk")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data)

    checkpoint.commit, os.write = counted, refusing


def tell_first_step(tell: Callable[[], None]) -> None:
    """Call `tell` after the first update of this process."""
    update = Step.update

    def told(self: Step, lr: float) -> None:
        update(self, lr)
        Step.update = update
        tell()

    Step.update = told
