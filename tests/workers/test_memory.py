"""Memory that runs out, really: told apart from other ends, and answered with a micro-batch that was tried."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import oom_kill, system_memory, watchdog
from orchestrator.workers import ray_train as workers
from orchestrator.workers.oom_kill import OomKill
from tests.runs.test_stop import SMALL

REPO = Path(__file__).resolve().parents[2]
STARVED = """
import resource, sys
from pathlib import Path
from orchestrator.workers import memory
from orchestrator.config.experiment import load_experiment
from orchestrator.train.numerics import Worker
from orchestrator.train.loop import Trainer
from orchestrator.runs.folder import RunFolder
experiment = load_experiment(None, sys.argv[3:])
run = Trainer(experiment, RunFolder(sys.argv[1]), Path(sys.argv[2]), Worker())
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, resource.RLIM_INFINITY))
try:
    list(run.run())
except Exception as error:
    assert memory.is_exhausted(error), error
    print(memory.advice(experiment, Worker(), run, error))
else:
    print("fits")
"""
# What Ray's monitor says, shortened.
SAID = """Training failed due to controller error:
4 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2) was 4.06GB used / 23.54GB limit
OOM kill reason: Memory usage 4122849280B exceeded threshold of 3914203136B (15.5% of 25276502016B limit)"""


def wide(size: int):
    """Eight megabytes of logits a sequence, three times over."""
    return load_experiment(
        None,
        [
            *SMALL,
            "model.block_size=64",
            "model.pad_vocab_to=32768",
            f"train.micro_batch_size={size}",
            f"train.global_batch_size={size}",
        ],
    )


def starved(folder: Path, data: Path, size: int) -> str:
    folder.mkdir()
    words = [
        *SMALL,
        "model.block_size=64",
        f"train.micro_batch_size={size}",
        "train.global_batch_size=4096",
        "train.max_steps=1",
        "train.eval_interval=null",
    ]
    # A thread's arena takes 64 MiB of addresses, which are what is limited here and cost nothing elsewhere.
    done = subprocess.run(
        [sys.executable, "-c", STARVED, folder, data, *words],
        cwd=REPO,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_memory_that_torch_misses_is_answered_with_a_micro_batch_that_fits(tiny_dataset, tmp_path):
    said = starved(tmp_path / "starved", tiny_dataset, 4096)
    assert "out of memory on cpu with train.micro_batch_size=4096" in said
    size = int(said.partition(" fits here")[0].rpartition("train.micro_batch_size=")[2])
    assert starved(tmp_path / "fits", tiny_dataset, size) == "fits\n"
    # Twice as much may just fit: what is said to fit was tried with some sequences more.
    assert starved(tmp_path / "more", tiny_dataset, 4 * size) != "fits\n", "much more fits too"


def test_the_largest_micro_batch_that_fits_is_found_without_going_past_the_limit():
    whole, (largest, most) = wide(64), oom_kill.largest_fitting(wide(64), 40, Worker(), 2**40)
    assert largest == 64
    fits, held = oom_kill.largest_fitting(whole, 40, Worker(), limit := int(0.7 * most))
    assert held <= limit
    assert fits == 32, "that is what is next, and it takes little more than half"
    assert oom_kill.largest_fitting(whole, 40, Worker(), 2**20) == (None, 0)


def test_what_fits_now_was_taken_by_somebody_else():
    kill = OomKill("the kernel ended a worker", os.uname().nodename, 2, 0)
    said = oom_kill.advice(kill, wide(4), 40, Layout(2, 1, False))
    assert "train.micro_batch_size=4: the kernel ended a worker. It needs 0." in said
    assert said.endswith("something else took the memory; free it and run the same command again")
    assert "not the GPU's" in oom_kill.advice(kill, wide(4), 40, Layout(2, 1, True))
    elsewhere = OomKill("the kernel ended a worker", "elsewhere", 1, 0)
    assert "Use a smaller train.micro_batch_size" in oom_kill.advice(
        elsewhere, wide(4), 40, Layout(2, 1, False)
    )


def test_ray_is_taken_at_its_word():
    kill = oom_kill.in_error(RuntimeError(SAID), 2)
    assert (kill.host, kill.workers, kill.reserved) == (
        os.uname().nodename,
        2,
        25276502016 - 3914203136,
    )
    assert oom_kill.in_error(RuntimeError("a worker died"), 2) is None


@pytest.fixture
def group(tmp_path_factory):
    """A control group of this machine's with a gibibyte of memory."""
    folder = Path("/sys/fs/cgroup/memory") / f"espalier-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"needs root and control groups of version 1: {error}")
    (folder / "memory.limit_in_bytes").write_text(str(2**30))
    yield folder
    folder.rmdir()


EATS = """
import sys
from pathlib import Path
Path(sys.argv[2], "cgroup.procs").write_text("0")
from orchestrator.train.numerics import Worker
from orchestrator.workers.watchdog import Watchdog
dog = Watchdog(Path(sys.argv[1]), Worker(), 30.0)
dog.beat("gradient", 7)
print("in it", flush=True)
sys.stdin.read()
taken = [bytearray(b"x" * 2**20) for _ in range(2000)]
"""
FINDS = """
import sys
from pathlib import Path
Path(sys.argv[2], "cgroup.procs").write_text("0")
from orchestrator.workers import oom_kill, watchdog
oom_kill.oom_causes = dict  # there is no Ray here
run_dir = Path(sys.argv[1])
def find():
    kill = oom_kill.find(run_dir)
    print(kill and kill.by)
find()
(run_dir / "hang-rank0.txt").write_text("it hung")
find()  # who hung was ended for that
watchdog.report(run_dir)
find()
"""


def test_the_kernels_kill_is_told_from_others(group, tmp_path):
    for killed in (None, "the kernel ended a worker"):
        eats = subprocess.Popen(
            [sys.executable, "-c", EATS, tmp_path, group],
            cwd=REPO,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert eats.stdout.readline() == "in it\n"
        if killed is None:
            eats.kill()
        eats.stdin.close()
        assert eats.wait(60) == -9
        found = subprocess.run(
            [sys.executable, "-c", FINDS, tmp_path, group],
            cwd=REPO,
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.splitlines() == [str(killed), "None", "None"]


def test_the_limits_of_control_groups_of_version_2_are_read_as_its_files_say(tmp_path, monkeypatch):
    """This machine may have none: files as the kernel writes them."""
    own = tmp_path / "groups" / "pod" / "worker"
    own.mkdir(parents=True)
    for folder, limit, used in ((own, "max", 700), (own.parent, "1000", 800)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 50\n")
    (own / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/pod/worker\n")
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 4 kB\nMemAvailable: 3 kB\n")
    monkeypatch.setattr(system_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(system_memory, "GROUPS", tmp_path / "groups")
    assert (
        system_memory.total_bytes(),
        system_memory.available_bytes(),
        system_memory.oom_kills(),
    ) == (1000, 250, 2)
    (tmp_path / "proc" / "self" / "cgroup").unlink()
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 9\noom_kill 5\n")
    assert (
        system_memory.total_bytes(),
        system_memory.available_bytes(),
        system_memory.oom_kills(),
    ) == (4096, 3072, 5)


def test_a_control_groups_limit_is_what_is_left(group):
    code = (
        f"open('{group}/cgroup.procs', 'w').write('0')\nimport torch\nfrom orchestrator import system_memory as m\n"
        f"print(m.available_bytes(), m.total_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    available, total = map(int, done.stdout.split())
    assert 0 < available < 2**30 - 10**8, "torch is imported"
    assert total == 2**30


def test_memory_that_torch_misses_in_a_worker_is_the_users_to_mend_and_an_event(
    ray_cluster, tiny_dataset, tmp_path
):
    experiment = load_experiment(
        None, [*SMALL, f"model.pad_vocab_to={2**42}"]
    )  # an embedding beyond any address space
    with pytest.raises(UserError, match="No smaller micro-batch fits here either") as told:
        workers._train(experiment, tmp_path, tiny_dataset, Worker())
    (event,) = events.read(RunFolder(tmp_path))
    assert (event["kind"], event["message"]) == ("out_of_memory", str(told.value))
    assert [m["phase"] for m in watchdog.marks(tmp_path)] == [watchdog.FAILED]


def test_the_end_of_a_starved_run_is_the_users_to_mend(tiny_dataset, tmp_path, capsys):
    oom_kill.stop(tmp_path, OomKill("the kernel ended a worker", "elsewhere", 1, 0))
    reason = oom_kill.conclude(tmp_path, wide(4), tiny_dataset, Layout(1, 1, False))
    assert json.loads((tmp_path / "stopped.json").read_text()) == {"reason": reason, "user": True}
    assert "looking for a micro-batch that fits" in capsys.readouterr().out
    assert oom_kill.conclude(tmp_path, wide(4), tiny_dataset, Layout(1, 1, False)) is None
