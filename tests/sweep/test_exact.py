"""Each trial of a sweep equals its own run bit for bit, and no step runs twice. Without Ray."""

import dataclasses
import errno
import json
import os
import random
import shutil

import pytest

from orchestrator import files
from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint import store as checkpoint
from orchestrator.code_hashes import module_hashes
from orchestrator.errors import UnreadableError
from orchestrator.runs import events, stop
from orchestrator.sweep import records, stored, trials
from orchestrator.sweep import stage as stage_module
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
def test_trials_of_a_mixed_sweep_equal_their_own_runs(sweeps, keep):
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


LATE = [
    "optim.kind=muon",
    "schedule.momentum.decay_fraction=0.5",
    "sweep.trials.constant={schedule.kind: constant}",
    "sweep.trials.decay={schedule.kind: constant, schedule.weight_decay: {kind: piecewise, "
    "points: {11: 1, 16: 0}}}",
    "sweep.trials.momentum={schedule.kind: constant, schedule.momentum: {kind: wsd, final: 0.8}}",
    "sweep.trials.warmup={schedule.kind: constant, optim.momentum_warmup_steps: 6}",
    "sweep.trials.both={schedule.kind: constant, optim.momentum_warmup_steps: 6, "
    "schedule.weight_decay.kind: cosine}",
    "sweep.trials.batch={schedule.kind: constant, train.batch_schedule: {0: 8, 13: 16}}",
    "sweep.trials.twice={schedule.kind: constant, train.batch_schedule: {0: 8, 13: 16, 17: 32}}",
    "sweep.trials.power={schedule.kind: power, schedule.decay_fraction: 0.5}",
]


def test_trials_that_differ_in_other_settings_share_their_steps_and_equal_their_own_runs(sweeps):
    """Killed at each checkpoint, too: a trial starts from the state of another one's settings."""
    study = sweeps.open(*LATE)
    counts = {name: trial.branch.changes for name, trial in study.trials.items()}
    assert counts["decay"] == {"weight_decay": 12} and counts["momentum"] == {"momentum": 11}
    # The trunk to step 11 and what each leaves it at, and two trials with a warmup from 0.85.
    own = {"constant": 20, "decay": 8, "momentum": 9, "warmup": 20, "both": 19, "power": 9}
    own |= {"batch": 7, "twice": 3}
    assert study.tree.steps_in_tree == sum(own.values())
    ran = sweeps.run(study)
    assert_alone(sweeps, study)
    assert steps_of(study, ran) == study.tree.steps_in_tree
    lines = [line for line in study.curve(study.trials["both"]) if "optim/lr" in line]
    assert {"optim/momentum", "optim/weight_decay_factor"} <= lines[-1].keys()
    assert study.curve(study.trials["twice"])[-1]["train/tokens"] == 16 * (13 * 8 + 4 * 16 + 3 * 32)


def test_stages_of_earlier_versions_are_read(sweeps):
    """They stored schedules of the learning rate; all other settings were constant."""
    study = sweeps.open("sweep.trials.a={train.max_steps: 5, optim.momentum: 0.8}")
    [stage] = sweeps.run(study)
    folder = study.folder.stage(stage)
    spec = records.read_spec(folder)
    stored = json.loads(folder.stage_file.read_text())
    steps = stored.pop("steps")
    for name in ("exponent", "points"):
        del steps["plan"]["lr"][name]
    stored["rates"] = {"schedule": steps.pop("plan")["lr"], **steps}
    folder.stage_file.write_text(json.dumps(stored))
    again = records.read_spec(folder)
    assert again.settings == spec.settings
    assert again.key(5) == stage


def test_damaged_journal_of_a_stage_that_is_done_is_restored(sweeps):
    study = sweeps.open("sweep.grid={train.max_steps: [10, 20]}")
    [stage, *_] = sweeps.run(study)
    journal_file = study.folder.stage(stage).journal_file
    before = journal_file.read_bytes()
    journal_file.write_bytes(before[:-1].rpartition(b"\n")[0] + b"\ngarbage\n")
    again = sweeps.open("sweep.grid={train.max_steps: [10, 20]}")
    [problem] = again.stored.restore_journals()
    assert str(journal_file) in problem
    assert journal_file.read_bytes() == before
    assert again.stored.restore_journals() == []
    assert_alone(sweeps, again)


def test_lost_folder_of_a_stage_is_made_again_and_those_after_it_train_no_step(sweeps):
    words = "sweep.grid={train.max_steps: [10, 20], schedule.kind: [wsd]}"
    first = sweeps.open(words)
    sweeps.run(first)
    [lost] = {stage.parent for stage in first.tree.stages} - {None}
    shutil.rmtree(first.folder.stage(lost).path)
    study = sweeps.open(words)
    assert not study.is_over
    lines = [study.curve(trial) for trial in study.trials.values()]
    ran = sweeps.run(study)
    assert lines == [[], []], "steps are lost until the stage has run"
    assert lost in ran and steps_of(study, ran) == steps_of(first, first.tree.by_id)
    assert_alone(sweeps, study)


def test_kill_between_any_two_stages_repeats_no_stage(sweeps):
    words = MIXED[:5]
    whole = sweeps.open(*words, name="whole")
    sweeps.run(whole)
    ran = []
    while True:  # read the folder again before every stage, as after a kill
        study = sweeps.open(*words)
        if not study.tree.to_run:
            break
        ran += sweeps.run(study, limit=1)
    assert len(ran) == len(set(ran)) == len(whole.tree.stages)
    for name in study.trials:
        ours, theirs = (sweeps.outcome(s.folder.trial(name)) for s in (study, whole))
        assert ours == theirs


def test_kill_inside_a_stage_continues_from_its_checkpoint(sweeps):
    study = sweeps.open(*MIXED[:2])
    progress = study.progress
    stage = progress.next()
    for line in run_stage(progress.folder.stage(stage), Worker()):
        if line["step"] == 6:  # the last checkpoint is that of step 4, so steps 5 and 6 run again
            break
    study = sweeps.open(*MIXED[:2])
    ran = sweeps.run(study)
    assert ran[0] == stage
    assert steps_of(study, [stage]) == study.tree.by_id[stage].stop - 4
    assert_alone(sweeps, study)


@pytest.mark.parametrize("seed", range(3))
def test_repeated_stop_requests_repeat_no_step(sweeps, seed):
    """Stop at random points: in stages that branch, that only end a trial, or that diverge.

    The trainer asks `stop_asked` at each step and at each batch of an evaluation.
    """
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
    assert run == study.tree.steps_in_tree - 12  # the diverging trial runs only its first step
    assert {row.trial: row.state for row in study.results() if row.state != "done"} == {
        "hot": "diverged"
    }
    assert_alone(sweeps, study, [name for name in study.trials if name != "hot"])


def test_grown_sweep_runs_only_new_steps(sweeps):
    first = sweeps.open(*MIXED[:4])
    before = steps_of(first, sweeps.run(first))
    study = sweeps.open(*MIXED)
    now = steps_of(study, sweeps.run(study))
    assert now == study.tree.steps_to_run
    # Two of the new trials end inside a trunk whose only checkpoint is at its end.
    assert before + now == study.tree.steps_in_tree + study.tree.steps_again
    assert 0 < study.tree.steps_again < 16
    assert_alone(sweeps, study)


@pytest.mark.parametrize("end", [12, 13, 16])
def test_trial_that_ends_inside_a_stored_trunk_repeats_few_steps(sweeps, end):
    """Trials a and b branch at step 17, so a constant run of 17 steps needs only its evaluation."""
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


def test_other_tree_starts_from_checkpoints_of_an_interrupted_stage(sweeps):
    """The grid changes after a kill: the new tree has no such stage, but uses its checkpoints."""
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
def test_checkpoints_of_branches_are_removed_and_results_stay(sweeps):
    study = sweeps.open(*MIXED, "sweep.keep_branches=false", "train.keep=1")
    sweeps.run(study)
    for stage in study.tree.stages:
        steps = checkpoint.steps(study.folder.stage(stage.id).checkpoints)
        assert (stage.stop in steps) == bool(stage.ends), stage
        assert len(steps) <= 2  # the last one, and the best where that is another
    again = sweeps.open(*MIXED, "sweep.keep_branches=false", "train.keep=1")
    assert again.tree.to_run == frozenset()


def test_removed_branch_runs_again_and_is_counted(sweeps):
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
    )  # all shapes have the full rate at the first step of the decay
    sweeps.run(study)
    assert_alone(sweeps, study)


# ---- what goes wrong ----
def test_diverged_trial_does_not_change_the_others(sweeps):
    words = [*MIXED[:2], "sweep.trials.hot={schedule.max_lr: 1e38, optim.max_grad_norm: null}"]
    study = sweeps.open(*words)
    ran = sweeps.run(study)
    states = {row.trial: row.state for row in study.results()}
    assert states == {"wsd-20": "done", "wsd-14": "done", "hot": "diverged"}
    assert "not finite" in next(row.reason for row in study.results() if row.trial == "hot")
    assert_alone(sweeps, study, ["wsd-20", "wsd-14"])
    summary = json.loads((study.folder.path / "trials" / "hot" / "summary.json").read_text())
    assert summary["status"] == "FAILED" and summary["state"] == "diverged"
    [event] = [event for event in events.read(study.folder) if "trial" in event]
    assert (event["kind"], event["trial"]) == ("trial_diverged", "hot")
    assert event["message"].startswith("trial hot: ") and "not finite" in event["message"]
    again = sweeps.open(*words)
    assert sweeps.run(again) == [] and len(ran) == 4
    assert {r.trial: r.state for r in again.results()} == states


def test_trial_whose_last_update_overflows_has_diverged_and_runs_once(sweeps):
    hot = "schedule.kind: constant, schedule.max_lr: 1e38, schedule.warmup_steps: 0"
    words = [
        f"sweep.trials.hot={{{hot}, train.max_steps: 1}}",
        f"sweep.trials.longer={{{hot}, train.max_steps: 3}}",
    ]
    study = sweeps.open(*words)
    ran = sweeps.run(study)
    assert len(ran) == 1
    assert [row.state for row in study.results()] == ["diverged", "diverged"]
    assert "step 1: " in study.reason("hot")
    assert sweeps.open(*words).tree.to_run == frozenset()


def test_diverged_trunk_ends_its_branches_and_never_runs_again(sweeps):
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


def test_failed_stage_runs_again_at_the_next_start(sweeps):
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


def test_name_of_another_experiment_is_refused(sweeps):
    sweeps.run(sweeps.open("sweep.trials.mine.train.max_steps=10"))
    with pytest.raises(
        ValueError,
        match="trials mine had other settings under these names before; give the sweep a new name",
    ):
        sweeps.open("sweep.trials.mine.train.max_steps=10", "model.dropout=0.2")


def test_stages_of_other_code_are_counted_and_trained_again(sweeps, monkeypatch):
    words = ("sweep.grid={train.max_steps: [10, 20]}", "schedule.kind=wsd")
    first = sweeps.open(*words)
    ran = sweeps.run(first)
    assert first.notes() == []
    keys = [folder.read_record()["key"] for folder in first.folder.trials()]
    other = {**module_hashes("gpt2", "adamw"), "model/gpt.py": "edited"}
    for module in (trials, stage_module):
        monkeypatch.setattr(module, "module_hashes", lambda *kinds: other)
    study = sweeps.open(*words)
    [note] = study.notes()
    assert f"{len(ran)} stage(s) (model/gpt.py)" in note
    again = sweeps.run(study)
    assert len(again) == len(ran) and not set(again) & set(ran)
    assert_alone(sweeps, study)
    # Their values may differ, so MLflow gets new runs.
    new_keys = [folder.read_record()["key"] for folder in study.folder.trials()]
    assert len({*keys, *new_keys}) == 2 * len(keys)
    last = sweeps.open(*words)
    assert last.notes() == []
    assert sweeps.run(last) == []


def test_stage_whose_code_was_edited_after_the_start_is_refused(sweeps, monkeypatch):
    study = sweeps.open("sweep.trials.mine.train.max_steps=10")
    edited = {**module_hashes("gpt2", "adamw"), "model/gpt.py": "edited"}
    monkeypatch.setattr(stage_module, "module_hashes", lambda *kinds: edited)
    sweeps.run(study)
    [row] = study.results()
    assert row.state == "failed"
    assert "model/gpt.py: edited after the sweep had started" in row.reason


def test_stage_of_a_model_that_this_version_does_not_have_is_not_used(sweeps):
    words = ("sweep.trials.mine.train.max_steps=10",)
    [stage] = sweeps.run(sweeps.open(*words))
    file = sweeps.open(*words).folder.stage(stage).stage_file
    spec = json.loads(file.read_text())
    spec["experiment"]["model"]["kind"] = "later"
    file.write_text(json.dumps(spec))
    assert len(sweeps.open(*words).notes()) == 1


def test_another_device_has_other_stages(sweeps):
    words = ("sweep.trials.mine.train.max_steps=10",)
    one = sweeps.open(*words).trials["mine"]
    other = dataclasses.replace(one, device="another processor")
    assert one.key != other.key
    assert one.settings_key == other.settings_key


def test_sweep_of_an_earlier_version_is_trained_again(sweeps):
    """Its stages have no record of code and device, its trials none of their settings."""
    words = ("sweep.trials.mine.train.max_steps=10",)
    first = sweeps.open(*words)
    [stage] = sweeps.run(first)
    file = first.folder.stage(stage).stage_file
    spec = json.loads(file.read_text())
    del spec["made_by"]
    file.write_text(json.dumps(spec))
    file = first.folder.trial("mine").run_file
    record = json.loads(file.read_text())
    record["trial"] = record.pop("settings")
    file.write_text(json.dumps(record))
    study = sweeps.open(*words)
    assert "1 stage(s) (an earlier version did not record it)" in study.notes()[0]
    assert sweeps.run(study) == [stage]


# ---- probes ----
PROBED = [
    "sweep.grid.schedule.max_lr=[1e-2,1e-5]",
    "sweep.grid.schedule.decay_shape=[linear,cosine]",
    "train.max_steps=20",
    "sweep.stop=anneal_probe",
    "sweep.probe_step=8",
    "sweep.probe_steps=4",
]


def test_probes_stop_worse_trials_and_do_not_change_the_others(sweeps):
    study = sweeps.open(*PROBED, "sweep.probe_margin=0.01")
    ran = sweeps.run(study)
    states = {row.trial: row.state for row in study.results()}
    assert set(states.values()) == {"done", "stopped"}
    assert all((state == "stopped") == ("1e-05" in name) for name, state in states.items())
    assert all(
        "above the best probe's" in row.reason for row in study.results() if row.state == "stopped"
    )
    assert_alone(sweeps, study, [name for name, state in states.items() if state == "done"])
    # Two trunks up to the branch of the probes, two probes, and one trunk with its two ends.
    assert steps_of(study, ran) == 2 * 9 + 2 * 3 + (17 - 9) + 2 * 3
    again = sweeps.open(*PROBED, "sweep.probe_margin=0.01")
    assert sweeps.run(again) == []
    assert {row.trial: row.state for row in again.results()} == states


def test_wide_margin_stops_no_trial(sweeps):
    """Also if the batch grows and the momentum rises after the end of the probes."""
    words = ["train.global_batch_size=null", "train.batch_schedule={0: 8, 15: 16}"]
    words += ["optim.kind=muon", "optim.momentum_warmup_steps=15"]
    study = sweeps.open(*PROBED, *words, "sweep.probe_margin=100")
    sweeps.run(study)
    assert {row.state for row in study.results()} == {"done"}
    assert_alone(sweeps, study)


def test_probes_stop_all_seeds_of_a_setting_or_none(sweeps):
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


# ---- rare cases ----
def interrupt(sweeps, upto: int, *words: str) -> None:
    """Kill a sweep in its first stage, once it has logged step `upto`."""
    progress = sweeps.open(*words).progress
    for line in run_stage(progress.folder.stage(progress.next()), Worker()):
        if line["step"] >= upto:
            return


def test_trial_may_end_at_a_checkpoint_of_an_interrupted_stage_of_another_tree(sweeps):
    interrupt(sweeps, 18, "sweep.trials.long={schedule.kind: constant, train.max_steps: 30}")
    study = sweeps.open("sweep.trials.short={schedule.kind: constant, train.max_steps: 16}")
    assert steps_of(study, sweeps.run(study)) == 0
    assert_alone(sweeps, study)


def test_new_trial_starts_from_a_checkpoint_inside_a_finished_stage(sweeps):
    first = ["train.keep=10", "sweep.trials.a={schedule.kind: constant, train.max_steps: 30}"]
    sweeps.run(sweeps.open(*first))
    study = sweeps.open(*first, "sweep.trials.b={schedule.kind: constant, train.max_steps: 26}")
    assert steps_of(study, sweeps.run(study)) == study.tree.steps_to_run == 2  # from 24
    assert_alone(sweeps, study)


def test_checkpoint_that_a_failed_stage_needs_is_kept(sweeps):
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


def test_damaged_last_checkpoint_of_a_trial_is_made_again(sweeps):
    words = ["train.keep=3", "train.checkpoint_interval=4", *MIXED[:2]]
    sweeps.run(sweeps.open(*words))
    for trial in sweeps.open(*words).trials.values():
        last = sweeps.open(*words).progress.last_stage(trial.name)
        part = last.checkpoint / "model.safetensors"
        part.write_bytes(part.read_bytes()[:-1] + b"?")
        study = sweeps.open(*words)
        [line] = study.notes()
        assert line.startswith(f"not used: {part.parent}")
        assert not study.is_over
        assert 0 < steps_of(study, sweeps.run(study)) <= 4  # it resumes in its folder
        assert sweeps.open(*words).is_over
        assert_alone(sweeps, study)


def test_outage_of_the_disk_damages_no_trial(sweeps, monkeypatch):
    words = MIXED[:2]
    sweeps.run(sweeps.open(*words))

    def fail(paths):
        raise OSError(errno.EIO, os.strerror(errno.EIO), paths[0])

    with monkeypatch.context() as broken:
        broken.setattr(files, "RETRY_S", 0)
        broken.setattr(checkpoint_format, "hash_here", fail)
        with pytest.raises(UnreadableError, match="check the disk"):
            sweeps.open(*words)
    assert sweeps.open(*words).is_over


def test_checkpoints_of_done_trials_are_hashed_once(sweeps, monkeypatch):
    sweeps.run(sweeps.open(*MIXED[:2]))
    assert sweeps.open(*MIXED[:2]).is_over
    monkeypatch.setattr(checkpoint_format, "hash_here", pytest.fail)
    assert sweeps.open(*MIXED[:2]).is_over


def test_damaged_checkpoint_of_a_branch_is_made_again(sweeps):
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
    assert "SHA-256 differs" in study.notes()[0]
    sweeps.run(study)
    assert_alone(sweeps, study)


def test_sweep_folder_can_be_moved(sweeps, tmp_path_factory):
    sweeps.run(sweeps.open(*MIXED[:3]))
    (sweeps.folder / "sweep").rename(sweeps.folder / "moved")
    study = sweeps.open(*MIXED[:4], name="moved")
    sweeps.run(study)
    assert_alone(sweeps, study)


def test_probe_is_no_trial(sweeps):
    """Also if a trial has a similar name, or its own decay begins before the probe."""
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
    assert ends and not any(ends), "probes keep no checkpoints"


def test_failed_probes_stop_no_trial_and_are_counted(sweeps):
    def fail(stage):
        if all("~" in name for name in stage.trials):
            raise RuntimeError("out of memory")

    study = sweeps.open(*PROBED)
    sweeps.run(study, fail=fail)
    assert {row.state for row in study.results()} == {"done"}
    assert (study.summary["probes"], study.summary["probes_failed"]) == (2, 2)


def test_trial_that_was_done_before_the_probes_keeps_its_result(sweeps):
    sweeps.run(sweeps.open("sweep.grid.schedule.max_lr=[1e-5]", "train.max_steps=20"))
    study = sweeps.open(
        "sweep.grid.schedule.max_lr=[1e-5,1e-2]", *PROBED[2:], "sweep.probe_margin=0.01"
    )
    sweeps.run(study)
    assert [(row.state, row.reason) for row in study.results()] == [("done", None)] * 2


def test_best_trial_is_a_seed_of_the_best_setting(sweeps):
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


def test_half_precision_and_null_intervals_are_exact(sweeps):
    study = sweeps.open(
        *MIXED[:2],
        "train.dtype=float16",
        "train.log_interval=null",
        "train.checkpoint_interval=null",
    )
    sweeps.run(study)
    assert_alone(sweeps, study)


def test_file_that_is_removed_while_disk_use_is_measured_is_skipped(sweeps):
    progress = sweeps.open(*MIXED[:1]).progress
    gone = progress.folder.stage("other").checkpoints / ".step-00000004.1-2"
    gone.mkdir(parents=True)
    (gone / "part").symlink_to("nowhere")
    (gone / "whole").write_bytes(b"1234")
    assert stored.checkpoint_bytes(progress.folder) == 4
