"""SIGTERM while somebody else handles signals."""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
TOLD_IN_A_FORK = """
import os, signal, sys
from orchestrator import interrupts
try:
    with interrupts.while_ray_starts():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray.init does
        os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGTERM))
        if os.fork() == 0:
            os._exit(0)
        print("the exit was dropped", flush=True)
except interrupts.Terminated:
    print("terminated")
"""


def test_sigterm_in_a_fork_of_rays_start_is_heard_and_python_says_nothing():
    done = subprocess.run([sys.executable, "-c", TOLD_IN_A_FORK], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the exit was dropped\nterminated\n", "")
