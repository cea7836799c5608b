"""The process that times steps: `python -m orchestrator.cost.bench`.

It needs seconds to import torch. So a command that will need it starts it first, and finds out what
to time meanwhile.
"""

import atexit
import os
import subprocess
import sys
import time
from pathlib import Path

from orchestrator.cluster.layout import WORKER_ENVIRONMENT

SOURCES = Path(__file__).resolve().parents[2]

_ahead: list[subprocess.Popen[str]] = []  # one process at most, which has no job yet


def start_ahead() -> None:
    """Start the process of the next `run`. It is killed if this process ends before."""
    if not _ahead:
        _ahead.append(_start())
        atexit.register(_kill_unused)


def run(job: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    """Return what the process prints for this job.

    Raises:
        subprocess.TimeoutExpired: It took more than `limit_s` seconds.
        OSError: It could not be started.
    """
    process = _ahead.pop() if _ahead else _start()
    with process:
        try:
            output, errors = process.communicate(job, timeout=limit_s)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cost.bench", str(time.time())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=SOURCES,
        env={**os.environ, **WORKER_ENVIRONMENT},
    )


def _kill_unused() -> None:
    for process in _ahead:
        process.kill()
        process.wait()
