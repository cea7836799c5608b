"""Machines for the tests of this folder, and what runs on them."""

import shutil
import subprocess
import sys

import pytest

from orchestrator.cluster.layout import Layout
from orchestrator.data.dataset import load_manifest
from orchestrator.runs.folder import SweepFolder
from orchestrator.sweep.space.expand import load_sweep
from orchestrator.sweep.study import Study
from orchestrator.sweep.trials import data_key
from tests.helpers import machines as helper
from tests.helpers.curves import final_outcome
from tests.helpers.fixtures import Sweeps
from tests.helpers.machines import SLOW_RUN, STORE_PORT, Machines
from tests.helpers.wait import wait_until

LIST = """
import boto3
client = boto3.client("s3")
if not client.list_buckets()["Buckets"]:
    client.create_bucket(Bucket="bucket")
for found in client.list_objects_v2(Bucket="bucket").get("Contents", []):
    print(found["Key"])
"""
WORDS = [*SLOW_RUN, "name=run", "train.log_interval=2", "train.max_steps=60"]
TRIALS = {
    "low": ["schedule.max_lr=5e-3"],
    "low-long": ["schedule.max_lr=5e-3", "train.max_steps=80"],
    "high": ["schedule.max_lr=1e-2"],
    "high-cosine": ["schedule.max_lr=1e-2", "schedule.decay_shape=cosine"],
}
SWEEP = ["schedule.kind=wsd", "train.eval_interval=20", "train.eval_tokens=200"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two machines without Ray."""
    reason = helper.reason_to_skip()
    if reason is not None:
        pytest.skip(f"machines: {reason}")
    found = Machines(tmp_path_factory.mktemp("pair"), cpus=[0, 1])
    try:
        for node in found.nodes:
            node.boot(found.switch)
        yield found
    finally:
        found.end()
    assert not _processes_of(found), "processes of the machines are left"


def _processes_of(found: Machines) -> list[str]:
    listed = subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if str(found.base) in line]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Three machines with Ray: a head without CPUs, and two nodes with one CPU each."""
    with helper.machines(tmp_path_factory.mktemp("cluster"), cpus=[0, 1, 1]) as found:
        yield found


@pytest.fixture
def nodes(cluster):
    """The cluster; all of its machines work again after the test."""
    yield cluster
    cluster.own_env.clear()
    cluster.restore()


@pytest.fixture
def small(cluster, tiny_corpus, tiny_dataset) -> list[str]:
    """Overrides of a small experiment, whose dataset all machines have."""
    return small_experiment(cluster, tiny_corpus, tiny_dataset)


def small_experiment(machines: Machines, tiny_corpus, tiny_dataset) -> list[str]:
    """Copy the tokens to the machines, and `small.yaml`. Return the overrides for them."""
    shared = machines.shared / "tokens"
    if not shared.exists():
        shutil.copytree(tiny_dataset, shared)
    (machines.shared / "small.yaml").write_text("data: {tokenizer: char}\n")
    corpus = machines.shared / tiny_corpus.name
    shutil.copy(tiny_corpus, corpus)
    return [*SLOW_RUN, "train.log_interval=2", f"data.corpus={corpus}", f"data.dir={shared}"]


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


def objects(cluster) -> str:
    return cluster.run(0, [sys.executable, "-c", LIST])


def sweep_words(name: str, *more: str) -> list[str]:
    trials = [f"sweep.trials.{name}.{word}" for name, words in TRIALS.items() for word in words]
    return [*WORDS, *SWEEP, f"name={name}", "compute.num_workers=1", *trials, *more]


@pytest.fixture(scope="session")
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
