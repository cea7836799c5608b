"""A run on two machines that share no folder, only a bucket."""

import shutil
import sys

import pytest

from orchestrator.runs.folder import RunFolder
from tests.helpers.curves import final_outcome
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


@pytest.mark.slow
def test_run_on_machines_that_share_only_a_bucket_survives_the_loss_of_one(
    cluster, tiny_corpus, tiny_dataset, tmp_path
):
    pytest.importorskip("moto")
    corpus = cluster.shared / tiny_corpus.name
    shutil.copy(tiny_corpus, corpus)
    file = cluster.shared / "small.yaml"
    file.write_text("data: {tokenizer: char}\n")
    words = [*WORDS, f"data.corpus={corpus}"]
    options = ["-H", cluster.nodes[0].address, "-p", str(STORE_PORT)]
    store = cluster.popen(0, [sys.executable, "-m", "moto.server", *options], tmp_path / "store")

    def objects() -> str:
        return cluster.run(0, [sys.executable, "-c", LIST])

    def start(log):
        command = ["pipelines/train.py", str(file), *words, "storage=s3://bucket/m"]
        return cluster.drive([*command, "compute.num_workers=2"], log, node=1)

    try:
        wait_until(lambda: "Running on" in (tmp_path / "store").read_text(), store)
        objects()
        first = start(tmp_path / "first")
        wait_until(lambda: "checkpoints/step-" in objects(), first, pause_s=1.0)
        cluster.kill(1)
        first.wait()
        cluster.start_again(1)
        assert "run" not in cluster.run(1, ["ls", "/tmp"])
        second = start(tmp_path / "second")
        assert second.wait(300) == 0, (tmp_path / "second").read_text()
        texts = (tmp_path / "second").read_text()
        assert "restoring" in texts and "resuming run from step" in texts
        cluster.run(1, ["cp", "-r", f"{SCRATCH}/run", str(cluster.shared / "made")])
        assert "run.json" not in cluster.run(2, ["find", "/tmp/cache"])
        assert "train-00000.parquet" in cluster.run(2, ["find", "/tmp/cache"])
    finally:
        store.kill()
        cluster.restore()
    words = [*words, f"data.dir={tiny_dataset}"]
    assert final_outcome(RunFolder(cluster.shared / "made")) == alone(
        words, tmp_path / "alone", tiny_dataset
    )
