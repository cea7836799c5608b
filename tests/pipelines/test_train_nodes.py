"""A run on two nodes: one is drained during training, the other runs low on memory."""

import json
import mmap
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import marks, memory
from tests.helpers import cluster
from tests.helpers.small_run import REPO, begin, command, curve, logged, run, summary
from tests.helpers.wait import wait_until

WORDS = [
    "train.max_steps=600",
    "train.eval_interval=300",
    "train.checkpoint_interval=600",
    "compute.num_workers=1",
]
# Memory between the use at the start of the node and the limit of its monitor. It must be more than
# other tests start to use meanwhile.
SPARE_BYTES = 7 * 2**30


@pytest.fixture
def head(tmp_path_factory):
    """A head without CPUs, so that workers run on the nodes that a test adds."""
    with cluster.head(tmp_path_factory.mktemp("nodes"), cpus=0) as head:
        yield head


@pytest.mark.slow
def test_run_survives_drained_node_and_low_memory_bit_for_bit(
    head, tiny_corpus, tiny_dataset, tmp_path
):
    if memory.available_bytes() < SPARE_BYTES + 5 * 2**30:
        pytest.skip("less than 12 GiB are free: what starves a node here could starve others")
    run_dir, words = tmp_path / "small", [f"data.dir={tiny_dataset}", *WORDS]
    golden = undisturbed(command(tmp_path, tiny_corpus, *words), tmp_path / "golden", tiny_dataset)
    head.node(2)
    process = begin(head, tmp_path, tiny_corpus, *words)
    wait_until(lambda: logged(run_dir) >= 5, process)
    drain(head, marks.read(RunFolder(run_dir))[0].node)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 75, out + err
    assert "is drained: asked to stop after step" in err
    step = json.loads((run_dir / "stopped.json").read_text())["step"]
    assert checkpoint.latest_valid(run_dir / "checkpoints") == checkpoint.path_of(
        run_dir / "checkpoints", step
    )
    assert step >= logged(run_dir), "a logged step was lost"

    machine = psutil.virtual_memory()
    total = machine.total
    used = total - machine.available
    head.node(2, RAY_memory_usage_threshold=str((used + SPARE_BYTES) / total))
    process = begin(head, tmp_path, tiny_corpus, *words)
    wait_until(lambda: logged(run_dir) >= step + 5, process)
    taken, victim = [], marks.read(RunFolder(run_dir))[0]
    while victim.is_local() and len(taken) < 24:
        taken.append(
            mmap.mmap(-1, 2**29, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        )
    del taken
    out, err = process.communicate(timeout=90)
    assert process.returncode == 2, out + err
    assert "out of memory on" in err
    assert "Ray's memory monitor ended " in err  # a worker, or its controller
    assert [e["kind"] for e in events.read(RunFolder(run_dir))] == ["out_of_memory"], (
        "it was tried again"
    )
    assert (summary(run_dir)["status"], summary(run_dir)["step"]) == ("FAILED", step)

    run(head, tmp_path, tiny_corpus, *words)
    assert golden.wait(120) == 0
    assert curve(run_dir) == curve(tmp_path / "golden")
    assert summary(run_dir)["weights_sha256"] == checkpoint.weights_sha256(
        checkpoint.load_tensors(
            checkpoint.latest_valid(tmp_path / "golden" / "checkpoints"), "model"
        )
    )


def undisturbed(words: list[str], run_dir: Path, data_dir: Path) -> subprocess.Popen:
    """Train the run of a command in a separate process, without Ray."""
    run_dir.mkdir()
    job = {
        "file": words[2],
        "overrides": words[3:],
        "run_dir": str(run_dir),
        "data_dir": str(data_dir),
        "rank": 0,
        "world_size": 1,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.train_rank", json.dumps(job)], cwd=REPO
    )


def drain(head, node: str) -> None:
    """Drain a node, as an autoscaler or `ray drain-node` does."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline_ms = int((time.time() + 120) * 1000)
    accepted, why = GcsClient(address=head.env["RAY_ADDRESS"]).drain_node(
        node, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", deadline_ms
    )
    assert accepted, why
