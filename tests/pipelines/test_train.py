"""`pipelines/train.py` as a person runs it, on a real cluster: real workers, real kills, one run to the last bit."""

import json
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
    wait_for,
    wait_for_step,
)


def test_the_end_says_where_everything_is_and_what_comes_next(golden):
    run_dir, text = golden
    facts = summary(run_dir)
    assert facts["status"] == "FINISHED"
    assert facts["step"] == STEPS
    assert facts["tokens"] == STEPS * 16 * 64
    assert facts["train_loss"] < 2.5
    assert facts["val_loss"] == facts["best_val_loss"] == curve(run_dir)[-1]["val/loss"]
    assert facts["val_bits_per_byte"] == pytest.approx(
        facts["val_loss"] / 0.6931471805599453
    )  # one byte a character
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


def test_the_run_is_one_finished_run_in_mlflow_with_every_point_once(golden):
    run_dir, _ = golden
    with sqlite3.connect(run_dir.parent / "mlflow" / "mlflow.db") as db:
        runs = db.execute("select run_uuid, status from runs").fetchall()
        points = db.execute(
            "select step, value from metrics where key = 'train/loss' order by step"
        ).fetchall()
    assert runs == [(summary(run_dir)["mlflow_run_id"], "FINISHED")]
    assert points == [(r["step"], r["train/loss"]) for r in curve(run_dir) if "train/loss" in r]


# A worker whose end deadlocks with the interpreter in its hands, as torch's process group can, not at will: here it sleeps so,
# once it has said that it is done. Ray itself would wait for an answer of it for ten minutes.
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
        ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the interpreter's lock
    dog.close = close_and_sleep
threading.Thread(target=stick, daemon=True).start()
"""


def test_a_dead_worker_is_restarted_two_workers_equal_one_and_are_ended_where_they_do_not_end(
    golden, ray_head, tiny_corpus, tiny_dataset, tmp_path
):
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(STICK)
    job = {
        "runtime_env": {"env_vars": {"PYTHONPATH": f"{hook}{os.pathsep}{REPO}"}}
    }  # of a job, which its workers have
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
        "nothing was restarted"
    )
    assert sorted(p.name for p in hook.glob("slept-*")) == ["slept-0", "slept-1"], (
        "no worker was kept from its end"
    )
    assert curve(tmp_path / "small") == curve(golden[0])
    assert summary(tmp_path / "small")["weights_sha256"] == summary(golden[0])["weights_sha256"]


def test_a_killed_driver_on_two_workers_and_the_same_command_on_one_equal_never_killed(
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
        "a part of a run is compared with the whole"
    )
    assert curve(tmp_path / "small") == curve(golden[0])
    assert summary(tmp_path / "small")["weights_sha256"] == summary(golden[0])["weights_sha256"]
    with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as db:
        assert db.execute("select status from runs").fetchall() == [("FINISHED",)]
        points = db.execute(
            "select step, count(*) from metrics where key = 'train/loss' group by step"
        ).fetchall()
    assert points == [(r["step"], 1) for r in curve(golden[0]) if "train/loss" in r]


def test_ctrl_c_ends_as_killed_with_130_and_a_valid_checkpoint(
    ray_head, tiny_corpus, tiny_dataset, tmp_path
):
    process = begin(ray_head, tmp_path, tiny_corpus, f"data.dir={tiny_dataset}")
    wait_for_step(tmp_path / "small", 10, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert summary(tmp_path / "small")["status"] == "KILLED"
    assert checkpoint.latest_valid(tmp_path / "small" / "checkpoints") is not None


def test_a_finished_run_prints_its_summary_again_and_another_experiment_is_refused(
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


def test_a_second_job_sigterm_and_a_rank_that_hangs(
    golden, ray_head, tiny_corpus, tiny_dataset, tmp_path
):
    """The job is refused, the signal costs no step, the rank is named and its group starts again."""
    run_dir, words = tmp_path / "small", [f"data.dir={tiny_dataset}", "compute.num_workers=2"]
    process = begin(ray_head, tmp_path, tiny_corpus, *words, "train.checkpoint_interval=40")
    assert (
        process.stdout.readline() == "starting Ray …\n"
    )  # it holds the run, and will not train for some seconds
    second = subprocess.run(
        command(tmp_path, tiny_corpus, *words),
        env=ray_head.env,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert second.returncode == 75
    assert f"held by process {process.pid} on " in second.stderr
    wait_for(lambda: logged(run_dir) >= 5, process)
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
    # Far from a checkpoint, behind which more time is given.
    victim = wait_for(
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
    assert hang["message"].startswith(f"rank 1 (process {victim['pid']} on ")
    assert sorted(f.name for f in (run_dir / "hangs" / "0001").iterdir()) == [
        "hang-rank0.txt",
        "hang-rank1.txt",
    ]
    assert (curve(run_dir), summary(run_dir)["weights_sha256"]) == (
        curve(golden[0]),
        summary(golden[0])["weights_sha256"],
    )


def test_the_run_is_held_and_sigterm_is_heard_while_ray_starts(tiny_corpus, tmp_path):
    """A Ray of one's own, which takes seconds to start and puts handlers of its own in place."""
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
    assert err == "terminated before it began; run the same command again\n"
    assert os.listdir(tmp_path) == [], "it left something where it made nothing"


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
def test_a_mistake_is_one_line_with_status_2_and_nothing_written(
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
def test_an_environment_that_leads_nowhere_is_one_line_with_status_2(
    tmp_path, tiny_corpus, variables, words
):
    argv = [w for w in command(tmp_path / "storage", tiny_corpus) if not w.startswith("storage=")]
    env = {**os.environ, "ESPALIER_STORAGE": str(tmp_path / "storage"), **variables}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "storage").exists()


def test_the_dry_run_counts_and_writes_nothing(tmp_path, tiny_corpus):
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


def test_what_the_dry_run_expects_the_run_expects_too_and_is_compared_with(
    ray_head, tiny_corpus, tmp_path
):
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
