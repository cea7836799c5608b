"""`ray job submit` as another shell does it, to a head that asks for a token: one job that ends, one that fails and one
that is stopped, side by side from a copy of this checkout, because most of a job's time is processes starting."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs.sources import sources_sha256

REPO = Path(__file__).resolve().parent.parent
STEPS = 20
# What must not travel, by .gitignore and by .rayignore.
STAYS = (
    "runs/old/summary.json",
    "data/train-00000.parquet",
    "mlflow.db",
    ".venv/bin/python",
    "corpus/book.txt",
    "documents.jsonl",
    "ckpt.pt",
    "train.bin",
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of this checkout with a default experiment of seconds, data of its own and a line that only it has."""
    folder = tmp_path_factory.mktemp("submit") / "checkout"
    unversioned = [line.strip("/") for line in (REPO / ".gitignore").read_text("utf-8").split()]
    shutil.copytree(REPO, folder, ignore=shutil.ignore_patterns(".git", *unversioned))
    with open(folder / "pipelines" / "train.py", "a", encoding="utf-8") as script:
        script.write("# a change that only this copy has\n")
    text = folder.parent / "text.txt"
    text.write_text("".join(f"{n} times seven is {7 * n}.\n" for n in range(2000)), "utf-8")
    (folder / "configs" / "quickstart.yaml").write_text(
        yaml.safe_dump(
            {
                "data": {
                    "corpus": str(text),
                    "tokenizer": "byte",
                    "dir": str(folder.parent / "tokens"),
                },
                "model": {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 32},
                "train": {
                    "max_steps": 1_000_000,
                    "micro_batch_size": 4,
                    "global_batch_size": 4,
                    "log_interval": 5,
                    "eval_interval": None,
                    "checkpoint_interval": 10,
                },
                "compute": {"cpus_per_worker": 1},
            }
        ),
        "utf-8",
    )
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a copy"]):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *command],
            cwd=folder,
            check=True,
        )
    for name in STAYS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for a job", "utf-8")
    return folder


@pytest.fixture(scope="module")
def jobs(ray_head, checkout) -> SimpleNamespace:
    """The three jobs, ended; of each its exit status, what its shell saw, and the run's folder."""
    base = checkout.parent
    storage, home, venv = base / "storage", base / "home", base / "venv"
    for folder in (home, venv):
        folder.mkdir()
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / "installed").touch()
    shell = {
        "PATH": os.environ["PATH"],
        "HOME": str(base),
        "RAY_API_SERVER_ADDRESS": ray_head.dashboard,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": ray_head.env["RAY_AUTH_TOKEN"],
    }
    submit = [str(venv / "bin" / "ray"), "job", "submit", "--working-dir", "."]
    at_home = json.dumps(
        {"env_vars": {"HOME": str(home)}}
    )  # elsewhere it is the home of whoever started the head
    commands = {
        "ends": [
            "make",
            "--silent",
            "submit",
            f"VENV={venv}",
            f"ARGS=storage={storage} train.max_steps={STEPS}",
        ],
        "fails": [
            *submit,
            "--",
            "pipelines/train.py",
            f"storage={storage}",
            "name=wrong",
            "train.max_stepz=5",
        ],
        "is_stopped": [*submit, "--runtime-env-json", at_home, "--", "pipelines/train.py"],
    }
    folders = {
        "ends": storage / "quickstart",
        "fails": storage / "wrong",
        "is_stopped": home / "espalier" / "quickstart",
    }
    logs, running = {name: base / f"{name}.log" for name in commands}, {}

    def start(name: str) -> None:
        with open(logs[name], "w") as out:
            running[name] = subprocess.Popen(
                commands[name], cwd=checkout, env=shell, stdout=out, stderr=out
            )

    def wait(name: str, ready) -> None:
        deadline = time.monotonic() + 200
        while not ready():
            assert running[name].poll() is None, logs[name].read_text("utf-8")
            assert time.monotonic() < deadline, logs[name].read_text("utf-8")
            time.sleep(0.1)

    try:
        start("ends")
        start("fails")
        wait(
            "ends", (base / "tokens" / "manifest.json").exists
        )  # the tokens are prepared once, for both
        start("is_stopped")
        wait(
            "is_stopped", lambda: len(checkpoint.steps(folders["is_stopped"] / "checkpoints")) >= 2
        )
        package = _package(ray_head)  # while a job uses it: Ray removes it afterwards
        job = re.search(r"raysubmit_\w+", logs["is_stopped"].read_text("utf-8"))[0]
        subprocess.run(
            [*submit[:2], "stop", job],
            cwd=base,
            env=shell,
            check=True,
            capture_output=True,
            timeout=60,
        )
        ended = {name: process.wait(120) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    return SimpleNamespace(
        **{
            name: SimpleNamespace(
                status=ended[name], log=logs[name].read_text("utf-8"), run=folders[name]
            )
            for name in commands
        },
        package=package,
    )


def _package(ray_head) -> dict[str, int]:
    """Names and sizes of the files that were shipped, as the head has unpacked them."""
    resources = ray_head.folder / "session_latest" / "runtime_resources"
    roots = (resources / "working_dir_files").glob("_ray_pkg_*/")
    return {
        str(p.relative_to(root)): p.stat().st_size
        for root in roots
        for p in root.rglob("*")
        if p.is_file()
    }


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def test_a_job_streams_its_progress_and_ends_with_status_0(jobs):
    assert jobs.ends.status == 0, jobs.ends.log
    shown = [int(n) for n in re.findall(r"^step +(\d+)/20 \| loss", jobs.ends.log, re.MULTILINE)]
    assert shown == [5, 10, 15, 20]
    summary = read(jobs.ends.run / "summary.json")
    assert (summary["status"], summary["step"]) == ("FINISHED", STEPS)
    assert checkpoint.latest_valid(jobs.ends.run / "checkpoints") == Path(summary["checkpoint"])


def test_a_mistake_ends_with_status_1_and_one_line_that_names_it(jobs):
    assert jobs.fails.status == 1, jobs.fails.log
    said = jobs.fails.log.split("Running entrypoint")[1]
    assert re.search(r"^error: .*max_stepz.*max_steps", said, re.MULTILINE)
    assert "Traceback" not in said
    assert not jobs.fails.run.exists()


def test_a_stopped_job_leaves_a_killed_run_and_a_valid_checkpoint(jobs):
    """Within the 3 s that Ray gives by default, in the home directory, where a bare job's runs are."""
    run = jobs.is_stopped.run
    assert "was stopped" in jobs.is_stopped.log
    assert "training quickstart from step 0" in jobs.is_stopped.log
    assert read(run / "summary.json")["status"] == "KILLED"
    found = checkpoint.latest_valid(run / "checkpoints", warn=pytest.fail)
    assert found == checkpoint.path_of(
        run / "checkpoints", checkpoint.steps(run / "checkpoints")[-1]
    )
    with sqlite3.connect(run.parent / "mlflow" / "mlflow.db") as db:
        assert db.execute("select status from runs").fetchall() == [("KILLED",)]


def test_a_run_knows_the_sources_that_were_shipped(jobs, checkout):
    submitted, bare = (read(job.run / "run.json")["tags"] for job in (jobs.ends, jobs.is_stopped))
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert submitted["mlflow.source.git.commit"] == head.stdout.strip()
    assert bare["mlflow.source.git.commit"] == "unknown"
    assert "source.dirty" in submitted
    assert "source.dirty" not in bare
    # The copy's own line is in it: the job runs what was shipped, not what the head has installed.
    assert (
        submitted["source.sha256"]
        == bare["source.sha256"]
        == sources_sha256(checkout)
        != sources_sha256(REPO)
    )


def test_the_package_holds_the_code_and_no_data(jobs):
    assert {"pipelines/train.py", "orchestrator/jobs/train.py", "model/gpt.py"} <= set(jobs.package)
    assert set(jobs.package) & set(STAYS) == set()
    assert not [name for name in jobs.package if name.startswith((".git/", "runs/"))]
    assert sum(jobs.package.values()) < 5e6


def test_without_the_token_nobody_gets_in(ray_head):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{ray_head.dashboard}/api/jobs/", timeout=10)  # noqa: S310 - loopback
    assert refused.value.code == 401
