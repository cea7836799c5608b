"""How much memory there is, and which processes were killed because it ran out."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.runs.folder import RunFolder
from orchestrator.workers import marks, memory
from tests.helpers import forked, stuck
from tests.helpers.wait import wait_until

REPO = Path(__file__).resolve().parents[2]
HOST = os.uname().nodename
# What Ray's monitor says, shortened.
RAY_MESSAGE = (
    "4 worker(s) were killed due to the node running low on memory. Memory on the node was 4.06GB "
    "used / 23.54GB limit\nOOM kill reason: Memory usage 4122849280B exceeded threshold of "
    "3914203136B (15.5% of 25276502016B limit)"
)


# ---- what ended a worker ----


def test_message_of_rays_monitor():
    kill = memory.kill_in_error(RuntimeError(RAY_MESSAGE), 2)
    assert (kill.host, kill.workers, kill.reserved) == (HOST, 2, 25276502016 - 3914203136)
    assert memory.kill_in_error(RuntimeError("a worker died"), 2) is None


@pytest.fixture
def group():
    """A control group with 1 GiB of memory."""
    folder = Path("/sys/fs/cgroup/memory") / f"espalier-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"needs root and control groups of version 1: {error}")
    (folder / "memory.limit_in_bytes").write_text(str(2**30))
    yield folder
    folder.rmdir()


@pytest.mark.parametrize("by_kernel", [False, True])
def test_kill_by_the_kernel_is_told_from_others(group, tmp_path, by_kernel):
    job = {"folder": str(tmp_path), "group": str(group)}
    [process] = forked.start(stuck.take_2_gib, [job])
    wait_until(lambda: marks.read(RunFolder(tmp_path)))
    if by_kernel:
        (tmp_path / "go").touch()
    else:
        process.kill()
    process.join(60)
    assert process.exitcode == -9
    [finder] = forked.start(stuck.find_kills, [job])
    finder.join(60)
    first = "the kernel ended a worker" if by_kernel else "None"
    assert (tmp_path / "found").read_text().splitlines() == [first, "None", "None"]


# ---- how much memory there is ----


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A machine with 4 GiB, of which 3 are free, and no control group."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 9\noom_kill 5\n")
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    whole = psutil.virtual_memory()._replace(total=4 * 2**30, available=3 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole)
    return tmp_path


def amounts() -> tuple[int, int, int]:
    return memory.total_bytes(), memory.available_bytes(), memory.oom_kills()


def test_memory_without_control_groups(machine):
    assert amounts() == (4 * 2**30, 3 * 2**30, 5)


def test_memory_of_control_groups_version_2(machine):
    """This machine may have none: files as the kernel writes them."""
    own = machine / "groups" / "pod" / "worker"
    own.mkdir(parents=True)
    for folder, limit, used in ((own, "max", 700), (own.parent, "1000", 800)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 50\n")
    (own / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (machine / "proc" / "self" / "cgroup").write_text("0::/pod/worker\n")
    assert amounts() == (1000, 250, 2)


def test_memory_of_control_groups_version_1(group):
    code = (
        f"open('{group}/cgroup.procs', 'w').write('0')\n"
        "import torch\n"
        "from orchestrator.workers import memory as m\n"
        "print(m.available_bytes(), m.total_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    available, total = map(int, done.stdout.split())
    assert 0 < available < 2**30 - 10**8, "torch is imported"
    assert total == 2**30
