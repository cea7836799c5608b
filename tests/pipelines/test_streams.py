"""Closed, broken and full standard streams do not end a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PRINT = """
import sys
from pipelines import streams
streams.secure()
with open(sys.argv[1], "w") as file:
    assert file.fileno() > 2
    for _ in range(200):
        print("step …" * 1000, flush=True)
        print("warning …", file=sys.stderr)
    assert sys.stdin.read() == ""
    print("done", file=file)
"""


def run(shell: str, file: Path, **env: str) -> subprocess.CompletedProcess:
    """Run PRINT, in a shell that replaces COMMAND by it."""
    command = f'"{sys.executable}" -c "$SCRIPT" "{file}"'
    return subprocess.run(
        ["bash", "-c", "set -o pipefail; " + shell.replace("COMMAND", command)],
        cwd=REPO,
        env={**os.environ, "SCRIPT": PRINT, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "shell",
    [
        "COMMAND 2>/dev/null",
        "COMMAND 2>/dev/null | head -c 1 >/dev/null",
        "COMMAND 2>&1 >/dev/null | head -c 1 >/dev/null",
        "COMMAND 2>&1 | head -c 1 >/dev/null",
        "COMMAND >&-",
        "COMMAND 2>&-",
        "COMMAND <&- >&- 2>&-",
        "COMMAND >/dev/full 2>/dev/full",
    ],
)
def test_command_goes_on_without_its_streams(shell, tmp_path):
    done = run(shell, tmp_path / "file")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "done\n"


def test_full_disk_behind_standard_output_is_reported_once(tmp_path):
    done = run("COMMAND >/dev/full", tmp_path / "file")
    assert done.stderr.count("output is dropped: [Errno 28] No space left on device") == 1


def test_characters_that_the_encoding_lacks_are_escaped(tmp_path):
    done = run("COMMAND", tmp_path / "file", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step \\u2026step")
