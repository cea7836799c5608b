"""replay_metrics.py sends the metrics of a run whose tracking server was not reachable."""

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


def test_metrics_are_sent_after_ctrl_c_has_ended_the_wait(
    ray_head, tiny_corpus, tiny_dataset, tmp_path
):
    folder = RunFolder(tmp_path / "small")
    process = begin(
        ray_head,
        tmp_path,
        tiny_corpus,
        f"data.dir={tiny_dataset}",
        *SMALLER,
        MLFLOW_TRACKING_URI="http://me:hunter2@127.0.0.1:9",
    )
    waiting = next((line for line in process.stdout if "Ctrl-C ends the wait" in line), "it ended")
    start = "tracking to http://[redacted]@127.0.0.1:9: sending the rest, for up to "
    assert waiting.startswith(start), process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert f"pipelines/replay_metrics.py {folder.path}" in out
    found = summary(folder.path)
    assert (found["status"], found["exit_status"]) == ("FINISHED", 0)
    assert found["mlflow_run_id"] is None

    events.note(folder, "disk_full", "there was no room for the checkpoint of step 10")
    database = tmp_path / "later.db"
    for _ in range(2):  # the second time changes nothing
        script = REPO / "pipelines" / "replay_metrics.py"
        words = [sys.executable, script, folder.path, "--uri", f"sqlite:///{database}"]
        sent = subprocess.run(words, env=ray_head.env, capture_output=True, text=True, timeout=120)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert f"has everything of {folder.path}" in sent.stdout
    assert rows(database, folder.path) == expected(folder.path)
    assert curve(folder.path) == [row[:3] for row in rows(database, folder.path)]
    run_id = json.loads(folder.tracking_file.read_text())["run_id"]
    run = client(f"sqlite:///{database}").get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["events.disk_full"] == "1"
    assert {output.step for output in run.outputs.model_outputs} == {10, 20}
    assert "hunter2" not in waiting + out + err + str(run.data.tags)
