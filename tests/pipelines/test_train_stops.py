"""What stops a driver's run on a real cluster: another job, SIGTERM, a worker that hangs. Whatever happened, the run is the one
that nothing happened to."""

import json
import os
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

from orchestrator import checkpoint, events, watchdog
from tests.helpers.small_run import begin, command, curve, logged, summary, wait_for


def result(run_dir: Path) -> tuple:
    return curve(run_dir), summary(run_dir)["weights_sha256"]


def test_a_second_job_sigterm_and_a_rank_that_hangs(golden, ray_head, tiny_corpus, tiny_dataset, tmp_path):
    """The job is refused, the signal costs no step, the rank is named and its group starts again."""
    run_dir, words = tmp_path / "small", [f"data.dir={tiny_dataset}", "compute.num_workers=2"]
    process = begin(ray_head, tmp_path, tiny_corpus, *words, "train.checkpoint_interval=40")
    assert process.stdout.readline() == "starting Ray …\n"  # it holds the run, and will not train for some seconds
    second = subprocess.run(command(tmp_path, tiny_corpus, *words), env=ray_head.env, capture_output=True, text=True, timeout=20)
    assert second.returncode == 75
    assert f"held by process {process.pid} on " in second.stderr
    wait_for(lambda: logged(run_dir) >= 5, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    stopped = json.loads((run_dir / "stopped.json").read_text())
    assert [summary(run_dir)[key] for key in ("status", "exit_status", "step")] == ["KILLED", 75, stopped["step"]]
    assert checkpoint.latest_valid(run_dir / "checkpoints") == checkpoint.path_of(run_dir / "checkpoints", stopped["step"])
    assert stopped["step"] >= logged(run_dir), "a logged step was lost"

    process = begin(ray_head, tmp_path, tiny_corpus, *words, "compute.hang_after_s=2")
    # Far from a checkpoint, behind which more time is given.
    victim = wait_for(lambda: next((m for m in watchdog.marks(run_dir) if m["rank"] == 1 and m["step"] > stopped["step"] + 2
                                    and m["step"] % 10 in (3, 4, 5)), None), process)
    os.kill(victim["pid"], signal.SIGSTOP)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert f"from step {stopped['step']} " in out
    (hang,) = [e for e in events.read(run_dir) if e["kind"] == "hang"]
    assert hang["message"].startswith(f"rank 1 (process {victim['pid']} on ")
    assert sorted(f.name for f in (run_dir / "hangs" / "0001").iterdir()) == ["hang-rank0.txt", "hang-rank1.txt"]
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
