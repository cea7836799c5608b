"""`pipelines/train.py` on a real cluster: killed runs equal undisturbed ones bit for bit."""

import json
import math
import os
import re
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cost import estimate as plan
from orchestrator.errors import UserError
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import marks
from tests.helpers import stores
from tests.helpers.local_job import LocalTrainJob
from tests.helpers.small_run import (
    REPO,
    STEPS,
    begin,
    command,
    curve,
    run,
    run_here,
    summary,
    wait_for_step,
)
from tests.helpers.wait import wait_until


def test_output_and_summary_of_a_finished_run(golden):
    assert_is_shown(*golden)
    run_dir, _ = golden
    facts = summary(run_dir)
    assert facts["status"] == "FINISHED"
    assert facts["step"] == STEPS
    assert facts["tokens"] == STEPS * 16 * 64
    assert facts["train_loss"] < 2.5
    assert facts["val_loss"] == facts["best_val_loss"] == curve(run_dir)[-1]["val/loss"]
    # Each token is one character of one byte.
    assert facts["val_bits_per_byte"] == pytest.approx(facts["val_loss"] / math.log(2))
    assert Path(facts["checkpoint"]) == checkpoint.latest_valid(run_dir / "checkpoints")
    weights = checkpoint.load_tensors(Path(facts["checkpoint"]), "model")
    assert facts["weights_sha256"] == checkpoint.weights_sha256(weights)


def assert_is_shown(run_dir: Path, text: str) -> None:
    """Check the output of a finished run."""
    for words in (
        f"step {STEPS}/{STEPS} | loss",
        "tok/s",
        "ETA",
        "val loss",
        f"pipelines/sample.py {run_dir}",
        "sample",
    ):
        assert words in text


def test_mlflow_has_one_finished_run_with_each_point_once(golden):
    run_dir, _ = golden
    with sqlite3.connect(run_dir.parent / "mlflow" / "mlflow.db") as db:
        runs = db.execute("select run_uuid, status from runs").fetchall()
        points = db.execute(
            "select step, value from metrics where key = 'train/loss' order by step"
        ).fetchall()
    assert runs == [(summary(run_dir)["mlflow_run_id"], "FINISHED")]
    assert points == [(r["step"], r["train/loss"]) for r in curve(run_dir) if "train/loss" in r]


def test_dry_run_prints_estimates_and_writes_nothing(ray_head, tiny_corpus, tmp_path):
    words = command(tmp_path / "storage", tiny_corpus, "compute.num_workers=1", "--dry-run")
    done = subprocess.run(words, env=ray_head.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "storage").exists()
    for part in (
        "16 sequences per step / 4 per micro-batch = 4 micro-batches",
        "1,024 tokens per step",
        "parameters",
        "steps of",
        "evaluations of",
        "GiB resident per worker",
        "of disk at most",
        "1 worker(s) with 1 CPU(s) each",
    ):
        assert part in done.stdout


def assert_estimate_is_compared(run_dir: Path, text: str) -> None:
    facts = summary(run_dir)
    if "estimated" not in facts:  # the steps took less than three seconds
        assert "expected: " not in text
        return
    expected, seen = facts["estimated"], facts["measured"]
    assert seen["time_s"] == facts["wall_s"]
    assert seen["memory_gib"] == pytest.approx(expected["memory_gib"], rel=0.25)
    assert seen["final_disk_bytes"] == pytest.approx(expected["final_disk_bytes"], rel=0.05)
    assert "expected: " in text
    assert plan.comparison_line(expected, seen) in text


# torch's process group can deadlock at the end of a worker while it holds the GIL. This hook sleeps
# in the same way after the worker has reported its end. Ray would wait for it for ten minutes.
STICK = """
import sys, threading, time
def stick():
    while not hasattr(sys.modules.get("orchestrator.workers.watchdog"), "Watchdog"):
        time.sleep(0.05)
    import ctypes, pathlib
    dog = sys.modules["orchestrator.workers.watchdog"].Watchdog
    close = dog.close
    def close_and_sleep(self, *args):
        close(self, *args)
        pathlib.Path(__file__).with_name(f"slept-{self.rank}").touch()
        ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the GIL
    dog.close = close_and_sleep
threading.Thread(target=stick, daemon=True).start()
"""


def equals(run_dir: Path, golden_dir: Path) -> bool:
    """Return whether two runs have the same exact metrics and the same weights."""
    same_curve = curve(run_dir) == curve(golden_dir)
    return (
        same_curve and summary(run_dir)["weights_sha256"] == summary(golden_dir)["weights_sha256"]
    )


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(0, id="hanging rank"),
        pytest.param(1, id="killed worker, then hanging rank", marks=pytest.mark.slow),
    ],
)
def test_hanging_rank_is_killed_and_restarted_and_two_workers_equal_one(
    golden, ray_head, tiny_corpus, tiny_dataset, tmp_path, kills
):
    """The driver stays. Both ranks stick in their last attempt after they have reported its end."""
    stores.copy_empty(tmp_path / "mlflow" / "mlflow.db")
    run_dir, hook = tmp_path / "small", tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(STICK)
    # Workers inherit the runtime environment of a job.
    job = {"runtime_env": {"env_vars": {"PYTHONPATH": f"{hook}{os.pathsep}{REPO}"}}}
    process = begin(
        ray_head,
        tmp_path,
        tiny_corpus,
        f"data.dir={tiny_dataset}",
        "compute.num_workers=2",
        "compute.hang_after_s=2",
        RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(job),
    )
    wait_for_step(run_dir, 10, process)
    if kills:
        os.kill(worker_starts(run_dir)[-1]["pid"], signal.SIGKILL)
    wait_until(lambda: len(worker_starts(run_dir)) == 1 + kills, process)
    # Wait until the last checkpoint is some steps ago: shortly after one, the limit is higher.
    first_pid = worker_starts(run_dir)[-1]["pid"]
    victim = wait_until(lambda: rank_1_between_checkpoints(run_dir, first_pid), process)
    os.kill(victim.pid, signal.SIGSTOP)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert len(worker_starts(run_dir)) == 2 + kills
    (hang,) = [e for e in events.read(RunFolder(run_dir)) if e["kind"] == "hang"]
    assert hang["message"].startswith(f"rank 1 (process {victim.pid} on ")
    assert sorted(f.name for f in (run_dir / "hangs" / "0001").iterdir()) == [
        "hang-rank0.txt",
        "hang-rank1.txt",
    ]
    assert sorted(p.name for p in hook.glob("slept-*")) == ["slept-0", "slept-1"], (
        "the hook did not run"
    )
    assert equals(run_dir, golden[0])
    assert_is_shown(run_dir, out)
    assert_estimate_is_compared(run_dir, out)


def worker_starts(run_dir: Path) -> list[dict]:
    """Return the starts of the workers of a run, the first one first."""
    lines = (run_dir / "attempts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def rank_1_between_checkpoints(run_dir: Path, first_pid: int) -> marks.Mark | None:
    """Return the mark of rank 1, if the current workers train and no checkpoint is near."""
    found = {mark.rank: mark for mark in marks.read(RunFolder(run_dir))}
    if len(found) < 2 or found[0].pid != first_pid:
        return None
    return found[1] if found[1].step > 12 and found[1].step % 10 in (3, 4, 5) else None


def test_run_killed_on_two_workers_and_finished_on_one_equals_undisturbed_run(
    golden, ray_head, tiny_corpus, tmp_path
):
    run_dir = tmp_path / "small"
    stores.copy_empty(tmp_path / "mlflow" / "mlflow.db")
    process = begin(ray_head, tmp_path, tiny_corpus, "compute.num_workers=2", "--profile=5")
    wait_for_step(run_dir, 20, process)
    process.kill()
    process.wait(30)
    assert not (run_dir / "summary.json").exists(), "the run ended before it could be killed"
    again = run(ray_head, tmp_path, tiny_corpus, "compute.num_workers=1", "--profile", "5")
    assert "resuming small from step" in again.stdout
    assert "estimated" not in summary(run_dir), (
        "the estimate of a whole run was compared with a part of it"
    )
    assert equals(run_dir, golden[0])
    with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as db:
        assert db.execute("select status from runs").fetchall() == [("FINISHED",)]
        points = db.execute(
            "select step, count(*) from metrics where key = 'train/loss' group by step"
        ).fetchall()
    assert points == [(r["step"], 1) for r in curve(golden[0]) if "train/loss" in r]
    profile = RunFolder(run_dir).trace_file
    assert f"profile of 5 steps of rank 0: {profile} " in again.stdout
    assert "aten::" in again.stdout
    (sent,) = (tmp_path / "mlflow").rglob(profile.name)
    assert sent.read_bytes() == profile.read_bytes()


def test_finished_run_prints_summary_again_and_other_experiment_is_refused(
    golden, tiny_corpus, capsys, monkeypatch
):
    run_dir, _ = golden
    before = (run_dir / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(LocalTrainJob, "profile", 5)
    assert run_here(run_dir.parent, tiny_corpus) == 0
    text = capsys.readouterr().out
    assert "nothing to profile" in text
    assert "is finished" in text
    assert summary(run_dir)["weights_sha256"] in text
    with pytest.raises(UserError, match=re.escape("schedule.max_lr: before 0.002, now 0.001")):
        run_here(run_dir.parent, tiny_corpus, "schedule.max_lr=1e-3")
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_run_is_locked_and_sigterm_works_while_ray_starts(tiny_corpus, tmp_path):
    """A local Ray needs seconds to start and installs its own signal handlers."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    start = {"args": command(tmp_path, tiny_corpus), "env": env, "text": True}
    process = subprocess.Popen(**start, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == "starting Ray …\n"
    process.send_signal(signal.SIGSTOP)  # Ray could have started before the second one ends
    second = subprocess.run(**start, capture_output=True, timeout=60)
    assert (second.returncode, second.stdout) == (75, "")
    assert f"held by process {process.pid} on " in second.stderr
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert err == "terminated; run the same command again\n"
    assert os.listdir(tmp_path) == [], "it left files behind"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_step=3", "did you mean train.max_steps"),
        (
            "schedule.warmup_steps=100",
            "schedule.warmup_steps: 100 must be below train.max_steps=60",
        ),
        ("data.corpus=/no/such/file", "/no/such/file"),
        ("data.tokenizer=bpe:12", "data.tokenizer: 'bpe:12': the size must be a number from 257"),
        ("train.init_from=/no/such/weights", "train.init_from: '/no/such/weights' does not exist"),
        ("tracking.uri=http://me:hunter2@host/", "set $MLFLOW_TRACKING_URI"),
        ("storage=/dev/null/runs", "storage: /dev/null/runs cannot be written to"),
        ("storage=/proc/nothing", "storage: /proc/nothing cannot be written to"),
        *(
            (f"{field}=/{300 * 'n'}", "cannot be opened (File name too long)")
            for field in ("data.corpus", "data.dir", "storage", "train.init_from")
        ),
    ],
)
def test_user_error_is_one_line_with_status_2_and_writes_nothing(
    typed, tiny_corpus, tmp_path, override, words
):
    status, text = typed("train.py", *command(tmp_path / "storage", tiny_corpus, override)[2:])
    assert status == 2, text
    assert words in text
    assert "hunter2" not in text
    assert len(text.strip().splitlines()) == 1
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("train.py", ["--profile"], "--profile : give the number of steps"),
        ("train.py", ["--profile", "0"], "1 to 100"),
        ("train.py", ["--profile=many"], "--profile many: give the number of steps"),
        ("train.py", ["--profile", "5", "--dry-run"], "of a run"),
        ("sweep.py", ["--profile", "5"], "--profile: no such option"),
    ],
)
def test_profile_that_cannot_be_made_is_one_line_with_status_2(typed, script, words, says):
    status, text = typed(script, *words)
    assert (status, len(text.splitlines())) == (2, 1)
    assert says in text


@pytest.mark.parametrize("word", ["/no/such.yaml", "model=[", "model.kind=none"])
def test_help_is_printed_with_a_mistake_beside_it(typed, word):
    assert typed("train.py", "--help", word) == (0, "")


def test_wrong_environment_variable_is_one_line_with_status_2(
    typed, monkeypatch, tiny_corpus, tmp_path
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "file:///x")
    status, text = typed("train.py", *command(tmp_path / "storage", tiny_corpus)[2:])
    assert (status, len(text.strip().splitlines())) == (2, 1)
    assert "MLFLOW_TRACKING_URI" in text


def test_what_the_cluster_cannot_do_is_one_line_with_status_2(ray_head, tiny_corpus, tmp_path):
    too_much = ["compute.num_workers=4", "compute.cpus_per_worker=64"]
    done = run(ray_head, tmp_path / "storage", tiny_corpus, *too_much, status=2)
    assert "found 4 CPU(s)" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize("script", ["train.py", "sweep.py"])
def test_cluster_that_does_not_answer_is_one_line_with_status_2(
    typed, monkeypatch, tiny_corpus, tmp_path, script
):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    words = command(tmp_path / "storage", tiny_corpus)[2:]
    if script == "sweep.py":
        words.append("sweep.grid.schedule.max_lr=[1e-3, 2e-3]")
    status, text = typed(script, *words)
    assert (status, len(text.strip().splitlines())) == (2, 1)
    assert "no cluster answers at 127.0.0.1:1" in text
    assert not (tmp_path / "storage").exists()
