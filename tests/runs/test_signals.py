"""SIGTERM and Ctrl-C while Ray starts, which installs its own signal handler."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SIGNAL_DURING_A_FORK = """
import os, signal, sys
from orchestrator.runs import signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores Ctrl-C
try:
    with signals.while_ray_starts():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray.init does
        os.register_at_fork(before=lambda: os.kill(os.getpid(), int(sys.argv[1])))
        if os.fork() == 0:
            os._exit(0)
        print("the exit was dropped", flush=True)
except BaseException as end:
    print(type(end).__name__)
"""


@pytest.mark.parametrize(
    ("number", "end"), [(signal.SIGTERM, "Terminated"), (signal.SIGINT, "KeyboardInterrupt")]
)
def test_signal_during_a_fork_is_not_lost_and_prints_no_traceback(number, end):
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_DURING_A_FORK, str(int(number))],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"the exit was dropped\n{end}\n", "")
