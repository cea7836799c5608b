"""Signals while Ray starts, which installs its own signal handlers."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.runs import signals

REPO = Path(__file__).resolve().parents[2]
SIGNAL_DURING_A_FORK = """
import os, signal, sys
from orchestrator.runs import signals
number = int(sys.argv[1])
usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
signal.signal(number, signal.SIG_IGN if sys.argv[2] == "ignored" else usual)
signals.begin()
try:
    with signals.while_ray_starts():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as ray.init does
        os.register_at_fork(before=lambda: os.kill(os.getpid(), number))
        if os.fork() == 0:
            os._exit(0)
        print("the exit was dropped", flush=True)
    print(signal.getsignal(number) in (signal.SIG_IGN, signals._do_nothing))
except BaseException as end:
    print(type(end).__name__, signals.was_stopped())
"""
IGNORED_DURING_RAY = """
import os, signal
from ray._private.utils import DeferSigint
from orchestrator.runs import signals
signal.signal(signal.SIGINT, signal.SIG_IGN)
signals.begin()
with signals.while_ray_starts(), DeferSigint():
    os.kill(os.getpid(), signal.SIGINT)
print("done")
"""


def output(script: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("SIGTERM", "KeyboardInterrupt True"),
        ("SIGHUP", "KeyboardInterrupt True"),
        ("SIGQUIT", "KeyboardInterrupt True"),
        ("SIGINT", "KeyboardInterrupt False"),
    ],
)
def test_signal_during_a_fork_is_not_lost_and_prints_no_traceback(name, end):
    number = str(int(signal.Signals[name]))
    assert output(SIGNAL_DURING_A_FORK, number, "") == f"the exit was dropped\n{end}\n"
    ignored = output(SIGNAL_DURING_A_FORK, number, "ignored")
    assert ignored == "the exit was dropped\nTrue\n"


def test_ignored_ctrl_c_is_not_called_as_a_handler_by_ray():
    assert output(IGNORED_DURING_RAY) == "done\n"


@pytest.mark.parametrize(
    ("is_job", "variable", "seconds"),
    [(False, None, 30), (True, None, 3), (True, "60", 60), (False, "75", 75)],
)
def test_time_between_sigterm_and_sigkill(monkeypatch, is_job, variable, seconds):
    """A job of Slurm is no job of Ray, but may have more time too."""
    for name, value in {
        "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}" if is_job else None,
        "RAY_JOB_STOP_WAIT_TIME_S": variable,
    }.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert signals.notice_s() == seconds


@pytest.mark.parametrize("text", ["soon", "", "nan", "-1", "1.5", "1_0", "١"])
def test_time_that_is_not_a_number_of_seconds_is_named(monkeypatch, text):
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", text)
    with pytest.raises(UserError, match=f"RAY_JOB_STOP_WAIT_TIME_S: '{text}' is not a whole"):
        signals.notice_s()
