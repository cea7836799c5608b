"""Estimates equal the counts of the training loop; timings come from a separate process."""

import json
import math
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from orchestrator.cluster.layout import Layout, Node
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.cost import bench, cache, forecast, process, timing
from orchestrator.cost.bench import FEW, FEW_TOKENS, RAY_GIB, Bench
from orchestrator.cost.estimate import comparison_line, dry_run
from orchestrator.cost.forecast import RunForecast, forecast_of
from orchestrator.cost.measure import measure, share_of_worker
from orchestrator.cost.timing import Timing
from orchestrator.data.batches import EvalBatches
from orchestrator.data.dataset import Manifest, Split
from orchestrator.runs.facts import model_facts
from orchestrator.train.gradients import Gradients
from orchestrator.train.numerics import Worker
from orchestrator.train.ranks.exchange import Exchange
from orchestrator.train.ranks.slots import deal

N_VOCAB = 65
ONE_WORKER = Layout(num_workers=1, cpus_per_worker=1, use_gpu=False)
TIMING = Timing(
    step_s=0.5,
    eval_tokens_per_s=1000.0,
    sample_s=0.25,
    checkpoint_s=2.0,
    checkpoint_bytes=1e6,
    memory_gib=0.5,
    startup_s=2.0,
)


def small(*words: str) -> Experiment:
    return load_experiment(
        None,
        [
            "data.tokenizer=char",
            "model.n_layer=2",
            "model.n_head=2",
            "model.n_embd=32",
            "train.dtype=float32",
            "model.block_size=32",
            "train.micro_batch_size=2",
            "train.global_batch_size=16",
            "train.max_steps=24",
            "train.eval_interval=8",
            "train.checkpoint_interval=4",
            *words,
        ],
    )


def measured(*words: str) -> Timing | None:
    return measure(small(*words), N_VOCAB, ONE_WORKER, limit_s=300)  # on a busy machine, too


@pytest.fixture
def started(monkeypatch, tmp_path) -> list[str]:
    """Use an empty cache. Record jobs instead of running them; each returns `TIMING`."""
    jobs = []

    def run(job, _limit_s):
        jobs.append(job)
        return SimpleNamespace(returncode=0, stdout=json.dumps(asdict(TIMING)))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "machine_load", lambda: 0.0)
    monkeypatch.setattr(process, "run", run)
    return jobs


# ---- arithmetic ----


@pytest.mark.parametrize("steps", [1, 7, 8, 9, 24])
@pytest.mark.parametrize("interval", [None, 1, 4, 8, 100])
def test_evaluations_and_checkpoints_are_those_of_the_loop(steps, interval):
    word = "null" if interval is None else interval
    experiment = small(
        f"train.max_steps={steps}",
        f"train.eval_interval={word}",
        f"train.checkpoint_interval={word}",
    )
    due = {n for n in range(1, steps + 1) if n == steps or interval and n % interval == 0}
    assert timing.checkpoints(experiment) == len(due)
    assert timing.evaluations(experiment) == (len(due) + 1 if interval else 0)


@pytest.mark.parametrize(
    ("limit", "val", "train"),
    [("null", 1000, 5000), (200, 1000, 5000), (5000, 1000, 700), (64, 64, 65)],
)
def test_evaluation_counts_the_batches_of_the_loop(limit, val, train):
    experiment = small(f"train.eval_tokens={limit}")
    tokens = min(val, val if limit == "null" else limit)
    batches = 0
    for split in (val, train):
        stream = SimpleNamespace(tokens=split)
        batches += len(EvalBatches(stream, 32, 2, min(tokens, split)))
    seconds = timing.evaluation_seconds(experiment, val, train, TIMING)
    assert seconds == pytest.approx(batches * 2 * 32 / 1000.0 + 0.25)


@pytest.mark.parametrize("keep", [1, 2, 10])
@pytest.mark.parametrize("interval", ["null", 4, 12])
def test_disk_equals_that_of_simulated_checkpoints(keep, interval):
    experiment = small(f"train.keep={keep}", f"train.checkpoint_interval={interval}")
    kept = []
    most = 0
    for step in [24] if interval == "null" else range(interval, 25, interval):
        kept.append(step)
        most = max(most, len(kept))
        kept = sorted({kept[0], *kept[-keep:]})  # at worst, the best one is the first
    expected = timing.expected(experiment, 1000, 5000, TIMING)
    assert expected["disk_bytes"] == most * 1e6
    assert len(kept) - 1 <= expected["final_disk_bytes"] / 1e6 <= len(kept)


def test_time_of_a_run_is_the_sum_of_its_parts():
    expected = timing.expected(small(), 1000, 5000, TIMING)
    evaluation_s = timing.evaluation_seconds(small(), 1000, 5000, TIMING)
    assert expected["time_s"] == pytest.approx(3 * 2.0 + 24 * 0.5 + 4 * evaluation_s + 6 * 2.0)


@pytest.mark.parametrize(("workers", "slots"), [(1, 8), (2, 4), (3, 3), (4, 2), (5, 2), (8, 1)])
def test_share_of_a_worker_is_the_largest_of_all_ranks(workers, slots):
    experiment = small()  # one micro-batch per slot
    assert max(len(mine) for mine in deal(experiment.slots, workers)) == slots
    share = share_of_worker(experiment, workers)
    gradients = Gradients(
        [torch.nn.Parameter(torch.zeros(4))], share.micro_batches, Exchange(share.slots)
    )
    assert sum(map(list, gradients.my_slots()), []) == list(range(slots))
    assert share.slots == (slots if slots != 3 else 1)


def test_buffers_of_a_whole_step_are_counted_if_only_one_micro_batch_is_timed():
    scaled = Bench(small(), N_VOCAB, Worker(), step_budget_s=0.0, timed_s=0.4)
    whole = Bench(small(), N_VOCAB, Worker(), step_budget_s=100.0, timed_s=0.4)
    assert scaled.time_steps() > 0
    assert whole.time_steps() > 0
    gradients = whole.state.gradients
    buffers = len(gradients.free) + len(gradients.stack)  # beside the current one
    assert whole.unused_bytes == 0
    assert scaled.unused_bytes == pytest.approx(buffers * gradients.size * 4, rel=0.01)


@pytest.mark.parametrize("most", [1.0, 1e7, 5e7, 1.5e8])
def test_large_micro_batch_is_computed_from_a_part_of_it(monkeypatch, most):
    """Time grows linearly with the FLOPs, and memory with the tokens, above what is fixed."""

    class Linear(Bench):
        tokens = 0

        def _time_step(self):
            self.tokens = max(self.tokens, math.prod(self.shape))
            return 1.0 + 1e-8 * self._flops(*self.shape), 0.5

    monkeypatch.setattr(bench, "MOST_FLOPS", most)
    monkeypatch.setattr(bench, "peak_gib", lambda _: 1.0 + found.tokens / 1024)
    words = ["model.block_size=128", "train.micro_batch_size=8", "train.global_batch_size=32"]
    found = Linear(small(*words), N_VOCAB, Worker(), step_budget_s=100.0, timed_s=2.5)
    least = found._flops(1, 2 * FEW_TOKENS)
    assert found._flops(*found.shape) <= max(least, most) < found._flops(8, 128)
    whole_s = 1.0 + 1e-8 * found._flops(8, 128)
    assert found.time_steps() == pytest.approx(4 * whole_s + 0.5)
    buffers = 4 * found.state.gradients.size  # of the second pair of micro-batches
    tokens = 8 * 128 - math.prod(found.shape)
    assert found.unused_bytes == pytest.approx(tokens * 2**20 + buffers)


# ---- measurement ----


@pytest.mark.parametrize(
    ("seconds", "calls", "mean"),
    [
        ([0.1], FEW, 0.1),  # steady: few calls are enough
        ([0.1, 0.1, 0.1, 0.1, 0.3], 25, 0.14),  # a busy machine: as many as there may be
        ([0.1, 0.9], 10, 0.5),  # until the time is over
        ([7.0], 1, 7.0),
    ],
)
def test_timing_ends_when_the_mean_is_known(seconds, calls, mean):
    now = 0.0
    done = 0

    def work() -> None:
        nonlocal now, done
        now += seconds[done % len(seconds)]
        done += 1

    assert bench.mean_seconds(work, 5.0, 25, lambda: now) == pytest.approx(mean)
    assert done == calls


def test_measurement_runs_in_its_own_process_and_is_cached(monkeypatch, tmp_path):
    ballast = np.ones(1 << 27)  # 1 GiB in this process
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "machine_load", lambda: 0.5)
    monkeypatch.chdir(tmp_path)  # works from any folder
    found = measured()
    assert ballast.nbytes == 1 << 30
    parameters = model_facts(small(), N_VOCAB)["parameters"]
    assert found.checkpoint_bytes == pytest.approx(3 * 4 * parameters, rel=0.05)  # and some text
    assert RAY_GIB + 0.1 < found.memory_gib < 0.9
    assert found.step_s > 0 < found.eval_tokens_per_s
    assert found.load == 0.5

    monkeypatch.setattr(process, "run", None)  # no other process is started
    others = ["train.max_steps=48", "schedule.max_lr=1e-5", "train.seed=3", "name=other"]
    assert measured() == measured(*others) == found


@pytest.mark.parametrize(
    "word",
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
def test_another_step_is_measured_again(started, word):
    assert measured() is not None
    assert measured(word) is not None
    assert len(started) == 2


def test_evaluation_speed_is_the_sum_over_workers(started):
    two = measure(small(), N_VOCAB, Layout(2, 1, False))
    assert two.eval_tokens_per_s == 2 * TIMING.eval_tokens_per_s


CHANGES = [
    {"step_s": math.nan},
    {"step_s": math.inf},
    {"step_s": -1},
    {"step_s": 0},
    {"step_s": True},
    {"step_s": "1"},
    {"step_s": None},
    {"load": -1},
    {"load": math.nan},
    {"more": 1.0},
]


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
        *(json.dumps(asdict(TIMING) | change).encode() for change in CHANGES),
    ],
)
def test_damaged_cache_is_measured_again_and_replaced(started, tmp_path, damage):
    measured()
    [file] = tmp_path.rglob("*.json")
    file.write_bytes(damage)
    assert cache.read(small(), N_VOCAB, ONE_WORKER) is None
    assert measured() == TIMING
    assert len(started) == 2
    assert cache.read(small(), N_VOCAB, ONE_WORKER) == TIMING


def test_cache_that_cannot_be_written_is_no_error(started, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measured() == TIMING


def test_dry_run_shows_the_number_of_workers_that_need_most(monkeypatch, tiny_corpus):
    monkeypatch.setattr(timing, "this_machine", lambda: Node(2))
    slots = ["train.global_batch_size=128", "train.reduction_slots=64"]
    workers = ["compute.num_workers=[2, 3]", "compute.cpus_per_worker=1", "compute.use_gpu=false"]
    shown = dry_run(small(f"data.corpus={tiny_corpus}", *slots, *workers), timed=False)
    assert "with 3 worker(s): at most 22 of 64 micro-batches per worker" in shown["batch"]
    assert (
        "for each of 3 worker(s) on 2 node(s) like this machine, activations" in shown["cost"][-1]
    )


def test_run_on_gpus_is_unknown_without_a_gpu(started, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "asks for a GPU" in measure(small(), N_VOCAB, Layout(1, 1, True))
    assert started == []
    words = ["compute.use_gpu=true", "data.tokenizer=byte", "data.corpus=builtin:stdlib"]
    [line] = dry_run(small(*words))["expected"]
    assert line.startswith("time and memory are unknown: the run asks for a GPU, and this machine")


def test_failed_or_slow_measurement_is_unknown_and_not_cached(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "takes more than 0 s" in measure(small(), N_VOCAB, ONE_WORKER, limit_s=0.05)
    for python, said in (("/bin/false", "ended with 1"), ("/no/such/python", "No such file")):
        monkeypatch.setattr(sys, "executable", python)
        assert said in measured()
    assert list(tmp_path.rglob("*.json")) == []


def test_timing_holds_until_the_machine_is_less_busy(started, monkeypatch):
    for load, count in ((4.0, 1), (9.0, 1), (2.5, 1), (1.5, 2), (4.0, 2), (0.6, 2), (0.2, 3)):
        monkeypatch.setattr(cache, "machine_load", lambda now=load: now)
        measured()
        assert len(started) == count, load


@pytest.mark.parametrize("seen", [0.4, 0.5, 0.7])
def test_step_of_a_run_replaces_a_similar_timing(started, seen):
    measured()
    cache.learn(small(), N_VOCAB, ONE_WORKER, [{"step": 1, "perf/step_time_s": seen}])
    assert measured() == replace(TIMING, step_s=seen)
    assert len(started) == 1


def test_only_windows_of_the_largest_batch_replace_a_timing(started):
    words = ["train.global_batch_size=null", "train.batch_schedule={0: 8, 15: 16}"]
    measured(*words)
    times = {10: 0.3, 20: 0.4, 24: 0.6}  # step 15 is in the second window
    lines = [{"step": step, "perf/step_time_s": seconds} for step, seconds in times.items()]
    cache.learn(small(*words), N_VOCAB, ONE_WORKER, lines)
    assert measured(*words) == replace(TIMING, step_s=0.6)


@pytest.mark.parametrize("seen", [0.1, 1.5])
def test_timing_that_disagrees_with_a_run_is_measured_again(started, seen):
    measured()
    cache.learn(small(), N_VOCAB, ONE_WORKER, [{"step": 1, "perf/step_time_s": seen}])
    assert measured() == TIMING
    assert len(started) == 2


# ---- in a run ----

SPLITS = {
    name: Split(tokens, 1, tokens, "", ()) for name, tokens in (("train", 5000), ("val", 1000))
}
DATASET = Manifest(Path("tokens"), {"name": "char", "n_vocab": N_VOCAB}, SPLITS)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The clock of a forecast, in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(forecast, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def run_lines(experiment: Experiment, clock: SimpleNamespace, step_s: float, compile_s: float = 0):
    """Yield the journal lines of a run that starts in 9 s, evaluates in 2 s, and ends."""
    config = experiment.train
    training = window = 0.0
    clock.now += 9.0
    began = clock.now
    for step in range(config.max_steps + 1):
        if step > 0:
            seconds = step_s + compile_s * (step == 1)
            clock.now += seconds
            training += seconds
            window += seconds
        line = {"step": step, "timestamp": 0}
        if config.eval_interval and (step % config.eval_interval == 0 or step == config.max_steps):
            clock.now += 2.0 + compile_s * (step == 0)
            line["val/loss"] = 1.0
        if step > 0 and step % config.log_interval == 0 or step == config.max_steps:
            line["perf/step_time_s"] = window / ((step - 1) % config.log_interval + 1)
            window = 0.0
            line["run/goodput"] = training / (clock.now - began)
            line["run/attempt"] = 1
            line["memory/max_resident_gib"] = 0.5
        if len(line) > 2:
            yield line
    clock.now += forecast.END_S


def comments_of(found: RunForecast, lines) -> list[tuple[int, str]]:
    said = [(line["step"], found.comment(line)) for line in lines]
    return [(step, words) for step, words in said if words is not None]


def test_run_that_was_timed_prints_its_estimate(started, capsys):
    measured()
    found = forecast_of(small(), DATASET, ONE_WORKER)
    assert found.estimate == timing.expected(small(), 1000, 5000, TIMING)
    assert capsys.readouterr().out.startswith("expected: ")


def test_timing_without_compile_is_not_the_estimate_of_a_compiled_run(started, capsys):
    measured()
    assert forecast_of(small("train.compile=true"), DATASET, ONE_WORKER).estimate is None
    assert capsys.readouterr().out == ""


def test_run_that_was_not_timed_measures_nothing(started, capsys):
    assert forecast_of(small(), DATASET, ONE_WORKER).estimate is None
    assert started == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("evaluates", ["null", 30, 100, 1000])
@pytest.mark.parametrize(
    ("step_s", "log", "compile_s", "tells_at"),
    [
        (0.25, 10, 0, 30),
        (0.25, 10, 60, 30),
        (0.001, 5, 0, None),  # its steps take less than 3 s
        (5, 50, 0, 100),
        (5, 85, 0, None),  # the second line is that of the last step
    ],
)
def test_first_steps_tell_what_the_run_takes(clock, evaluates, step_s, log, compile_s, tells_at):
    """The time, from all that is seen until then: its start, its steps and its evaluation."""
    words = [f"train.eval_interval={evaluates}", f"train.log_interval={log}", "train.keep=2"]
    words += [f"train.compile={str(compile_s > 0).lower()}", "train.checkpoint_interval=100"]
    experiment = small("train.max_steps=170", *words)
    found = RunForecast(experiment, 1 << 20, None)
    comments = []
    for line in run_lines(experiment, clock, step_s, compile_s):
        seen_s = clock.now
        comments += comments_of(found, [line])
        if line["step"] == tells_at:
            told_s = seen_s
    if tells_at is None:
        assert comments == [] and found.estimate is None
        return
    [(step, comment)] = comments
    assert step == tells_at and comment.startswith("expected: ")
    unknown_s = 4 if compile_s else 0  # two evaluations, until one is seen that compiles nothing
    assert found.estimate["time_s"] == pytest.approx(clock.now, abs=unknown_s)
    assert found.estimate["share_over"] == pytest.approx(told_s / clock.now, rel=unknown_s / 50)
    assert found.estimate["memory_gib"] == 0.5 + 2**-10
    assert found.estimate["disk_bytes"] == found.estimate["final_disk_bytes"] == 2 << 20


def test_forecast_goes_on_after_a_restart_of_the_workers(clock):
    experiment = small("train.max_steps=400", "train.log_interval=10", "train.eval_interval=null")
    found = RunForecast(experiment, 1, None)
    lines = {line["step"]: line for line in run_lines(experiment, clock, 0.125)}
    clock.now = 300.0
    seen = [lines[step] for step in (10, 20, 20, 30, 40, 50, 60)]  # killed after step 20
    [(step, _)] = comments_of(found, seen)
    assert step == 50
    assert found.estimate["time_s"] == 300 + 350 * 0.125 + forecast.END_S


def lines_of_steps(seconds: float, interval: int, count: int) -> list[dict]:
    return [
        {
            "step": n * interval,
            "timestamp": 0,
            "perf/step_time_s": seconds,
            "run/goodput": 1.0,
            "run/attempt": 1,
        }
        for n in range(1, count)
    ]


@pytest.mark.parametrize(
    ("planned", "said"),
    [
        (60.0, "expected: 9m2[0-9]s in all, by the steps so far, and not 1m00s"),
        (540.0, None),
    ],
)
def test_time_is_given_again_after_the_first_steps(clock, planned, said):
    experiment = small("train.max_steps=1000", "train.eval_interval=null")
    found = RunForecast(experiment, 1, {"time_s": planned})
    comments = []
    for line in lines_of_steps(0.56, 10, 101):
        clock.now = 0.56 * line["step"]
        comments.append(found.comment(line))
    given = [comment for comment in comments if comment is not None]
    if said is None:
        assert given == [] and found.corrected_s is None
        return
    (comment,) = given
    assert re.match(said, comment)
    assert comments.index(comment) == 1  # 10 steps after the first line take 5 s


def test_time_is_given_again_after_the_first_minute_if_the_steps_have_become_slower(clock):
    found = RunForecast(
        small("train.max_steps=1000", "train.eval_interval=null"), 1, {"time_s": 60}
    )
    slower = lines_of_steps(1.12, 10, 101)[3:]
    comments = []
    for line in [*lines_of_steps(0.56, 10, 4), *slower]:
        clock.now += 10 * line["perf/step_time_s"]
        comments.append(found.comment(line))
    first, second = (comment for comment in comments if comment is not None)
    assert "and not 1m00s" in first and first.split()[1] in second.split("and not ")[1]
    assert found.corrected_s > 560


def test_short_run_is_not_corrected(clock):
    found = RunForecast(small("train.max_steps=8"), 1, {"time_s": 1.0})
    assert {found.comment(line) for line in lines_of_steps(0.56, 1, 9)} == {None}


def test_last_step_corrects_nothing(clock):
    found = RunForecast(small("train.max_steps=200"), 1, {"time_s": 1.0})
    assert {found.comment(line) for line in lines_of_steps(1.0, 100, 3)} == {None}
    assert found.corrected_s is None


def test_comparison_has_the_planned_the_corrected_and_the_real_time():
    seen = {"time_s": 1552.0, "memory_gib": None}
    planned = {"time_s": 476.0, "memory_gib": 0.5, "corrected_s": 1510.0}
    assert comparison_line(planned, seen) == (
        "planned 7m56s (+226%), corrected 25m10s (+3%), took 25m52s"
    )
    assert comparison_line({"corrected_s": 1510.0}, seen) == (
        "planned unknown, corrected 25m10s (+3%), took 25m52s"
    )


def test_comparison_leaves_out_numbers_that_were_not_measured():
    expected = {"time_s": 110.0, "memory_gib": 0.5, "disk_bytes": 3e6, "final_disk_bytes": 1 << 20}
    seen = {"time_s": 118.0, "memory_gib": 0.625, "final_disk_bytes": 1 << 20}
    assert comparison_line(expected, seen) == (
        "expected 1m50s, took 1m58s (+7%); memory 512 MiB expected, 640 MiB seen (+25%); "
        "disk at the end 1 MiB expected, 1 MiB seen (+0%)"
    )
    assert comparison_line({"time_s": 110.0, "share_over": 0.124}, {"time_s": 118.0}) == (
        "expected 1m50s, took 1m58s (+7%); estimated when 12% of the time was over"
    )
    assert "memory" not in comparison_line(expected, {**seen, "memory_gib": None})
    assert "memory" not in comparison_line({**expected, "memory_gib": 0.0}, seen)
