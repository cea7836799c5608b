"""Jobs of `ray job submit`, from another shell, to a head that requires a token.

One job ends, one fails and one is stopped. They overlap, because most of their time is spent on
starting processes. They are submitted from a copy of this checkout.
"""

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
from ray.job_submission import JobSubmissionClient

from deploy import submit
from orchestrator.checkpoint import store as checkpoint
from orchestrator.code_hashes import sources_sha256
from orchestrator.config.experiment import load_experiment
from orchestrator.data.prepare import prepare
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from tests.helpers import stores
from tests.helpers.here import here

REPO = Path(__file__).resolve().parent.parent
STEPS = 20
# Files that .gitignore and .rayignore exclude from the package of a job.
EXCLUDED = (
    "runs/old/summary.json",
    "data/train-00000.parquet",
    "mlflow.db",
    ".venv/bin/python",
    "corpus/book.txt",
    "documents.jsonl",
    "ckpt.pt",
    "train.bin",
)


SMALL = {
    # A file of the user travels with the job.
    "model": {"kind": "tests/own/conv.py:GatedConv", "block_size": 32, "n_layer": 1, "width": 32},
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


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of this checkout with a small default experiment, its own data and changed code."""
    folder = tmp_path_factory.mktemp("submit") / "checkout"
    shutil.copytree(REPO, folder, ignore=_unversioned)
    with open(folder / "pipelines" / "train.py", "a", encoding="utf-8") as script:
        script.write("# a change that only this copy has\n")
    text = folder.parent / "text.txt"
    text.write_text("".join(f"{n} times seven is {7 * n}.\n" for n in range(2000)), "utf-8")
    data = {"corpus": str(text), "tokenizer": "byte", "dir": str(folder.parent / "tokens")}
    experiment = {"data": data, **SMALL}
    file = folder / "configs" / "quickstart.yaml"
    file.write_text(yaml.safe_dump(experiment), "utf-8")
    with here():
        prepare(load_experiment(file, []).data, folder.parent / "tokens")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "a copy"]):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *command],
            cwd=folder,
            check=True,
        )
    for name in EXCLUDED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for a job", "utf-8")
    return folder


def _unversioned(folder: str, names: list[str]) -> set[str]:
    """Return the names in a folder that .gitignore excludes; `/name` counts only at the top."""
    patterns = [".git"]
    for line in (REPO / ".gitignore").read_text("utf-8").split():
        if not line.startswith("/") or Path(folder) == REPO:
            patterns.append(line.strip("/"))
    return shutil.ignore_patterns(*patterns)(folder, names)


@pytest.fixture(scope="module")
def jobs(ray_head, checkout) -> SimpleNamespace:
    """The three jobs after their end: exit status, printed text and run folder of each.

    `package` has the sizes of the files that were shipped.
    """
    base = checkout.parent
    storage = base / "storage"
    home = base / "home"
    venv = base / "venv"
    for folder in (home, venv):
        folder.mkdir()
    for folder in (storage, home / "espalier"):
        stores.copy_empty(folder / "mlflow" / "mlflow.db")
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / "installed").touch()
    shell = {
        "PATH": os.environ["PATH"],
        "HOME": str(base),
        "RAY_API_SERVER_ADDRESS": ray_head.dashboard,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": ray_head.env["RAY_AUTH_TOKEN"],
        "PYTHONUNBUFFERED": "1",  # the logs below are read while they are written
    }
    submit = [str(venv / "bin" / "ray"), "job", "submit", "--working-dir", "."]
    # Without this setting, a job has the home directory of the head process.
    with_home = json.dumps({"env_vars": {"HOME": str(home)}})
    commands = {
        "ends": [
            "make",
            "--silent",
            "submit",
            f"VENV={venv}",
            f"ARGS=storage={storage} data.dir={base / 'own'} train.max_steps={STEPS}",
        ],
        "fails": [
            *submit,
            "--",
            "pipelines/train.py",
            f"storage={storage}",
            "name=wrong",
            "train.max_stepz=5",
        ],
        "is_stopped": [*submit, "--runtime-env-json", with_home, "--", "pipelines/train.py"],
    }
    folders = {
        "ends": storage / "quickstart",
        "fails": storage / "wrong",
        "is_stopped": home / "espalier" / "quickstart",
    }
    logs = {name: base / f"{name}.log" for name in commands}
    running = {}

    def start(name: str) -> None:
        with open(logs[name], "w") as out:
            running[name] = subprocess.Popen(
                commands[name], cwd=checkout, env=shell, stdout=out, stderr=out
            )

    def wait(name: str, is_ready) -> None:
        deadline = time.monotonic() + 200
        while not is_ready():
            assert running[name].poll() is None, logs[name].read_text("utf-8")
            assert time.monotonic() < deadline, logs[name].read_text("utf-8")
            time.sleep(0.1)

    def is_running(name: str) -> bool:
        return "Running entrypoint" in logs[name].read_text("utf-8")

    try:
        # Ray may remove the package when a job ends while another one with the same package starts.
        start("is_stopped")
        wait("is_stopped", lambda: is_running("is_stopped"))
        start("ends")
        start("fails")
        wait("is_stopped", lambda: all(map(is_running, commands)))
        checkpoints = folders["is_stopped"] / "checkpoints"
        tracking = folders["is_stopped"] / "tracking.json"
        wait("is_stopped", lambda: len(checkpoint.steps(checkpoints)) >= 2 and tracking.exists())
        package = _package(ray_head)  # Ray removes it when no job uses it
        job = re.search(r"raysubmit_\w+", logs["is_stopped"].read_text("utf-8"))[0]
        # As `ray job stop` does it.
        JobSubmissionClient(ray_head.dashboard).stop_job(job)
        ended = {name: process.wait(120) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    found = SimpleNamespace(package=package)
    for name, status in ended.items():
        log = logs[name].read_text("utf-8")
        setattr(found, name, SimpleNamespace(status=status, log=log, run=folders[name]))
    return found


def _package(ray_head) -> dict[str, int]:
    """Return names and sizes of the shipped files, which the head has unpacked.

    Python compiles some of them there.
    """
    resources = ray_head.folder / "session_latest" / "runtime_resources"
    sizes = {}
    for root in (resources / "working_dir_files").glob("_ray_pkg_*/"):
        for file in root.rglob("*"):
            if file.is_file() and file.parent.name != "__pycache__":
                sizes[str(file.relative_to(root))] = file.stat().st_size
    return sizes


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def test_job_prints_its_progress_and_ends_with_status_0(jobs):
    assert jobs.ends.status == 0, jobs.ends.log
    steps = re.findall(r"^step +(\d+)/20 \| loss", jobs.ends.log, re.MULTILINE)
    assert steps == ["5", "10", "15", "20"]
    summary = read(jobs.ends.run / "summary.json")
    assert (summary["status"], summary["step"]) == ("FINISHED", STEPS)
    assert checkpoint.latest_valid(jobs.ends.run / "checkpoints") == Path(summary["checkpoint"])


def test_mistake_ends_with_status_1_and_a_message_that_names_it(jobs):
    assert jobs.fails.status == 1, jobs.fails.log
    printed = jobs.fails.log.split("Running entrypoint")[1]
    assert re.search(r"^error: .*max_stepz.*max_steps", printed, re.MULTILINE)
    assert "Traceback" not in printed
    assert submit.ACCEPTED.search(jobs.fails.log)
    assert [
        found[1] for found in map(submit.FAILED.search, jobs.fails.log.splitlines()) if found
    ] == ["2"]
    assert not jobs.fails.run.exists()


def test_stopped_job_leaves_a_killed_run_and_a_valid_checkpoint(jobs):
    """Ray gives it 3 s. Without `storage`, the run is in the home directory."""
    run = jobs.is_stopped.run
    assert "was stopped" in jobs.is_stopped.log
    assert "training quickstart from step 0" in jobs.is_stopped.log
    summary = read(run / "summary.json")
    assert (summary["status"], summary["exit_status"]) == ("KILLED", 75)
    assert summary["step"] >= journal.last(RunFolder(run))["step"], "a logged step was lost"
    checkpoints = run / "checkpoints"
    last = checkpoint.path_of(checkpoints, checkpoint.steps(checkpoints)[-1])
    assert checkpoint.latest_valid(checkpoints, warn=pytest.fail) == last
    assert last == checkpoint.path_of(checkpoints, summary["step"])
    with sqlite3.connect(run.parent / "mlflow" / "mlflow.db") as db:
        assert db.execute("select status from runs").fetchall() == [("KILLED",)]


def test_run_records_the_sources_that_were_shipped(jobs, checkout):
    """`make submit` sends the commit; a bare `ray job submit` does not."""
    submitted = read(jobs.ends.run / "run.json")["tags"]
    bare = read(jobs.is_stopped.run / "run.json")["tags"]
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    )
    assert submitted["mlflow.source.git.commit"] == head.stdout.strip()
    assert bare["mlflow.source.git.commit"] == "unknown"
    assert "source.dirty" in submitted
    assert "source.dirty" not in bare
    # The job runs the shipped sources, not those that are installed on the head.
    assert submitted["source.sha256"] == bare["source.sha256"] == sources_sha256(checkout)
    assert sources_sha256(checkout) != sources_sha256(REPO)


def test_package_has_the_code_and_no_data(jobs):
    assert {"pipelines/train.py", "orchestrator/jobs/train.py", "model/gpt.py"} <= set(jobs.package)
    assert set(jobs.package) & set(EXCLUDED) == set()
    assert not [name for name in jobs.package if name.startswith((".git/", "runs/"))]
    assert sum(jobs.package.values()) < 5e6


def test_request_without_the_token_is_refused(ray_head):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{ray_head.dashboard}/api/jobs/", timeout=10)  # noqa: S310 - loopback
    assert refused.value.code == 401
