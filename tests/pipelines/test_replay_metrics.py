"""Ctrl-C ends a run whose tracking server is not reachable; replay_metrics.py sends its metrics."""

import json
import signal

from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from pipelines.replay_metrics import main
from tests.helpers.small_run import begin, summary, wait_for_step
from tests.helpers.tracked import client, curve, expected, rows


def test_ctrl_c_ends_the_run_then_the_wait_and_the_metrics_are_sent_later(
    ray_head, tiny_corpus, tiny_dataset, tmp_path, capsys
):
    folder = RunFolder(tmp_path / "small")
    process = begin(
        ray_head,
        tmp_path,
        tiny_corpus,
        f"data.dir={tiny_dataset}",
        "compute.num_workers=1",
        MLFLOW_TRACKING_URI="http://me:hunter2@127.0.0.1:9",
    )
    wait_for_step(folder.path, 10, process)
    process.send_signal(signal.SIGINT)
    waiting = next((line for line in process.stdout if "Ctrl-C ends the wait" in line), "it ended")
    start = "tracking to http://[redacted]@127.0.0.1:9: sending the rest, for up to "
    assert waiting.startswith(start), process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert f"pipelines/replay_metrics.py {folder.path}" in out
    found = summary(folder.path)
    assert (found["status"], found["exit_status"]) == ("KILLED", 130)
    assert found["mlflow_run_id"] is None
    assert checkpoint.latest_valid(folder.checkpoints) == folder.checkpoint(found["step"])

    events.note(folder, "disk_full", "there was no room for the checkpoint of step 10")
    database = tmp_path / "later.db"
    words = [str(folder.path), "--uri", f"sqlite:///{database}"]
    for _ in range(2):  # the second time changes nothing
        assert main(words) == 0
        assert f"has everything of {folder.path}" in capsys.readouterr().out
    assert rows(database, folder.path) == expected(folder.path)
    assert curve(folder.path) == [row[:3] for row in rows(database, folder.path)]
    run_id = json.loads(folder.tracking_file.read_text())["run_id"]
    run = client(f"sqlite:///{database}").get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.tags["events.disk_full"] == "1"
    assert {output.step for output in run.outputs.model_outputs} == set(
        checkpoint.steps(folder.checkpoints)
    )
    assert "hunter2" not in waiting + out + err + str(run.data.tags)
