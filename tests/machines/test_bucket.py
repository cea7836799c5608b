"""A run, and sweeps, on two machines that share no folder, only a bucket."""

import re
import shutil
from pathlib import Path

import pytest

from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.records import read_result
from tests.helpers.curves import final_outcome
from tests.helpers.wait import wait_until
from tests.machines.conftest import WORDS, objects, outcome_of, sweep_words
from tests.machines.test_nodes import alone

SCRATCH = "/tmp/cache/espalier/scratch/s3/bucket/m"


@pytest.fixture
def small(cluster, store, tiny_corpus):
    """Return a function that starts a command on a machine."""
    corpus = cluster.shared / tiny_corpus.name
    shutil.copy(tiny_corpus, corpus)
    file = cluster.shared / "small.yaml"
    file.write_text("data: {tokenizer: char}\n")

    def start(verb, words, log, node):
        command = [f"pipelines/{verb}.py", str(file), *words, f"data.corpus={corpus}"]
        return cluster.drive([*command, "storage=s3://bucket/m"], log, node=node)

    yield start
    cluster.restore()


def fetch(cluster, node: int, name: str) -> Path:
    """Return a copy of the folder of a run or a sweep on a machine."""
    made = cluster.shared / f"made-{name}"
    shutil.rmtree(made, ignore_errors=True)
    cluster.run(node, ["cp", "-r", f"{SCRATCH}/{name}", str(made)])
    return made


@pytest.mark.slow
def test_run_on_machines_that_share_only_a_bucket_survives_the_loss_of_one(
    cluster, small, tiny_dataset, tmp_path
):
    long = [*WORDS, "train.max_steps=180"]  # it must not end before a copy is seen
    words = [*long, "compute.num_workers=2"]
    first = small("train", words, tmp_path / "first", node=1)
    wait_until(lambda: "checkpoints/step-" in objects(cluster), first, pause_s=1.0)
    cluster.kill(1)
    first.wait()
    cluster.start_again(1)
    assert "run" not in cluster.run(1, ["ls", "/tmp"])
    second = small("train", words, tmp_path / "second", node=1)
    assert second.wait(300) == 0, (tmp_path / "second").read_text()
    texts = (tmp_path / "second").read_text()
    assert "restoring" in texts and "resuming run from step" in texts
    made = fetch(cluster, 1, "run")
    assert "run.json" not in cluster.run(2, ["find", "/tmp/cache"])
    assert "train-00000.parquet" in cluster.run(2, ["find", "/tmp/cache"])
    words = [*long, f"data.dir={tiny_dataset}"]
    assert final_outcome(RunFolder(made)) == alone(words, tmp_path / "alone", tiny_dataset)


def steps_run(folder: SweepFolder) -> int:
    return sum(read_result(stage).steps_run for stage in folder.stages())


@pytest.mark.slow
def test_sweep_uses_all_machines_and_trains_no_step_twice(cluster, small, on_one, tmp_path):
    """The machine of the command, the head, has no CPUs: both workers are on others."""
    log = tmp_path / "log"
    driver = small("sweep", sweep_words("whole"), log, node=0)
    hosts = set()

    def is_over() -> bool:
        found = cluster.run(0, ["sh", "-c", f"cat {SCRATCH}/whole/stages/*/.ranks/* || true"])
        hosts.update(re.findall('"host": "(node.)"', found))
        return driver.poll() is not None

    wait_until(is_over, pause_s=0.5, limit_s=300)
    assert driver.returncode == 0, log.read_text()
    assert hosts == {"node1", "node2"}
    made = SweepFolder(fetch(cluster, 0, "whole"))
    study, expected = on_one
    assert outcome_of(made) == expected
    assert steps_run(made) == study.tree.steps_in_tree
    for node in (1, 2):
        found = cluster.run(node, ["find", "/tmp/cache"])
        assert "train-00000.parquet" in found
        assert "/whole" not in found, "what it has written stays"


@pytest.mark.slow
def test_sweep_survives_the_loss_of_each_machine(cluster, small, on_one, tmp_path):
    words = sweep_words("tree")
    first = small("sweep", words, tmp_path / "first", node=1)
    stages = f"{SCRATCH}/tree/stages"

    def shell(script: str) -> str:
        return cluster.run(1, ["sh", "-c", f"{script} || true"])

    def has_some(host: str) -> bool:
        """Return whether a stage on a machine has a checkpoint in the folder of the sweep."""
        of_one = f"grep -q {host} $s/.ranks/* && ls $s/checkpoints"
        return "step-" in shell(f"cd {stages} && for s in *; do {of_one}; done")

    wait_until(lambda: has_some("node2"), first, pause_s=0.5)
    cluster.kill(2)
    events = f"{SCRATCH}/tree/events.jsonl"
    lost = "begins again: a worker on node2 died"
    longer = cluster.shared / "longer"  # the sweep must not end before the machine is back
    longer.touch()
    wait_until(lambda: lost in shell(f"cat {events}"), first, pause_s=0.5)
    cluster.start(2)
    wait_until(lambda: has_some("node2"), first, pause_s=0.5)
    wait_until(lambda: "tree/stages/" in objects(cluster), first, pause_s=1.0)
    cluster.kill(1)  # with the driver and the folder of the sweep
    longer.unlink()
    first.wait()
    cluster.start_again(1)
    second = small("sweep", words, tmp_path / "second", node=2)
    assert second.wait(300) == 0, (tmp_path / "second").read_text()
    assert "restoring" in (tmp_path / "second").read_text()
    assert outcome_of(SweepFolder(fetch(cluster, 2, "tree"))) == on_one[1]
