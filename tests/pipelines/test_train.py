"""`pipelines/train.py` on a real cluster: killed runs equal undisturbed ones bit for bit."""

import json
import math
import os
import signal
import sqlite3
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cost import estimate as plan
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import marks
from tests.helpers.small_run import (
    REPO,
    STEPS,
    begin,
    command,
    curve,
    logged,
    run,
    summary,
    wait_for_step,
)
from tests.helpers.wait import wait_until


def test_output_and_summary_of_a_finished_run(golden):
    run_dir, text = golden
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


def test_dead_worker_is_restarted_and_two_workers_equal_one(
    golden, ray_head, tiny_corpus, tiny_dataset, tmp_path
):
    hook = tmp_path / "hook"
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
        "compute.hang_after_s=5",
        RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(job),
    )
    wait_for_step(tmp_path / "small", 10, process)
    attempts = [
        json.loads(line)
        for line in (tmp_path / "small" / "attempts.jsonl").read_text().splitlines()
    ]
    os.kill(attempts[-1]["pid"], signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert len((tmp_path / "small" / "attempts.jsonl").read_text().splitlines()) == 2, (
        "no worker was restarted"
    )
    assert sorted(p.name for p in hook.glob("slept-*")) == ["slept-0", "slept-1"], (
        "the hook did not run"
    )
    assert curve(tmp_path / "small") == curve(golden[0])
    assert summary(tmp_path / "small")["weights_sha256"] == summary(golden[0])["weights_sha256"]


def test_driver_killed_on_two_workers_and_resumed_on_one_equals_undisturbed_run(
    golden, ray_head, tiny_corpus, tmp_path
):
    process = begin(ray_head, tmp_path, tiny_corpus, "compute.num_workers=2")
    wait_for_step(tmp_path / "small", 20, process)
    process.kill()
    process.wait(30)
    assert not (tmp_path / "small" / "summary.json").exists(), (
        "the run ended before it could be killed"
    )
    again = run(ray_head, tmp_path, tiny_corpus, "compute.num_workers=1")
    assert "resuming small from step" in again.stdout
    assert "estimated" not in summary(tmp_path / "small"), (
        "the estimate of a whole run was compared with a part of it"
    )
    assert curve(tmp_path / "small") == curve(golden[0])
    assert summary(tmp_path / "small")["weights_sha256"] == summary(golden[0])["weights_sha256"]
    with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as db:
        assert db.execute("select status from runs").fetchall() == [("FINISHED",)]
        points = db.execute(
            "select step, count(*) from metrics where key = 'train/loss' group by step"
        ).fetchall()
    assert points == [(r["step"], 1) for r in curve(golden[0]) if "train/loss" in r]


def test_ctrl_c_ends_with_status_130_and_a_valid_checkpoint(
    ray_head, tiny_corpus, tiny_dataset, tmp_path
):
    process = begin(ray_head, tmp_path, tiny_corpus, f"data.dir={tiny_dataset}")
    wait_for_step(tmp_path / "small", 10, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert summary(tmp_path / "small")["status"] == "KILLED"
    assert checkpoint.latest_valid(tmp_path / "small" / "checkpoints") is not None


def test_finished_run_prints_summary_again_and_other_experiment_is_refused(
    golden, ray_head, tiny_corpus
):
    run_dir, _ = golden
    before = (run_dir / "metrics.jsonl").read_bytes()
    again = run(ray_head, run_dir.parent, tiny_corpus, "compute.num_workers=1")
    assert "is finished" in again.stdout
    assert summary(run_dir)["weights_sha256"] in again.stdout
    refused = run(ray_head, run_dir.parent, tiny_corpus, "schedule.max_lr=1e-3", status=2)
    assert "schedule.max_lr: 0.002 there, 0.001 here" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_second_job_is_refused_sigterm_stops_and_hanging_rank_is_restarted(
    golden, ray_head, tiny_corpus, tiny_dataset, tmp_path
):
    """The second job is refused, SIGTERM loses no step, the hanging rank is named and restarted."""
    run_dir, words = tmp_path / "small", [f"data.dir={tiny_dataset}", "compute.num_workers=2"]
    process = begin(ray_head, tmp_path, tiny_corpus, *words, "train.checkpoint_interval=40")
    # The run is locked now; training starts some seconds later.
    assert process.stdout.readline() == "starting Ray …\n"
    second = subprocess.run(
        command(tmp_path, tiny_corpus, *words),
        env=ray_head.env,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert second.returncode == 75
    assert f"held by process {process.pid} on " in second.stderr
    wait_until(lambda: logged(run_dir) >= 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert [summary(run_dir)[key] for key in ("status", "exit_status", "step")] == [
        "KILLED",
        75,
        stopped["step"],
    ]
    assert checkpoint.latest_valid(run_dir / "checkpoints") == checkpoint.path_of(
        run_dir / "checkpoints", stopped["step"]
    )
    assert stopped["step"] >= logged(run_dir), "a logged step was lost"

    process = begin(ray_head, tmp_path, tiny_corpus, *words, "compute.hang_after_s=2")
    # Wait until the last checkpoint is some steps ago: shortly after one, the limit is higher.
    victim = wait_until(
        lambda: next(
            (
                m
                for m in marks.read(RunFolder(run_dir))
                if m.rank == 1 and m.step > stopped["step"] + 2 and m.step % 10 in (3, 4, 5)
            ),
            None,
        ),
        process,
    )
    os.kill(victim.pid, signal.SIGSTOP)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert f"from step {stopped['step']} " in out
    (hang,) = [e for e in events.read(RunFolder(run_dir)) if e["kind"] == "hang"]
    assert hang["message"].startswith(f"rank 1 (process {victim.pid} on ")
    assert sorted(f.name for f in (run_dir / "hangs" / "0001").iterdir()) == [
        "hang-rank0.txt",
        "hang-rank1.txt",
    ]
    assert (curve(run_dir), summary(run_dir)["weights_sha256"]) == (
        curve(golden[0]),
        summary(golden[0])["weights_sha256"],
    )


def test_run_is_locked_and_sigterm_works_while_ray_starts(tiny_corpus, tmp_path):
    """A local Ray needs seconds to start and installs its own signal handlers."""
    head = SimpleNamespace(env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"})
    process = begin(head, tmp_path, tiny_corpus)
    assert process.stdout.readline() == "starting Ray …\n"
    second = subprocess.run(
        command(tmp_path, tiny_corpus), env=head.env, capture_output=True, text=True, timeout=60
    )
    assert (second.returncode, second.stdout) == (75, "")
    assert f"held by process {process.pid} on " in second.stderr
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert err == "terminated before the start; run the same command again\n"
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
        ("train.init_from=/no/such/weights", "train.init_from: '/no/such/weights' does not exist"),
        ("tracking.uri=http://me:hunter2@host/", "set $MLFLOW_TRACKING_URI"),
        ("compute.num_workers=4 compute.cpus_per_worker=64", "found 4 CPU(s)"),
    ],
)
def test_user_error_is_one_line_with_status_2_and_writes_nothing(
    ray_head, tiny_corpus, tmp_path, override, words
):
    done = run(ray_head, tmp_path / "storage", tiny_corpus, *override.split(), status=2)
    assert words in done.stderr
    assert "hunter2" not in done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"MLFLOW_TRACKING_URI": "file:///x"}, "MLFLOW_TRACKING_URI"),
        ({"ESPALIER_STORAGE": "/dev/null/runs"}, "storage: /dev/null/runs cannot be written to"),
        ({"RAY_ADDRESS": "127.0.0.1:1"}, "no cluster answers at 127.0.0.1:1"),
    ],
)
def test_wrong_environment_variable_is_one_line_with_status_2(
    tmp_path, tiny_corpus, variables, words
):
    argv = [w for w in command(tmp_path / "storage", tiny_corpus) if not w.startswith("storage=")]
    env = {**os.environ, "ESPALIER_STORAGE": str(tmp_path / "storage"), **variables}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "storage").exists()


def test_dry_run_prints_estimates_and_writes_nothing(tmp_path, tiny_corpus):
    words = [*command(tmp_path / "storage", tiny_corpus), "--dry-run"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    for text in (
        "16 sequences per step / 4 per micro-batch = 4 micro-batches",
        "1,024 tokens per step",
        "parameters",
    ):
        assert text in done.stdout
    assert not (tmp_path / "storage").exists()


def cached(folder: Path) -> dict[str, int]:
    return {
        file.name: file.stat().st_mtime_ns
        for file in (folder / "espalier" / "calibration").iterdir()
    }


def test_run_uses_and_reports_the_estimate_of_the_dry_run(ray_head, tiny_corpus, tmp_path):
    words = command(
        tmp_path / "storage",
        tiny_corpus,
        "compute.num_workers=1",
        "compute.use_gpu=false",
        "train.max_steps=40",
    )
    env = {**ray_head.env, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    dry = subprocess.run(
        [*words, "--dry-run"], env=env, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    for text in (
        "steps of",
        "evaluations of",
        "resident per worker",
        "of disk at most",
        "1 worker(s) with 1 CPU(s) each",
    ):
        assert text in dry.partition("\nexpected\n")[2]
    assert not (tmp_path / "storage").exists()
    before = cached(tmp_path / "cache")
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert cached(tmp_path / "cache") == before, "measured again"
    facts = summary(tmp_path / "storage" / "small")
    expected, seen = facts["estimated"], facts["measured"]
    assert f"≈ {expected['memory_gib']:.3g} GiB resident" in dry
    assert seen["time_s"] == facts["wall_s"]
    assert seen["memory_gib"] == pytest.approx(expected["memory_gib"], rel=0.25)
    assert seen["final_disk_bytes"] == pytest.approx(expected["final_disk_bytes"], rel=0.05)
    assert "expected: " in done.stdout
    assert plan.comparison_line(expected, seen) in done.stdout
