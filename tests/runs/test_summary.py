"""summary.json agrees with the journal and the checkpoints."""

import functools
import json
import operator

import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs.ending import Ending
from orchestrator.runs.journal import Journal
from orchestrator.runs.summary import summarize
from tests.helpers import checkpoints
from tests.helpers.facts import FACTS

TOKENS = functools.partial(operator.mul, 128)  # of the first updates


def save(folder, step):
    return checkpoints.save(
        folder.checkpoints, step, {"model": {"w": torch.full((3,), float(step))}}, {}, FACTS
    )


def test_summary_of_a_finished_run(folder):
    journal = Journal(folder)
    journal.append(0, {"val/loss": 9.0, "val/bits_per_byte": 9.0, "val/best_loss": 9.0})
    evaluation = {"val/loss": 4.0, "val/bits_per_byte": 3.0, "val/best_loss": 4.0}
    journal.append(10, {"train/loss": 5.0, "perf/step_time_s": 100.0, **evaluation})
    journal.append(20, {"train/loss": 3.0, "perf/step_time_s": 0.5})
    journal.append(30, {"train/loss": 2.0, "perf/step_time_s": 0.5})
    save(folder, 10)
    last = save(folder, 30)
    summary = summarize(folder, Ending("done"), TOKENS, "id", 12.34)
    assert summary == json.loads(folder.summary_file.read_text("utf-8"))
    assert summary == {
        "status": "FINISHED",
        "exit_status": 0,
        "step": 30,
        "tokens": 3840,
        "train_loss": 2.0,
        "val_loss": 4.0,
        "val_bits_per_byte": 3.0,
        "best_val_loss": 4.0,
        "checkpoint": str(last),
        "mlflow_run_id": "id",
        "wall_s": 12.3,
        "tokens_per_sec": 256.0,
        "weights_sha256": checkpoint.weights_sha256({"w": torch.full((3,), 30.0)}),
    }


def test_speed_counts_the_tokens_of_all_steps_of_a_window(folder):
    journal = Journal(folder)
    for step in (10, 20, 30):
        journal.append(step, {"perf/step_time_s": 2.0})
    tokens = [1 * step if step < 18 else 18 + 11 * (step - 18) for step in range(31)]
    summary = summarize(folder, Ending("again"), tokens.__getitem__, None, 0.0)
    assert summary["tokens_per_sec"] == (tokens[30] - tokens[10]) / 40.0


def test_weights_are_hashed_only_if_the_run_is_finished(folder):
    save(folder, 10)
    assert summarize(folder, Ending("again"), TOKENS, None, 0.0)["weights_sha256"] is None


def test_summary_of_a_run_without_any_step(folder):
    summary = summarize(folder, Ending("again"), TOKENS, None, 0.0)
    assert (summary["status"], summary["step"], summary["tokens"]) == ("KILLED", 0, 0)
    unknown = ("train_loss", "val_loss", "checkpoint", "weights_sha256", "tokens_per_sec")
    assert {summary[key] for key in unknown} == {None}
