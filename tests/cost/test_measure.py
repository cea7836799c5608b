"""What a run is expected to cost: counted as the loop counts, measured in a process of its own, and never in a run's way."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model.gpt import GPT
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.cost import estimate as plan
from orchestrator.cost import measure as calibrate
from orchestrator.cost.measure import Timing
from orchestrator.data.batches import EvalBatches
from orchestrator.data.dataset import Manifest, Split
from orchestrator.jobs import train as driver
from orchestrator.runs.facts import model_facts
from orchestrator.train import state
from orchestrator.train.gradients import Gradients
from orchestrator.train.numerics import Worker

N_VOCAB = 65
TIMING = Timing(
    step_s=0.5,
    eval_tokens_per_s=1000.0,
    sample_s=0.25,
    checkpoint_s=2.0,
    checkpoint_bytes=1e6,
    memory_gib=0.5,
    startup_s=2.0,
)


def small(*overrides: str) -> Experiment:
    return load_experiment(
        None,
        [
            "data.tokenizer=char",
            "model.n_layer=2",
            "model.n_head=2",
            "model.n_embd=32",
            "model.block_size=32",
            "train.micro_batch_size=2",
            "train.global_batch_size=16",
            "train.max_steps=24",
            "train.eval_interval=8",
            "train.checkpoint_interval=4",
            *overrides,
        ],
    )


def measure(*overrides: str, workers: int = 1, **settings) -> Timing | None:
    return calibrate.measure(small(*overrides), N_VOCAB, workers, 1, False, **settings)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> tuple[Timing, str]:
    """One real measurement, started by a process that is larger than what is measured; and the cache that has it."""
    cache = tmp_path_factory.mktemp("cache")
    ballast = np.ones(1 << 27)  # 1 GiB
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        timing = measure()
    assert ballast.nbytes == 1 << 30
    return timing, str(cache)


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[list[str]]:
    """An empty cache, and the processes that were asked for: each ends at once with `TIMING`."""
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout=json.dumps(asdict(TIMING)))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    return commands


# ---- counting ----
@pytest.mark.parametrize("steps", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("interval", [None, 1, 4, 8, 100])
def test_evaluations_and_checkpoints_are_those_of_the_loop(steps, interval):
    shown = "null" if interval is None else interval
    e = small(
        f"train.max_steps={steps}",
        f"train.eval_interval={shown}",
        f"train.checkpoint_interval={shown}",
    )
    due = {n for n in range(1, steps + 1) if n == steps or interval and n % interval == 0}
    assert calibrate.checkpoints(e) == len(due)
    assert calibrate.evaluations(e) == (len(due) + 1 if interval else 0)


@pytest.mark.parametrize(
    ("limit", "val", "train"),
    [("null", 1000, 5000), (200, 1000, 5000), (5000, 1000, 700), (64, 64, 65)],
)
def test_an_evaluation_runs_the_batches_that_the_loop_would(limit, val, train):
    e = small(f"train.eval_tokens={limit}")
    reach = min(val, val if limit == "null" else limit)
    batches = [
        len(EvalBatches(SimpleNamespace(tokens=min(reach, tokens)), 32, 2))
        for tokens in (val, train)
    ]
    seconds = calibrate.evaluation_seconds(e, val, train, TIMING)
    assert seconds == pytest.approx(sum(batches) * 2 * 32 / 1000.0 + 0.25)


@pytest.mark.parametrize("keep", [1, 2, 10])
@pytest.mark.parametrize("interval", ["null", 4, 12])
def test_the_most_that_lies_on_disk_is_what_writing_and_removing_leaves_at_worst(keep, interval):
    e, lying, most = small(f"train.keep={keep}", f"train.checkpoint_interval={interval}"), [], 0
    for step in [24] if interval == "null" else range(interval, 25, interval):
        lying.append(step)
        most = max(most, len(lying))
        lying = sorted({lying[0], *lying[-keep:]})  # at worst the best one is the first
    found = calibrate.expected(e, 1000, 5000, TIMING)
    assert found["disk_bytes"] == most * 1e6
    assert len(lying) - 1 <= found["final_disk_bytes"] / 1e6 <= len(lying)


def test_the_time_of_a_run_is_the_sum_of_its_parts():
    found = calibrate.expected(small(), 1000, 5000, TIMING)
    evaluation = calibrate.evaluation_seconds(small(), 1000, 5000, TIMING)
    assert found["time_s"] == pytest.approx(
        24 * 0.5 + 4 * evaluation + 6 * 2.0 + calibrate.start_seconds(TIMING)
    )


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_a_workers_share_is_its_micro_batches_in_its_slots(workers):
    e, parameters = small(), [torch.nn.Parameter(torch.zeros(4))]
    share = calibrate._share(e, workers)
    theirs = Gradients(parameters, e.micro_batches, e.slots, 0, workers).my_slots()
    assert Gradients(parameters, share.micro_batches, share.slots).my_slots() == theirs


def test_where_one_micro_batch_stands_for_a_step_the_buffers_of_a_step_are_counted(monkeypatch):
    monkeypatch.setattr(calibrate, "STEPS_S", 0.3)
    e, worker = small(), Worker()
    model = GPT(e.gpt_config(N_VOCAB))

    def first() -> state.TrainState:
        return state.build(calibrate.one_micro_batch(e), model, worker)

    scaled, _, unused = calibrate._time_steps(e, first(), worker, budget_s=0.0)
    whole, s, nothing = calibrate._time_steps(e, first(), worker, budget_s=100.0)
    taken = len(s.gradients.free) + len(s.gradients.stack) + 1
    assert nothing == 0
    assert unused == pytest.approx((taken - 1) * s.gradients.size * 4, rel=0.01)
    assert whole / 20 < scaled < whole * 20


# ---- measuring ----
def test_a_measurement_is_that_of_its_own_process(measured):
    timing, _ = measured
    parameters = model_facts(small(), N_VOCAB)["parameters"]
    assert timing.checkpoint_bytes == pytest.approx(3 * 4 * parameters, rel=0.05)  # and some text
    assert calibrate.RAY_GIB + 0.1 < timing.memory_gib < 0.9, "this process has more than 1 GiB"
    assert timing.step_s < 1 < timing.eval_tokens_per_s


def test_a_second_measurement_of_the_same_starts_nothing(measured, monkeypatch, started):
    timing, cache = measured
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert (
        measure()
        == measure("train.max_steps=48", "schedule.max_lr=1e-5", "train.seed=3", "name=other")
        == timing
    )
    assert started == []


@pytest.mark.parametrize(
    "other",
    [
        "model.n_embd=64",
        "model.dropout=0.1",
        "train.micro_batch_size=4",
        "train.dtype=bfloat16",
        "train.global_batch_size=32",
        "train.reduction_slots=2",
        "optim.max_grad_norm=null",
    ],
)
def test_what_changes_a_step_is_measured_anew(started, other):
    assert measure() is not None
    assert measure(other) is not None
    assert len(started) == 2


def test_fresh_measures_again_and_several_workers_evaluate_side_by_side(started):
    assert measure() == measure(fresh=True) == TIMING
    assert measure(workers=2).eval_tokens_per_s == 2 * TIMING.eval_tokens_per_s
    assert len(started) == 3


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b"null",
        b"[" * 100_000,
        b'{"step_s": 1}',
        *(
            json.dumps(asdict(TIMING) | change).encode()
            for change in (
                {"step_s": math.nan},
                {"step_s": math.inf},
                {"step_s": -1},
                {"step_s": 0},
                {"step_s": True},
                {"step_s": "1"},
                {"step_s": None},
                {"more": 1.0},
            )
        ),
    ],
)
def test_a_damaged_cache_is_measured_again_and_mended(started, tmp_path, damage):
    measure()
    [file] = tmp_path.rglob("*.json")
    file.write_bytes(damage)
    assert calibrate.known(small(), N_VOCAB, 1, 1, False) is None
    assert measure() == TIMING
    assert len(started) == 2
    assert calibrate.known(small(), N_VOCAB, 1, 1, False) == TIMING


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(started, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measure() == TIMING


def test_without_a_gpu_a_run_on_gpus_is_not_guessed(started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert calibrate.measure(small(), N_VOCAB, 1, 1, True) is None
    assert started == []
    lines = dict(
        plan.dry_run(
            small("compute.use_gpu=true", "data.tokenizer=byte", "data.corpus=builtin:stdlib")
        )
    )["expected"]
    assert lines == [
        "time and memory are unknown: the run asks for a GPU, and this machine has none to time it on"
    ]


def test_what_takes_too_long_or_fails_is_not_known_and_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measure(limit_s=0.05) is None
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert measure() is None
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert measure() is None
    assert list(tmp_path.rglob("*.json")) == []


# ---- in a run ----
SPLITS = {
    name: Split(tokens, 1, tokens, "", ()) for name, tokens in (("train", 5000), ("val", 1000))
}
DATASET = Manifest(Path("tokens"), {"name": "char", "n_vocab": N_VOCAB}, SPLITS)
LAYOUT = Layout(num_workers=1, cpus_per_worker=1, use_gpu=False)


def test_a_run_says_what_it_will_cost(started, capsys):
    assert driver.estimate_of(small(), DATASET, LAYOUT) == calibrate.expected(
        small(), 1000, 5000, TIMING
    )
    assert capsys.readouterr().out.startswith("expected: ")


def test_an_estimate_that_fails_does_not_end_a_run(monkeypatch, started, capsys):
    def fail(*_, **__):
        raise OSError("no processes left")

    monkeypatch.setattr(subprocess, "run", fail)
    assert driver.estimate_of(small(), DATASET, LAYOUT) is None
    monkeypatch.setattr(calibrate, "measure", fail)
    assert driver.estimate_of(small(), DATASET, LAYOUT) is None
    assert capsys.readouterr().out == "no estimate of the cost: OSError: no processes left\n"


def test_a_large_run_waits_for_no_measurement_but_uses_one_that_is_there(started):
    large = small(
        "model.n_layer=48", "model.n_embd=1600", "model.n_head=25", "train.micro_batch_size=16"
    )
    assert driver.estimate_of(large, DATASET, LAYOUT) is None
    assert started == []
    calibrate.measure(large, N_VOCAB, 1, 1, False)
    assert driver.estimate_of(large, DATASET, LAYOUT) is not None
    assert len(started) == 1


def test_the_comparison_shows_both_and_leaves_out_what_nobody_saw():
    expected = {"time_s": 110.0, "memory_gib": 0.5, "disk_bytes": 3e6, "final_disk_bytes": 1 << 20}
    seen = {"time_s": 118.0, "memory_gib": 0.625, "final_disk_bytes": 1 << 20}
    assert plan.comparison_line(expected, seen) == (
        "expected 1m50s, took 1m58s (+7%); memory 512 MiB expected, 640 MiB seen (+25%); "
        "disk at the end 1 MiB expected, 1 MiB seen (+0%)"
    )
    assert "memory" not in plan.comparison_line(expected, {**seen, "memory_gib": None})
