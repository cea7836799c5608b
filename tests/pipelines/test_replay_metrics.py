"""A real run whose tracking server takes nothing, and `pipelines/replay_metrics.py` afterwards."""

import json
import subprocess
import sys
from pathlib import Path

from orchestrator import events
from tests.helpers.gate import Gate, free_port
from tests.helpers.tracked import client, curve, expected, rows

REPO = Path(__file__).resolve().parents[2]


def pipeline(name, *words, env):
    command = [sys.executable, str(REPO / "pipelines" / name), *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def test_what_a_run_had_to_leave_behind_is_sent_later(ray_head, tiny_corpus, tmp_path):
    gate, run_dir, database = Gate(0, free_port()), tmp_path / "small", tmp_path / "later.db"
    gate.set("401 Unauthorized")  # a server that is away would be tried for a minute
    env = {**ray_head.env, "MLFLOW_TRACKING_URI": f"http://me:hunter2@127.0.0.1:{gate.port}"}
    done = pipeline("train.py", f"storage={tmp_path}", f"data.corpus={tiny_corpus}", "data.tokenizer=char", "name=small",
                    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "train.micro_batch_size=2",
                    "train.global_batch_size=8", "train.max_steps=20", "train.log_interval=1", "schedule.warmup_steps=2",
                    "train.eval_interval=10", "train.eval_tokens=400", "train.checkpoint_interval=10", env=env)
    gate.set("refuse")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"pipelines/replay_metrics.py {run_dir}" in done.stdout
    assert json.loads((run_dir / "summary.json").read_text())["mlflow_run_id"] is None
    events.note(run_dir, "disk_full", "there was no room for the checkpoint of step 10")
    for _ in range(2):
        sent = pipeline("replay_metrics.py", run_dir, "--uri", f"sqlite:///{database}", env=env)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert f"has everything of {run_dir}" in sent.stdout
    assert rows(database, run_dir) == expected(run_dir)
    assert curve(run_dir) == [row[:3] for row in rows(database, run_dir)]
    run = client(f"sqlite:///{database}").get_run(json.loads((run_dir / "tracking.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.tags["events.disk_full"] == "1"
    assert {output.step for output in run.outputs.model_outputs} == {10, 20}
    assert "hunter2" not in done.stdout + done.stderr + str(run.data.tags)
