"""Every trial of a sweep is what it is alone, to the last bit, and no step is run twice. Real training, no Ray."""

import json
import random

import pytest

from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs import stop
from orchestrator.sweep import stored
from orchestrator.sweep.stage import run_stage
from orchestrator.train.numerics import Worker

MIXED = [
    "sweep.trials.wsd-20.schedule.kind=wsd",
    "sweep.trials.wsd-14.train.max_steps=14",
    "sweep.trials.wsd-30-cosine={schedule.decay_shape: cosine, train.max_steps: 30}",
    "sweep.trials.wsd-20-sqrt.schedule.decay_shape=1-sqrt",
    "sweep.trials.constant-13={schedule.kind: constant, train.max_steps: 13}",
    "sweep.trials.constant-17={schedule.kind: constant, train.max_steps: 17}",
    "sweep.trials.linear.schedule.kind=linear",
    "sweep.trials.cosine.schedule.kind=cosine",
    "sweep.trials.inverse.schedule.kind=inverse_sqrt",
    "sweep.trials.peak.schedule.max_lr=5e-3",
    "sweep.trials.other={optim.weight_decay: 0.3, train.max_steps: 12}",
]


def steps_of(study, ran) -> int:
    return sum(
        json.loads((study.folder.stage(i).result_file).read_text())["steps_run"] for i in ran
    )


def assert_alone(sweeps, study, names=None):
    for name in names or study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name


@pytest.mark.parametrize("keep", ["true", "false"])
def test_a_mixed_sweep_is_its_trials(sweeps, keep):
    study = sweeps.open(*MIXED, f"sweep.keep_branches={keep}")
    ran = sweeps.run(study)
    assert_alone(sweeps, study)
    assert len(ran) == len(set(ran)) == len(study.tree.stages)
    assert (
        steps_of(study, ran)
        == study.tree.steps_in_tree
        == study.tree.steps_to_run
        < study.tree.steps_asked
    )
    assert {row.state for row in study.results()} == {"done"}


def test_killed_between_any_two_stages_nothing_is_run_twice(sweeps):
    words = MIXED[:5]
    whole = sweeps.open(*words, name="whole")
    sweeps.run(whole)
    ran = []
    while True:  # a new plan from disk before every stage, as after a kill
        study = sweeps.open(*words)
        if not study.tree.to_run:
            break
        ran += sweeps.run(study, limit=1)
    assert len(ran) == len(set(ran)) == len(whole.tree.stages)
    for name in study.trials:
        ours, theirs = (sweeps.outcome(s.folder.trial(name)) for s in (study, whole))
        assert ours == theirs


def test_killed_inside_a_stage_it_goes_on_there(sweeps):
    study = sweeps.open(*MIXED[:2])
    progress = study.progress
    stage = progress.next()
    for line in run_stage(progress.folder.stage(stage), Worker()):
        if line["step"] == 6:  # after the checkpoint of step 4; the lines of 5 and 6 are made again
            break
    study = sweeps.open(*MIXED[:2])
    ran = sweeps.run(study)
    assert ran[0] == stage
    assert steps_of(study, [stage]) == study.tree.by_id[stage].stop - 4
    assert_alone(sweeps, study)


@pytest.mark.parametrize("seed", range(3))
def test_asked_to_stop_again_and_again_no_step_is_run_twice(sweeps, seed):
    """At any question, of which each step and each batch of an evaluation asks some: in stages that branch, in one that only
    ends a trial, and before one that diverges."""
    words = [
        *MIXED[:2],
        "sweep.trials.end={schedule.kind: constant, train.max_steps: 17}",
        "train.checkpoint_interval=null",
        "sweep.trials.hot={schedule.max_lr: 1e38, optim.max_grad_norm: null, train.max_steps: 13}",
    ]
    draw, starts, run, over = random.Random(seed), 0, 0, False
    while not over:
        study, questions = sweeps.open(*words), iter([False] * draw.randrange(60))
        stop.clear(study.folder)

        def asked(study=study, questions=questions) -> bool:
            if next(questions, True):
                stop.request(study.folder, "SIGTERM")
            return bool(stop.requested(study.folder))

        sweeps.run(study, stop_asked=asked)
        starts, run, over = starts + 1, run + study.summary["steps_run"], study.is_over
        assert over or stop.requested(study.folder)
        assert {"stopped", "failed"} & {row.state for row in study.results()} == set()
    assert starts > 3
    assert (
        run == study.tree.steps_in_tree - 12
    )  # of the trial that diverges, all but its first step
    assert {row.trial: row.state for row in study.results() if row.state != "done"} == {
        "hot": "diverged"
    }
    assert_alone(sweeps, study, [name for name in study.trials if name != "hot"])


def test_a_sweep_that_grows_runs_only_what_is_new(sweeps):
    first = sweeps.open(*MIXED[:4])
    before = steps_of(first, sweeps.run(first))
    study = sweeps.open(*MIXED)
    now = steps_of(study, sweeps.run(study))
    assert now == study.tree.steps_to_run
    # Two of the new trials end inside a trunk at whose end alone a checkpoint stands: up to there it is made again.
    assert before + now == study.tree.steps_in_tree + study.tree.steps_again
    assert 0 < study.tree.steps_again < 16
    assert_alone(sweeps, study)


@pytest.mark.parametrize("end", [12, 13, 16])
def test_a_trial_that_ends_where_a_trunk_stands_costs_an_evaluation(sweeps, end):
    """wsd-20 and its longer sister branch at step 17; a constant run of that length is the trunk itself."""
    trunk = ["sweep.trials.a.train.max_steps=20", "sweep.trials.b.train.max_steps=30"]
    sweeps.run(sweeps.open(*trunk))
    study = sweeps.open(
        *trunk,
        "sweep.trials.end={schedule.kind: constant, train.max_steps: 17}",
        f"sweep.trials.inside={{schedule.kind: constant, train.max_steps: {end}}}",
    )
    ran = sweeps.run(study)
    assert sorted(study.tree.by_id[i].stop for i in ran) == sorted({17, end})
    assert (
        steps_of(study, ran)
        == study.tree.steps_to_run
        == study.tree.steps_again
        == (end if end < 17 else 0)
    )
    assert_alone(sweeps, study)


def test_checkpoints_of_an_interrupted_stage_serve_a_tree_of_another_shape(sweeps):
    """The grid is changed after a kill: the old stage is none any more, but its states are states."""
    study = sweeps.open("sweep.trials.long.train.max_steps=30")
    progress = study.progress
    for line in run_stage(progress.folder.stage(progress.next()), Worker()):
        if line["step"] == 20:
            break
    study = sweeps.open("sweep.trials.longer.train.max_steps=40")
    ran = sweeps.run(study)
    assert study.tree.steps_to_run == 40 - 16 == steps_of(study, ran)
    assert_alone(sweeps, study)


# ---- checkpoints ----
def test_branches_go_when_nothing_pending_needs_them_and_results_stay(sweeps):
    study = sweeps.open(*MIXED, "sweep.keep_branches=false", "train.keep=1")
    sweeps.run(study)
    for stage in study.tree.stages:
        steps = checkpoint.steps(study.folder.stage(stage.id).checkpoints)
        assert (stage.stop in steps) == bool(stage.ends), stage
        assert len(steps) <= 2  # the last one, and the best where that is another
    again = sweeps.open(*MIXED, "sweep.keep_branches=false", "train.keep=1")
    assert again.tree.to_run == frozenset()


def test_a_branch_that_was_removed_is_made_again_and_counted(sweeps):
    words = [
        "sweep.trials.a.train.max_steps=20",
        "sweep.trials.b={train.max_steps: 20, schedule.decay_shape: cosine}",
    ]
    sweeps.run(sweeps.open(*words, "sweep.keep_branches=false"))
    study = sweeps.open(
        *words, "sweep.trials.c={train.max_steps: 20, schedule.decay_shape: 1-sqrt}"
    )
    assert (
        study.tree.steps_again == 17
    )  # at the first step of a decay every shape has its full rate
    sweeps.run(study)
    assert_alone(sweeps, study)


# ---- what goes wrong ----
def test_a_trial_that_diverges_ends_alone_with_the_bits_that_it_had(sweeps):
    words = [*MIXED[:2], "sweep.trials.hot={schedule.max_lr: 1e38, optim.max_grad_norm: null}"]
    study = sweeps.open(*words)
    ran = sweeps.run(study)
    states = {row.trial: row.state for row in study.results()}
    assert states == {"wsd-20": "done", "wsd-14": "done", "hot": "diverged"}
    assert "not finite" in next(row.reason for row in study.results() if row.trial == "hot")
    assert_alone(sweeps, study, ["wsd-20", "wsd-14"])
    summary = json.loads((study.folder.path / "trials" / "hot" / "summary.json").read_text())
    assert summary["status"] == "FAILED" and summary["state"] == "diverged"
    again = sweeps.open(*words)
    assert sweeps.run(again) == [] and len(ran) == 4
    assert {r.trial: r.state for r in again.results()} == states


def test_a_trunk_that_diverges_takes_its_branches_and_is_never_run_again(sweeps):
    hot = [
        "sweep.trials.a={schedule.max_lr: 0.9, train.max_steps: 30}",
        "sweep.trials.b={schedule.max_lr: 0.9, train.max_steps: 30, schedule.decay_shape: cosine}",
        MIXED[0],
    ]
    study = sweeps.open(*hot, "sweep.diverged_above=3.7")
    sweeps.run(study)
    losses = [r["train/loss"] for r in sweeps.alone(study, "a")["curve"] if "train/loss" in r]
    assert max(losses) > 3.7, "the test needs a trial that gets worse"
    assert [row.state for row in study.results()] == ["diverged", "diverged", "done"]
    assert "sweep.diverged_above=3.7" in study.results()[0].reason
    grown = sweeps.open(
        *hot,
        "sweep.trials.c={schedule.max_lr: 0.9, train.max_steps: 40}",
        "sweep.diverged_above=3.7",
    )
    assert grown.tree.to_run == frozenset()
    raised = sweeps.open(*hot, "sweep.diverged_above=1e9")
    sweeps.run(raised)
    assert {row.state for row in raised.results()} == {"done"}
    assert_alone(sweeps, raised, ["a", "b"])


def test_an_error_ends_its_stage_and_what_follows_and_is_tried_again_next_time(sweeps):
    def fail(stage):
        if stage.start == 17 and "wsd-20-sqrt" in stage.trials:
            raise RuntimeError("out of memory")

    study = sweeps.open(*MIXED[:4])
    sweeps.run(study, fail=fail)
    assert {row.trial: row.state for row in study.results()} == {
        "wsd-20": "done",
        "wsd-14": "done",
        "wsd-30-cosine": "done",
        "wsd-20-sqrt": "failed",
    }
    assert "out of memory" in study.results()[3].reason
    study = sweeps.open(*MIXED[:4])
    assert len(sweeps.run(study)) == 1
    assert_alone(sweeps, study)


def test_a_name_that_stood_for_another_experiment_is_refused(sweeps):
    sweeps.run(sweeps.open("sweep.trials.mine.train.max_steps=10"))
    with pytest.raises(
        ValueError, match="mine would not be what they were there; give the sweep a new name"
    ):
        sweeps.open("sweep.trials.mine.train.max_steps=10", "model.dropout=0.2")


# ---- probes ----
PROBED = [
    "sweep.grid.schedule.max_lr=[1e-2,1e-5]",
    "sweep.grid.schedule.decay_shape=[linear,cosine]",
    "train.max_steps=20",
    "sweep.stop=anneal_probe",
    "sweep.probe_step=8",
    "sweep.probe_steps=4",
]


def test_probes_drop_what_is_worse_and_leave_the_others_their_bits(sweeps):
    study = sweeps.open(*PROBED, "sweep.probe_margin=0.01")
    ran = sweeps.run(study)
    states = {row.trial: row.state for row in study.results()}
    assert set(states.values()) == {"done", "stopped"}
    assert all((state == "stopped") == ("1e-05" in name) for name, state in states.items())
    assert all(
        "above the best probe's" in row.reason for row in study.results() if row.state == "stopped"
    )
    assert_alone(sweeps, study, [name for name, state in states.items() if state == "done"])
    # two trunks up to the probe's fork, two probes, and one trunk with its two ends
    assert steps_of(study, ran) == 2 * 9 + 2 * 3 + (17 - 9) + 2 * 3
    again = sweeps.open(*PROBED, "sweep.probe_margin=0.01")
    assert sweeps.run(again) == []
    assert {row.trial: row.state for row in again.results()} == states


def test_a_wide_margin_drops_nothing(sweeps):
    study = sweeps.open(*PROBED, "sweep.probe_margin=100")
    sweeps.run(study)
    assert {row.state for row in study.results()} == {"done"}
    assert_alone(sweeps, study)


def test_seeds_are_judged_together(sweeps):
    """A setting goes on, or does not, with all of its seeds: a mean over some of them would compare with nothing."""
    study = sweeps.open(*PROBED, "sweep.probe_margin=0.01", "sweep.seeds=2")
    sweeps.run(study)
    by_setting = {}
    for row in study.results():
        by_setting.setdefault(row.setting, set()).add(row.state)
    assert sorted(map(tuple, by_setting.values())) == [
        ("done",),
        ("done",),
        ("stopped",),
        ("stopped",),
    ]


# ---- corners ----
def interrupt(sweeps, upto: int, *words: str) -> None:
    """Kill a sweep in its first stage, once it has logged step `upto`."""
    progress = sweeps.open(*words).progress
    for line in run_stage(progress.folder.stage(progress.next()), Worker()):
        if line["step"] >= upto:
            return


def test_a_trial_may_end_where_an_interrupted_stage_of_another_tree_has_a_checkpoint(sweeps):
    interrupt(sweeps, 18, "sweep.trials.long={schedule.kind: constant, train.max_steps: 30}")
    study = sweeps.open("sweep.trials.short={schedule.kind: constant, train.max_steps: 16}")
    assert steps_of(study, sweeps.run(study)) == 0
    assert_alone(sweeps, study)


def test_kept_checkpoints_inside_a_finished_stage_are_begun_from(sweeps):
    first = ["train.keep=10", "sweep.trials.a={schedule.kind: constant, train.max_steps: 30}"]
    sweeps.run(sweeps.open(*first))
    study = sweeps.open(*first, "sweep.trials.b={schedule.kind: constant, train.max_steps: 26}")
    assert steps_of(study, sweeps.run(study)) == study.tree.steps_to_run == 2  # from 24
    assert_alone(sweeps, study)


def test_a_failed_trial_can_be_tried_again_from_where_it_began(sweeps):
    words = [*MIXED[:1], MIXED[3], "sweep.keep_branches=false"]

    def fail(stage):
        if stage.start == 17 and "wsd-20-sqrt" in stage.trials:
            raise RuntimeError("out of memory")

    sweeps.run(sweeps.open(*words), fail=fail)
    study = sweeps.open(*words)
    assert study.tree.steps_to_run == 3
    sweeps.run(study)
    assert_alone(sweeps, study)
    assert checkpoint.steps(study.folder.stage(study.tree.stages[0].id).checkpoints) == []


def test_a_damaged_branch_is_made_again(sweeps, capsys):
    sweeps.run(sweeps.open(*MIXED[:2]))
    study = sweeps.open(*MIXED[:2])
    trunk = study.tree.stages[0]
    part = (
        checkpoint.path_of(study.folder.stage(trunk.id).checkpoints, trunk.stop)
        / "model.safetensors"
    )
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    study = sweeps.open(
        *MIXED[:2], "sweep.trials.new={train.max_steps: 14, schedule.decay_shape: cosine}"
    )
    assert "SHA-256 differs" in capsys.readouterr().out
    sweeps.run(study)
    assert_alone(sweeps, study)


def test_a_sweep_may_be_moved(sweeps, tmp_path_factory):
    sweeps.run(sweeps.open(*MIXED[:3]))
    (sweeps.folder / "sweep").rename(sweeps.folder / "moved")
    study = sweeps.open(*MIXED[:4], name="moved")
    sweeps.run(study)
    assert_alone(sweeps, study)


def test_a_probe_is_nobodys_trial(sweeps):
    """Whatever trials are called, and wherever their own decays begin."""
    study = sweeps.open(
        "sweep.trials.probe-1={schedule.decay_fraction: 0.75}",
        "sweep.trials.b.schedule.max_lr=1e-5",
        "sweep.stop=anneal_probe",
        "sweep.probe_step=8",
        "sweep.probe_steps=4",
        "sweep.probe_margin=0.01",
    )
    sweeps.run(study)
    assert {row.trial: row.state for row in study.results()} == {
        "probe-1": "done",
        "b": "stopped",
    }
    assert_alone(sweeps, study, ["probe-1"])
    ends = [
        checkpoint.steps(study.folder.stage(s.id).checkpoints)
        for s in study.tree.stages
        if "~" in s.trials[0]
    ]
    assert ends and not any(ends), "what a probe leaves is no result"


def test_probes_that_fail_decide_nothing_and_are_told(sweeps):
    def fail(stage):
        if all("~" in name for name in stage.trials):
            raise RuntimeError("out of memory")

    study = sweeps.open(*PROBED)
    sweeps.run(study, fail=fail)
    assert {row.state for row in study.results()} == {"done"}
    assert (study.summary["probes"], study.summary["probes_failed"]) == (2, 2)


def test_a_trial_that_was_done_before_the_probes_keeps_its_result_and_no_reason(sweeps):
    sweeps.run(sweeps.open("sweep.grid.schedule.max_lr=[1e-5]", "train.max_steps=20"))
    study = sweeps.open(
        "sweep.grid.schedule.max_lr=[1e-5,1e-2]", *PROBED[2:], "sweep.probe_margin=0.01"
    )
    sweeps.run(study)
    assert [(row.state, row.reason) for row in study.results()] == [("done", None)] * 2


def test_the_best_is_a_seed_of_the_best_setting(sweeps):
    study = sweeps.open(
        "sweep.grid.schedule.max_lr=[1e-2,3e-3]", "sweep.seeds=3", "train.max_steps=12"
    )
    sweeps.run(study)
    rows = study.results()
    means = {s: sum(r.final for r in rows if r.setting == s) / 3 for s in {r.setting for r in rows}}
    best = min(means, key=means.get)
    name, loss = study.winner(rows)
    assert (name, loss) == min(
        ((r.trial, r.final) for r in rows if r.setting == best), key=lambda x: x[1]
    )
    assert study.summary["best_trial"] == name


def test_half_precision_and_null_intervals_are_exact_too(sweeps):
    study = sweeps.open(
        *MIXED[:2],
        "train.dtype=float16",
        "train.log_interval=null",
        "train.checkpoint_interval=null",
    )
    sweeps.run(study)
    assert_alone(sweeps, study)


def test_what_is_gone_when_it_is_counted_ends_no_sweep(sweeps):
    """Checkpoints come and go in the folders of other stages meanwhile."""
    progress = sweeps.open(*MIXED[:1]).progress
    gone = progress.folder.stage("other").checkpoints / ".step-00000004.1-2"
    gone.mkdir(parents=True)
    (gone / "part").symlink_to("nowhere")
    (gone / "whole").write_bytes(b"1234")
    assert stored.checkpoint_bytes(progress.folder) == 4
