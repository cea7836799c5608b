"""SIGTERM and Ctrl-C while somebody else handles signals."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
TOLD_IN_A_FORK = """
import os, signal, sys
from orchestrator.runs import signals
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
def test_what_falls_into_a_fork_of_rays_start_is_heard_and_python_says_nothing(number, end):
    done = subprocess.run(
        [sys.executable, "-c", TOLD_IN_A_FORK, str(int(number))],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"the exit was dropped\n{end}\n", "")
