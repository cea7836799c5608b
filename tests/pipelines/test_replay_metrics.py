"""A run with an unreachable MLflow server: Ctrl-C ends the wait, replay_metrics.py sends later."""

import json
import signal
import subprocess
import sys

from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from tests.helpers.small_run import REPO, begin, summary
from tests.helpers.tracked import client, curve, expected, rows

SMALLER = [
    "compute.num_workers=1",
    "model.n_layer=1",
    "model.n_embd=16",
    "model.block_size=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.max_steps=20",
    "train.log_interval=1",
    "schedule.warmup_steps=2",
    "train.eval_interval=10",
    "train.eval_tokens=400",
]


def test_ctrl_c_ends_wait_for_server_and_metrics_are_sent_later(
    ray_head, tiny_corpus, tiny_dataset, tmp_path
):
    run_dir, database = tmp_path / "small", tmp_path / "later.db"
    process = begin(
        ray_head,
        tmp_path,
        tiny_corpus,
        f"data.dir={tiny_dataset}",
        *SMALLER,
        MLFLOW_TRACKING_URI="http://me:hunter2@127.0.0.1:9",
    )
    begun = next((line for line in process.stdout if "Ctrl-C ends the wait" in line), "it ended")
    assert begun.startswith(
        "tracking to http://[redacted]@127.0.0.1:9: sending the rest, for up to "
    ), process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, out + err
    assert f"pipelines/replay_metrics.py {run_dir}" in out
    assert [summary(run_dir)[key] for key in ("status", "exit_status", "mlflow_run_id")] == [
        "FINISHED",
        0,
        None,
    ]
    events.note(RunFolder(run_dir), "disk_full", "there was no room for the checkpoint of step 10")
    for _ in range(2):
        words = [
            sys.executable,
            str(REPO / "pipelines" / "replay_metrics.py"),
            str(run_dir),
            "--uri",
            f"sqlite:///{database}",
        ]
        sent = subprocess.run(words, env=ray_head.env, capture_output=True, text=True, timeout=120)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert f"has everything of {run_dir}" in sent.stdout
    assert rows(database, run_dir) == expected(run_dir)
    assert curve(run_dir) == [row[:3] for row in rows(database, run_dir)]
    run = client(f"sqlite:///{database}").get_run(
        json.loads((run_dir / "tracking.json").read_text())["run_id"]
    )
    assert run.info.status == "FINISHED"
    assert run.data.tags["events.disk_full"] == "1"
    assert {output.step for output in run.outputs.model_outputs} == {10, 20}
    assert "hunter2" not in begun + out + err + str(run.data.tags)
