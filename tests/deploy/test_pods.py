"""How the pods of deploy/kuberay end: with processes in a namespace, and with a real Ray."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import EXIT_AGAIN
from tests.deploy.test_kuberay import CLUSTERS, groups
from tests.helpers import machines, small_run
from tests.helpers.wait import wait_until


def hooks(name: str) -> list[list[str]]:
    containers = [group["template"]["spec"]["containers"][0] for group in groups(name)]
    return [container["lifecycle"]["preStop"]["exec"]["command"] for container in containers]


def test_all_heads_and_all_workers_end_in_the_same_way():
    head, worker = hooks("train.yaml")
    for name in CLUSTERS:
        assert hooks(name)[0] == head
        assert all(command == worker for command in hooks(name)[1:])


def test_ray_understands_how_a_worker_leaves():
    from ray.scripts.scripts import drain_node

    command = hooks("train.yaml")[1][2].split(";")[0]
    words = re.sub(r"'[^']*'", "reason", command).split()
    assert words[:2] == ["ray", "drain-node"]
    given = drain_node.make_context("drain-node", words[2:]).params
    assert given["node_id"] is None  # its own
    assert given["deadline_remaining_seconds"] == 60


@pytest.fixture
def namespace():
    """Return the command that runs another one with processes of its own, as in a pod."""
    command = ["unshare", "--user", "--map-root-user", "--pid", "--mount-proc", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*command, "true"]).returncode:
        pytest.skip("no namespaces for processes on this machine")
    return command


def printed_by_pod(folder, scripts, namespace, hook) -> str:
    """Run the script `pod` with a hook as its arguments. The scripts are commands of the pod."""
    for name, script in scripts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("#!/bin/sh\n" + script)
        (folder / name).chmod(0o755)
    done = subprocess.run(
        [*namespace, "./pod", *hook],
        cwd=folder,
        env={"PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_worker_ends_as_soon_as_ray_has_left(tmp_path, namespace):
    """`ray start --block` goes on after a drained raylet: the command looks for the raylet."""
    scripts = {"ray": "", "raylet": "echo > began\nsleep 1; echo left > left\n"}
    scripts["pod"] = './raylet &\nuntil test -e began; do sleep 0.1; done\n"$@"\ncat left\n'
    assert printed_by_pod(tmp_path, scripts, namespace, hooks("train.yaml")[1]) == "left\n"


def test_head_ends_after_its_driver_has_saved(tmp_path, namespace):
    """The command finds drivers by their names."""
    scripts = {
        "pipelines/train.py": "trap 'sleep 1; echo saved > saved; exit 75' TERM\necho > began\n"
        "while :; do sleep 0.1; done\n",
        "pod": "sh -c 'pipelines/train.py x.yaml' &\nuntil test -e began; do sleep 0.1; done\n"
        '"$@"\ncat saved\n',
    }
    assert printed_by_pod(tmp_path, scripts, namespace, hooks("train.yaml")[0]) == "saved\n"


@pytest.mark.slow
def test_worker_leaves_when_its_run_has_saved(tmp_path, tiny_corpus, tiny_dataset):
    reason = machines.reason_to_skip()
    if reason is not None:
        pytest.skip(f"machines: {reason}")
    two = machines.Machines(tmp_path, cpus=[0, 1])
    corpus = Path(shutil.copy(tiny_corpus, two.shared))
    shutil.copytree(tiny_dataset, two.shared / "tokens")
    words = [f"data.dir={two.shared / 'tokens'}", "train.max_steps=100000"]
    command = small_run.command(two.shared, corpus, *words, "compute.num_workers=1")[1:]
    run = two.shared / "small"
    try:
        two.start(0, 1)
        driver = two.drive(command, tmp_path / "log")
        wait_until(lambda: small_run.logged(run) >= 20, driver)
        # Without the wait, which would find the Ray of the other machine.
        leave = hooks("train.yaml")[1][2].split("; for ")[0]
        two.run(1, ["sh", "-c", leave], two.head)
        assert driver.wait(60) == EXIT_AGAIN, (tmp_path / "log").read_text()
        assert small_run.summary(run)["step"] >= small_run.logged(run) >= 20
        count = "import ray; ray.init(); print('alive', sum(n['Alive'] for n in ray.nodes()))"
        ask = [sys.executable, "-c", count]
        wait_until(lambda: "alive 1\n" in two.run(0, ask, two.head))
    finally:
        two.end()
