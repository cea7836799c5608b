"""What stops a driver's run on a real cluster, in good order or not: another job, SIGTERM, a worker that hangs, one that does
not end. Whatever happened, the run is the one that nothing happened to."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

from orchestrator import checkpoint, events, journal, watchdog
from tests.helpers.small_run import REPO, command, curve, summary, wait_for_step


def begin(ray_head, storage: Path, corpus: Path, *overrides: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(command(storage, corpus, *overrides), env={**ray_head.env, **env}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def result(run_dir: Path) -> tuple:
    return curve(run_dir), summary(run_dir)["weights_sha256"]


def test_a_second_job_is_refused_and_sigterm_costs_no_step(golden, ray_head, tiny_corpus, tmp_path):
    run_dir, words = tmp_path / "small", ["train.checkpoint_interval=40", "compute.num_workers=2"]
    process = begin(ray_head, tmp_path, tiny_corpus, *words)
    deadline = time.monotonic() + 120
    while not journal.read(run_dir) or journal.read(run_dir)[-1]["step"] < 5:
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    second = subprocess.run(command(tmp_path, tiny_corpus, *words), env=ray_head.env, capture_output=True, text=True, timeout=20)
    assert second.returncode == 75
    assert f"held by process {process.pid} on " in second.stderr
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert [summary(run_dir)[key] for key in ("status", "exit_status", "step")] == ["KILLED", 75, stopped["step"]]
    assert checkpoint.latest_valid(run_dir / "checkpoints") == checkpoint.path_of(run_dir / "checkpoints", stopped["step"])
    assert stopped["step"] >= journal.read(run_dir)[-1]["step"], "a logged step was lost"
    again = begin(ray_head, tmp_path, tiny_corpus, "compute.num_workers=1")
    assert again.wait(240) == 0, again.communicate()
    assert f"from step {stopped['step']} " in again.communicate()[0]
    assert result(run_dir) == result(golden[0])


def test_the_run_is_held_and_sigterm_is_heard_while_ray_starts(tiny_corpus, tmp_path):
    """A Ray of one's own, which takes seconds to start and puts handlers of its own in place."""
    head = SimpleNamespace(env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"})
    process = begin(head, tmp_path, tiny_corpus)
    assert process.stdout.readline() == "starting Ray …\n"
    second = subprocess.run(command(tmp_path, tiny_corpus), env=head.env, capture_output=True, text=True, timeout=60)
    assert (second.returncode, second.stdout) == (75, "")
    assert f"held by process {process.pid} on " in second.stderr
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert err == "terminated before it began; run the same command again\n"
    assert os.listdir(tmp_path) == [], "it left something where it made nothing"


def test_ctrl_c_ends_the_wait_for_a_server_and_not_the_run(ray_head, tiny_corpus, tmp_path):
    process = begin(ray_head, tmp_path, tiny_corpus, "compute.num_workers=1", "tracking.uri=http://127.0.0.1:9")
    while not (tmp_path / "small" / "summary.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(3)  # what is added to the summary, and then the wait, which would last a minute
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, out + err
    assert "the tracking server did not take everything" in out
    assert (summary(tmp_path / "small")["status"], summary(tmp_path / "small")["exit_status"]) == ("FINISHED", 0)


def test_a_rank_that_hangs_is_named_and_its_group_starts_again(golden, ray_head, tiny_corpus, tmp_path):
    run_dir = tmp_path / "small"
    process = begin(ray_head, tmp_path, tiny_corpus, "compute.num_workers=2", "compute.hang_after_s=2")
    wait_for_step(run_dir, 10, process)
    victim = {"step": 0}
    while victim["step"] % 10 not in (3, 4, 5):  # far from a checkpoint, behind which more time is given
        assert process.poll() is None, process.communicate()
        victim = next((m for m in watchdog.marks(run_dir) if m["rank"] == 1), victim)
    os.kill(victim["pid"], signal.SIGSTOP)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    (hang,) = [e for e in events.read(run_dir) if e["kind"] == "hang"]
    assert hang["message"].startswith(f"rank 1 (process {victim['pid']} on ")
    assert sorted(f.name for f in (run_dir / "hangs" / "0001").iterdir()) == ["hang-rank0.txt", "hang-rank1.txt"]
    assert result(run_dir) == result(golden[0])


def test_workers_that_are_done_and_do_not_end_are_ended(golden, ray_head, tiny_corpus, tmp_path):
    """A worker whose end deadlocks with the interpreter in its hands, as torch's process group can, not at will: here it sleeps
    so, once it has said that it is done. Ray itself would wait for an answer of it for ten minutes."""
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys, threading, time\n"
        "def stick():\n"
        "    while not hasattr(sys.modules.get('orchestrator.watchdog'), 'Watchdog'):\n"
        "        time.sleep(0.05)\n"
        "    import ctypes, pathlib\n"
        "    dog = sys.modules['orchestrator.watchdog'].Watchdog\n"
        "    close = dog.close\n"
        "    def close_and_sleep(self, *args):\n"
        "        close(self, *args)\n"
        "        pathlib.Path(__file__).with_name(f'slept-{self.rank}').touch()\n"
        "        ctypes.PyDLL(None).sleep(3600)\n"  # PyDLL keeps the interpreter's lock
        "    dog.close = close_and_sleep\n"
        "threading.Thread(target=stick, daemon=True).start()\n")
    job = {"runtime_env": {"env_vars": {"PYTHONPATH": f"{hook}{os.pathsep}{REPO}"}}}  # of a job, which its workers have
    process = begin(ray_head, tmp_path, tiny_corpus, "compute.num_workers=2", RAY_JOB_CONFIG_JSON_ENV_VAR=json.dumps(job))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert sorted(p.name for p in hook.glob("slept-*")) == ["slept-0", "slept-1"], "no worker was kept from its end"
    assert result(tmp_path / "small") == result(golden[0])
