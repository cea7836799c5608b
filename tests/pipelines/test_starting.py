"""Ctrl-C while a command imports its modules."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
COMMANDS = {
    file.stem: file
    for file in sorted((REPO / "pipelines").glob("*.py"))
    if '\nif __name__ == "__main__":' in file.read_text("utf-8")
}
# Sends the signal when a module is imported.
INTERRUPTED = """
import os, runpy, signal, sys
file, module, *words = sys.argv[1:]
class Interrupt:
    def find_spec(self, name, *_):
        if name == module:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = [file, *words]
runpy.run_path(file, run_name="__main__")
"""


def interrupted(command: str, module: str, *words: str, before: int = signal.SIG_DFL):
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(COMMANDS[command]), module, *words],
        cwd=REPO,
        preexec_fn=lambda: signal.signal(signal.SIGINT, before),
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("command", "module"),
    [*((name, "pydantic") for name in COMMANDS), ("inspect_batch", "torch")],
)
def test_ctrl_c_during_an_import_is_one_word(command, module):
    ended = interrupted(command, module)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")


def test_ignored_ctrl_c_stays_ignored():
    """A shell ignores SIGINT in a command that it starts in the background."""
    ended = interrupted("train", "pydantic", "--help", before=signal.SIG_IGN)
    assert (ended.returncode, ended.stderr) == (0, "")
