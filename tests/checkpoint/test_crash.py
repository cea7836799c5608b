"""Killed for real after any file-system call of a commit, a run has its old checkpoint or its new one, whole."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HELPER = Path(__file__).resolve().parent.parent / "helpers" / "crash_commit.py"
SCENARIOS = ("first", "beside", "same", "prune", "leftovers")


@pytest.fixture(scope="module")
def crashes(tmp_path_factory) -> dict:
    """Every scenario with a SIGKILL after every call; the helper checks what it finds after each."""
    in_memory = Path(
        "/dev/shm"
    )  # a kill loses nothing that the system was handed; a disk is slow at thousands of fsyncs
    place = in_memory if os.access(in_memory, os.W_OK) else tmp_path_factory.mktemp("crashes")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        done = subprocess.run(
            [sys.executable, str(HELPER), folder], capture_output=True, text=True, timeout=300
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_after_any_call_the_old_or_the_new_one_is_whole(crashes, scenario):
    calls, ends = crashes[scenario]["calls"], crashes[scenario]["ends"]
    assert {n for n, _, _ in ends} == set(range(1, len(calls) + 1))
    states = [state for _, _, state in ends]
    # Once it has its name it is there, whatever comes later; and it has not before.
    turn = states.index("new")
    assert states == ["old"] * turn + ["new"] * (len(states) - turn)
    at, name, _ = ends[turn]
    assert (
        name == "rename"
        and ".step-" in calls[at - 1][1]
        and all(call != "write" for call, _ in calls[at:])
    )


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_what_a_name_promises_is_on_the_disk_before_the_name_is(crashes, scenario):
    calls = [
        (name, path)
        for name, path in crashes[scenario]["calls"]
        if name in ("open", "write", "fsync", "close", "mkdir", "rename", "rmdir")
    ]
    at = next(n for n, (name, path) in enumerate(calls) if name == "mkdir" and "/.step-" in path)
    temporary = calls[at][1]
    steps = [
        (name, path.removeprefix(temporary).lstrip("/") or "temporary")
        for name, path in calls[at + 1 :]
        if path.startswith(temporary)
    ]
    parts = ["a.txt", "model.safetensors", "state.json", "MANIFEST.json"]
    for part in parts:  # written, then synced, then left
        own = [name for name, path in steps if path == part]
        assert own == ["open", *["write"] * (part != "a.txt"), "fsync", "close"]
    order = [
        path if name == "fsync" else name for name, path in steps if name in ("fsync", "rename")
    ]
    assert order == [*parts, "temporary", "rename"]
    parent = str(Path(temporary).parent)
    after = calls[calls.index(("rename", temporary)) + 1 :]
    # Its name is on the disk before anything older is removed.
    assert [call for call in after if call[0] in ("fsync", "rename", "rmdir")][0] == (
        "fsync",
        parent,
    )


def test_the_name_of_a_new_folder_of_checkpoints_is_synced(crashes):
    calls = [tuple(call) for call in crashes["first"]["calls"]]
    made = next(path for name, path in calls if name == "mkdir")
    assert calls.index(("fsync", str(Path(made).parent))) < next(
        n for n, (_, path) in enumerate(calls) if "/.step-" in path
    )
