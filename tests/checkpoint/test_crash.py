"""A writer that is killed at any time leaves a complete checkpoint, the old or the new one."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
HELPER = REPO / "tests" / "helpers" / "crash_commit.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPO)}
SCENARIOS = ("first", "beside", "same", "parts", "prune", "leftovers")
FILES = ["a.txt", "model.safetensors", "state.json", "MANIFEST.json"]


@pytest.fixture(scope="module")
def crashes(tmp_path_factory) -> dict:
    """Results of the helper, which kills each scenario after each of its system calls."""
    # In memory: thousands of fsyncs on a disk are slow, and a kill does not need one.
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("crashes")
    with tempfile.TemporaryDirectory(dir=place) as folder:
        command = [sys.executable, str(HELPER), folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_after_any_call_the_old_or_the_new_checkpoint_is_found(crashes, scenario):
    calls = crashes[scenario]["calls"]
    ends = crashes[scenario]["ends"]
    assert {number for number, _, _ in ends} == set(range(1, len(calls) + 1))
    # The new checkpoint is found once it has its name, and not before.
    states = [state for _, _, state in ends]
    first_new = states.index("new")
    assert states == ["old"] * first_new + ["new"] * (len(states) - first_new)
    number, name, _ = ends[first_new]
    assert name == "rename" and ".step-" in calls[number - 1][1]
    assert all(call != "write" for call, _ in calls[number:])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_content_is_on_disk_before_the_checkpoint_has_its_name(crashes, scenario):
    kinds = ("open", "write", "fsync", "close", "mkdir", "rename", "rmdir")
    calls = [(name, path) for name, path in crashes[scenario]["calls"] if name in kinds]
    start = next(n for n, (name, path) in enumerate(calls) if name == "mkdir" and "/.step-" in path)
    temporary = calls[start][1]
    inside = [
        (name, path.removeprefix(temporary).lstrip("/") or "temporary")
        for name, path in calls[start + 1 :]
        if path.startswith(temporary)
    ]
    for file in FILES:
        own = [name for name, path in inside if path == file]
        assert own == ["open", *["write"] * (file != "a.txt"), "fsync", "close"]
    order = [path if name == "fsync" else name for name, path in inside if name != "close"]
    assert [item for item in order if item not in ("open", "write")] == [
        *FILES,
        "temporary",
        "rename",
    ]
    # The name is on disk before anything older is removed.
    after = calls[calls.index(("rename", temporary)) + 1 :]
    changes = [call for call in after if call[0] in ("fsync", "rename", "rmdir")]
    assert changes[0] == ("fsync", str(Path(temporary).parent))


def test_name_of_a_new_checkpoints_folder_is_on_disk_before_its_content(crashes):
    calls = [tuple(call) for call in crashes["first"]["calls"]]
    folder = next(path for name, path in calls if name == "mkdir")
    first_inside = next(n for n, (_, path) in enumerate(calls) if "/.step-" in path)
    assert calls.index(("fsync", str(Path(folder).parent))) < first_inside


# One process imports torch. Its children commit, replace and prune without pause; each is killed
# in the middle of a commit, after a random number of bytes that it reported through a pipe.
KILLED = """
import os, random, signal, sys
from pathlib import Path
import torch
from orchestrator.checkpoint import store
from orchestrator.checkpoint.format import step_of
from tests.helpers.checkpoints import save
from tests.helpers.facts import FACTS

def write(directory, first, pipe):
    torch.set_num_threads(1)
    real = os.write
    def report(descriptor, data):
        real(pipe, b".")
        return real(descriptor, data)
    os.write = report
    for step in range(first, 10**6):
        for _ in range(2):
            weights = torch.full((50_000,), float(step))
            save(directory, step, {"model": {"w": weights}}, {"state.json": "{}"}, FACTS)
        store.prune(directory, 2)

directory, draw, newest, torn = Path(sys.argv[1]), random.Random(7), 0, 0
while newest < 25 or torn < 5:
    reader, pipe = os.pipe()
    child = os.fork()
    if not child:
        write(directory, newest + 1, pipe)
    os.close(pipe)
    for _ in range(draw.randrange(1, 20)):
        os.read(reader, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    torn += any(directory.glob(".step-*"))
    found = store.latest_valid(directory, warn=sys.exit)
    step = step_of(found) if found else 0
    assert step >= newest, (step, newest)
    for other in store.steps(directory):
        store.verify(store.path_of(directory, other))
        weights = store.load_tensors(store.path_of(directory, other), "model")["w"]
        assert bool((weights == other).all())
    newest = step
"""


def test_process_killed_during_commits_leaves_only_complete_checkpoints(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
