"""A run, and sweeps, on two machines that share no folder, only a bucket."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from orchestrator.cluster.layout import Layout
from orchestrator.data.dataset import load_manifest
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.records import read_result
from orchestrator.sweep.space.expand import load_sweep
from orchestrator.sweep.study import Study
from orchestrator.sweep.trials import data_key
from tests.helpers.curves import final_outcome
from tests.helpers.fixtures import Sweeps
from tests.helpers.machines import SLOW_RUN, STORE_PORT
from tests.helpers.wait import wait_until
from tests.machines.test_nodes import alone

LIST = """
import boto3
client = boto3.client("s3")
if not client.list_buckets()["Buckets"]:
    client.create_bucket(Bucket="bucket")
for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
    print(found["Key"])
"""
SCRATCH = "/tmp/cache/espalier/scratch/s3/bucket/m"
WORDS = [*SLOW_RUN, "name=run", "train.log_interval=2", "train.max_steps=60"]
TRIALS = {
    "low": ["schedule.max_lr=5e-3"],
    "low-long": ["schedule.max_lr=5e-3", "train.max_steps=80"],
    "high": ["schedule.max_lr=1e-2"],
    "high-cosine": ["schedule.max_lr=1e-2", "schedule.decay_shape=cosine"],
}
SWEEP = ["schedule.kind=wsd", "train.eval_interval=20", "train.eval_tokens=200"]


@pytest.fixture(scope="module")
def store(cluster, tmp_path_factory):
    """A store on the head."""
    pytest.importorskip("moto")
    log = tmp_path_factory.mktemp("store") / "log"
    options = ["-H", cluster.nodes[0].address, "-p", str(STORE_PORT)]
    store = cluster.popen(0, [sys.executable, "-m", "moto.server", *options], log)
    wait_until(lambda: "Running on" in log.read_text(), store)
    yield objects(cluster)
    store.kill()


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


def objects(cluster) -> str:
    return cluster.run(0, [sys.executable, "-c", LIST])


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


def sweep_words(name: str, *more: str) -> list[str]:
    trials = [f"sweep.trials.{name}.{word}" for name, words in TRIALS.items() for word in words]
    return [*WORDS, *SWEEP, f"name={name}", "compute.num_workers=1", *trials, *more]


@pytest.fixture(scope="module")
def on_one(tiny_dataset, tmp_path_factory):
    """The sweep on one machine, and its outcome."""
    folder = SweepFolder(tmp_path_factory.mktemp("one") / "tree")
    folder.path.mkdir()
    sweep = load_sweep(None, sweep_words("tree", f"data.dir={tiny_dataset}"))
    datasets = {data_key(e.data): load_manifest(tiny_dataset) for e in sweep.experiments}
    study = Study(sweep, folder, Layout(1, 1, False), datasets)
    Sweeps(tiny_dataset, folder.path.parent, {}).run(study)
    return study, outcome_of(folder)


def outcome_of(folder: SweepFolder) -> dict:
    """Return bits and curve of each trial, and the table with their ranking."""
    trials = {trial.name: final_outcome(trial) for trial in folder.trials()}
    return {**trials, "table": folder.comparison_file.read_text()}


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
    wait_until(lambda: lost in shell(f"cat {events}"), first, pause_s=0.5)
    cluster.start(2)
    wait_until(lambda: has_some("node2"), first, pause_s=0.5)
    wait_until(lambda: "tree/stages/" in objects(cluster), first, pause_s=1.0)
    cluster.kill(1)  # with the driver and the folder of the sweep
    first.wait()
    cluster.start_again(1)
    second = small("sweep", words, tmp_path / "second", node=2)
    assert second.wait(300) == 0, (tmp_path / "second").read_text()
    assert "restoring" in (tmp_path / "second").read_text()
    assert outcome_of(SweepFolder(fetch(cluster, 2, "tree"))) == on_one[1]
