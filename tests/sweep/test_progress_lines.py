"""The lines that a running sweep prints."""

import contextlib
import math
from dataclasses import replace

import pytest

from orchestrator.cluster import gauges
from orchestrator.config.experiment import parse_experiment
from orchestrator.cost.estimate import expected_line
from orchestrator.cost.timing import evaluation_tokens
from orchestrator.runs import journal
from orchestrator.runs.ending import Ending
from orchestrator.runs.facts import model_facts
from orchestrator.sweep.records import read_result, read_spec
from orchestrator.sweep.report.files import SweepFiles
from orchestrator.sweep.report.pace import Pace
from orchestrator.sweep.report.progress_lines import ProgressLines
from orchestrator.sweep.stage import run_stage
from orchestrator.train.numerics import Worker

WORDS = [
    "sweep.trials.a.train.max_steps=20",
    "sweep.trials.b={train.max_steps: 20, schedule.decay_shape: cosine}",
]


@pytest.fixture
def study(sweeps):
    return sweeps.open(*WORDS)


@pytest.fixture
def progress(study):
    return study.progress


@pytest.fixture
def timed(monkeypatch):
    """Let a step of 8 sequences take 10 s and an evaluation 4 s, as the journals say."""
    read = journal.read

    def read_timed(folder):
        lines = read(folder)
        spec = read_spec(folder)
        sizes = parse_experiment(spec.experiment, "stage").batch_sizes
        before = spec.start
        evaluations = 0
        for line in lines:
            evaluations += "val/loss" in line
            if "perf/step_time_s" in line:
                step = line["step"]
                window, training = (
                    10.0 * (sizes.before(step) - sizes.before(start)) / 8
                    for start in (before, spec.start)
                )
                line["perf/step_time_s"] = window / (step - before)
                line["run/goodput"] = training / (training + 4.0 * evaluations)
                before = step
        return lines

    monkeypatch.setattr(journal, "read", read_timed)


def half_of_trunk(study, seen: Pace, now: list[float]):
    """Train 12 of the 17 steps that the trials share, and yield there."""
    folder = study.folder.stage(study.progress.next())
    with contextlib.closing(run_stage(folder, Worker())) as lines:
        for line in lines:
            now[0] = 10.0 * line["step"]
            seen.look()
            if line["step"] == 12:
                yield seen


@pytest.fixture(params=[{"time_s": 100.0}, None], ids=["measured", "not measured"])
def half_way(request, timed, study):
    """The pace of a sweep while its trunk is trained."""
    now = [0.0]
    seen = Pace(study, 1, request.param, clock=lambda: now[0])
    assert seen.look().left_s == (100.0 if request.param else None)
    yield from half_of_trunk(study, seen, now)


def test_status_counts_stages_trials_and_steps_and_estimates_the_end(study):
    lines = ProgressLines(Pace(study, 2, {"time_s": 10.0}), study.best)
    # A trunk of 17 steps and two branches of 3.
    assert lines.status() == "stages 0/3 | trials 0/2 | 0 of 23 steps run, 17 saved | ETA 10s"


def test_estimate_follows_the_stages_that_ran(sweeps, study, timed):
    sweeps.run(study, limit=1)
    seen = Pace(study, 1, {"time_s": 1000.0})
    assert "stages 1/3 | trials 0/2 | 17 of 23" in ProgressLines(seen, study.best).status()
    assert seen.look().left_s == pytest.approx(6 * 10.0 + 2 * 4.0)
    seen.slots = 2
    assert seen.look().left_s == pytest.approx(3 * 10.0 + 4.0)


def test_larger_model_of_a_sweep_takes_longer(sweeps, timed):
    study = sweeps.open("sweep.grid.model.n_embd=[16,32]")
    sweeps.run(study, limit=1)
    (first,) = study.progress.begun
    flops = {}
    for stage in study.tree.stages:
        trial = study.trials[stage.example]
        n_vocab = trial.dataset.tokenizer["n_vocab"]
        flops[stage.id] = model_facts(trial.experiment, n_vocab)["flops_per_token"]
    (other,) = flops.keys() - {first}
    left_s = Pace(study, 1).look().left_s
    # 20 steps, and evaluations at 0, 5, 10, 15 and 20
    assert left_s == pytest.approx((20 * 10.0 + 5 * 4.0) * flops[other] / flops[first])


# The trunk has 5 steps and an evaluation left, the branches have 3 steps and an evaluation each.
LEFT_S = 5 * 10.0 + 4.0 + 2 * (3 * 10.0 + 4.0)


def test_steps_of_a_running_stage_count_and_the_eta_follows_them(half_way, study, monkeypatch):
    seen = {}
    monkeypatch.setattr(gauges, "show", lambda name, **values: seen.update(values, name=name))
    status = ProgressLines(half_way, study.best).status()
    assert "12 of 23 steps run, 17 saved | ETA 2m02s" in status
    assert half_way.look().left_s == pytest.approx(LEFT_S)
    assert (seen["name"], seen["step"], seen["steps"]) == (study.folder.name, 12, 23)
    assert seen["left_seconds"] == pytest.approx(LEFT_S)
    assert seen["tokens_per_second"] > 0


def test_time_follows_the_sequences_of_a_batch_schedule(sweeps, timed):
    sizes = ["train.global_batch_size=null", "train.batch_schedule={0: 8, 11: 32, 16: 8}"]
    study = sweeps.open(*WORDS, *sizes)
    for seen in half_of_trunk(study, Pace(study, 1), [0.0]):
        left_s = seen.look().left_s
    # Four of the five steps that the trunk has left have four times the sequences of the others.
    assert left_s == pytest.approx(LEFT_S + 4 * 30.0)


def test_steps_of_an_earlier_attempt_are_not_left(sweeps, timed):
    words = [*WORDS, "train.eval_interval=100"]
    study = sweeps.open(*words)
    for _ in half_of_trunk(study, Pace(study, 1), [0.0]):
        break
    again = sweeps.open(*words)
    folder = again.folder.stage(again.progress.next())
    ((first,),) = again.progress.begun.values()
    assert first > 0  # the newest checkpoint
    with contextlib.closing(run_stage(folder, Worker())) as lines:
        step = next(lines)["step"]
        left_s = Pace(again, 1).look().left_s
    # No evaluation was seen yet. Its forward passes take a third of the time of a step.
    trial = again.trials["a"]
    tokens = (trial.dataset.splits[name].tokens for name in ("val", "train"))
    evaluation = evaluation_tokens(trial.experiment, *tokens) / trial.experiment.tokens_per_step / 3
    assert left_s == pytest.approx(10.0 * (23 - step + 2 * evaluation))


def test_stage_that_makes_no_step_in_this_attempt_tells_no_pace(sweeps, study):
    sweeps.run(study, limit=1)
    (stage,) = study.progress.begun
    folder = study.folder.stage(stage)
    folder.result_file.unlink()  # as if killed after the last checkpoint
    again = sweeps.open(*WORDS)
    sweeps.run(again, limit=1)
    result = read_result(folder)
    assert (*again.progress.begun, result.steps_run) == (stage, 0)
    again.progress.stored.results[stage] = replace(result, seconds=60.0)
    assert Pace(again, 1).look().left_s is None
    assert Pace(again, 1, {"time_s": 1000.0}).look().left_s == pytest.approx(1000.0, abs=60.0)


def test_first_steps_tell_what_the_sweep_takes_or_correct_it(half_way, study, capsys):
    planned = half_way.planned_s
    lines = ProgressLines(half_way, study.best)
    for _ in range(2):
        lines.asked = -math.inf
        lines.tick()
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    if planned is None:
        assert out == f"expected: {expected_line(half_way.estimate)}\n"
        assert half_way.estimate["time_s"] == pytest.approx(120.0 + LEFT_S)
        assert half_way.estimate["share_over"] == pytest.approx(120.0 / (120.0 + LEFT_S))
        assert half_way.estimate["memory_gib"] > 0.1 and half_way.corrected_s is None
        return
    assert out.startswith("expected: 4m02s in all") and "not 1m40s" in out
    assert half_way.corrected_s == pytest.approx(120.0 + LEFT_S)
    assert half_way.estimate == {"time_s": 100.0}


def test_long_stage_updates_the_journal_of_the_sweep_and_its_trials(half_way, study):
    files = SweepFiles(study, half_way)
    files.tick()
    assert journal.last(study.folder) is None  # too early
    files.last = -math.inf
    files.tick()
    last = journal.last(study.folder)
    assert (last["sweep/steps_run"], last["sweep/seconds_left"]) == (12, LEFT_S)
    for name in study.trials:
        assert journal.last(study.folder.trial(name))["step"] == 12


def test_tree_is_drawn_once_and_only_after_the_first_stages_were_started(study):
    files, figure = SweepFiles(study), study.folder.figure_file("tree")
    files.begin()
    assert study.folder.plan_file.exists() and not figure.exists()
    files.tick()
    figure.unlink()  # raises if there is none
    files.tick()
    files.finish(Ending("again"), 1.0)
    assert not figure.exists(), "it was drawn again"


def test_line_is_printed_when_a_stage_ends_and_after_an_interval(progress, study, capsys):
    lines = ProgressLines(Pace(study, 1), study.best)
    stage = progress.tree.by_id[progress.next()]
    lines.last = math.inf  # the last line was printed a moment ago
    lines.tick()
    assert capsys.readouterr().out == ""
    lines.last = -math.inf
    lines.tick()
    assert capsys.readouterr().out.count("stages 0/3") == 1
    lines.stage_ended(stage)
    assert capsys.readouterr().out.count("\n") == 2


def test_failed_stage_is_reported_with_its_reason(sweeps, study, capsys):
    def fail(stage):
        raise RuntimeError("no room")

    sweeps.run(study, fail=fail)
    ProgressLines(Pace(study, 1), study.best).stage_ended(study.tree.stages[0])
    assert "steps 0–17 of a and 1 more: failed: RuntimeError: no room" in capsys.readouterr().out
