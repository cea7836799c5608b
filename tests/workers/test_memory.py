"""Memory that really runs out: recognized, and answered with a micro-batch that fits."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.workers import memory, system_memory
from orchestrator.workers.memory import Fit, OutOfMemory

REPO = Path(__file__).resolve().parents[2]
HOST = os.uname().nodename
ONE_WORKER = Layout(1, 1, False)
KILLED = OutOfMemory("the kernel ended a worker", HOST, 2, 0)
# What Ray's monitor says, shortened.
RAY_MESSAGE = (
    "4 worker(s) were killed due to the node running low on memory. Memory on the node was 4.06GB "
    "used / 23.54GB limit\nOOM kill reason: Memory usage 4122849280B exceeded threshold of "
    "3914203136B (15.5% of 25276502016B limit)"
)


def wide(size: int, *words: str) -> Experiment:
    """Return a small model with a large vocabulary: 8 MiB of logits a sequence, three times."""
    return load_experiment(
        None,
        [
            "model.n_layer=2",
            "model.n_head=2",
            "model.n_embd=32",
            "model.block_size=64",
            "model.pad_vocab_to=32768",
            f"train.micro_batch_size={size}",
            f"train.global_batch_size={size}",
            *words,
        ],
    )


# ---- which micro-batch fits ----


@pytest.fixture(scope="module")
def whole() -> Fit:
    """Measurement without a limit."""
    return memory.largest_fitting(wide(64), 40, ONE_WORKER, 2**40)


@pytest.mark.parametrize(("share", "expected"), [(1.1, 64), (0.7, 32), (0.5, 16)])
def test_largest_micro_batch_under_a_limit(whole, share, expected):
    limit = int(share * whole.needed_bytes)
    fit = memory.largest_fitting(wide(64), 40, ONE_WORKER, limit)
    assert fit.micro_batch_size == expected
    assert fit.needed_bytes <= limit


def test_no_micro_batch_fits(whole):
    assert memory.largest_fitting(wide(64), 40, ONE_WORKER, 2**20) == Fit(None)
    impossible = wide(64, f"model.pad_vocab_to={2**42}")  # beyond any address space
    assert memory.largest_fitting(impossible, 40, ONE_WORKER, 2**40) == Fit(None)


def test_advised_micro_batches_make_the_same_steps():
    experiment = wide(12, "train.global_batch_size=48")  # 4 micro-batches in 4 slots
    assert memory.sizes_of_same_steps(experiment, 1) == [1, 2, 3, 4, 6, 12]
    assert memory.sizes_of_same_steps(wide(12), 2) == [1, 2, 3, 6], "12 is one slot"


@pytest.mark.parametrize(
    ("fit", "words"),
    [
        (Fit(8, 1), "train.micro_batch_size=8 fits in the "),
        (Fit(None), "No smaller micro-batch fits in the "),
        (Fit(64, 2**29), "It needs 0.50 GiB and would fit in the "),
        (None, "Use a smaller train.micro_batch_size"),
    ],
)
def test_advice_says_what_was_measured(monkeypatch, fit, words):
    monkeypatch.setattr(memory, "largest_fitting", lambda *_: fit)
    advice = memory.advice(KILLED, wide(64), 40, ONE_WORKER)
    problem = f"out of memory on {HOST} with train.micro_batch_size=64: the kernel ended a worker. "
    assert advice.startswith(problem + words)


def test_advice_without_a_measurement():
    on_gpus = Layout(2, 1, True)
    assert "not the GPU's" in memory.advice(KILLED, wide(4), 40, on_gpus)
    elsewhere = OutOfMemory("the kernel ended a worker", "elsewhere", 1, 0)
    assert "Use a smaller" in memory.advice(elsewhere, wide(4), 40, ONE_WORKER)


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


TAKES_2_GB = """
import sys
from pathlib import Path
Path(sys.argv[2], "cgroup.procs").write_text("0")
from orchestrator.train.numerics import Worker
from orchestrator.workers.watchdog import Watchdog
dog = Watchdog(Path(sys.argv[1]), Worker(), 30.0)
dog.beat("gradient", 7)
print("ready", flush=True)
sys.stdin.read()
taken = [bytearray(b"x" * 2**20) for _ in range(2000)]
"""
FINDS_KILL = """
import sys
from pathlib import Path
Path(sys.argv[2], "cgroup.procs").write_text("0")
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import memory, watchdog
memory.oom_causes = dict  # there is no Ray here
folder = RunFolder(sys.argv[1])
def find():
    kill = memory.find_kill(folder)
    print(kill and kill.by)
find()
folder.hang_file(0).write_text("it hung")
find()  # a rank that hung was killed for that
watchdog.report(folder.path)
find()
"""


@pytest.mark.parametrize("by_kernel", [False, True])
def test_kill_by_the_kernel_is_told_from_others(group, tmp_path, by_kernel):
    arguments = [str(tmp_path), str(group)]
    process = subprocess.Popen(
        [sys.executable, "-c", TAKES_2_GB, *arguments],
        cwd=REPO,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    if not by_kernel:
        process.kill()
    process.stdin.close()
    assert process.wait(60) == -9
    found = subprocess.run(
        [sys.executable, "-c", FINDS_KILL, *arguments],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    first = "the kernel ended a worker" if by_kernel else "None"
    assert found.stdout.splitlines() == [first, "None", "None"]


# ---- how much memory there is ----


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A machine with 4 GiB, of which 3 are free, and no control group."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 9\noom_kill 5\n")
    monkeypatch.setattr(system_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(system_memory, "GROUPS", tmp_path / "groups")
    whole = psutil.virtual_memory()._replace(total=4 * 2**30, available=3 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: whole)
    return tmp_path


def amounts() -> tuple[int, int, int]:
    return system_memory.total_bytes(), system_memory.available_bytes(), system_memory.oom_kills()


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
        "from orchestrator.workers import system_memory as m\n"
        "print(m.available_bytes(), m.total_bytes())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    available, total = map(int, done.stdout.split())
    assert 0 < available < 2**30 - 10**8, "torch is imported"
    assert total == 2**30
