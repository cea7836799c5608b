"""The tree of stages, compared with brute force: fewest steps, complete trials."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.experiment import load_experiment
from orchestrator.config.steps import NAMES
from orchestrator.sweep.branch import Branch
from orchestrator.sweep.states import (
    BLOCKED,
    DIVERGED,
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    StageStates,
)
from orchestrator.sweep.tree import StageTree, build_tree, grow
from orchestrator.sweep.trials import settings_of

SAME_STEPS = [
    "name=other",
    "data.corpus=other.txt",  # the tokens are compared, not their files
    "schedule.max_lr=1e-4",  # the rates of a branch
    "schedule.kind=constant",
    "schedule.weight_decay.kind=cosine",  # the factor of step 0 is 1
    "schedule.momentum.kind=linear",
    "schedule.momentum.final=0.5",
    "train.max_steps=7",
    "train.keep=5",
    "train.checkpoint_interval=3",
    "train.reduction_slots=8",  # what `null` stands for
    "optim.groups.embedding.weight_decay=0.1",
    "optim.momentum=0.8",  # AdamW has none; see test_keys.py
    "optim.momentum_warmup_steps=5",
    "compute.num_workers=2",
    "tracking.experiment=other",
]
OTHER_STEPS = [
    "train.seed=2",
    "train.dtype=bfloat16",
    "train.micro_batch_size=2",
    "train.global_batch_size=16",
    "train.reduction_slots=4",
    "train.compile=true",
    "train.init_from=gpt2",
    "train.ema=0.99",
    "model.dropout=0.3",
    "model.n_layer=2",
    "model.block_size=8",
    "model.bias=true",
    "model.activation=gelu_tanh",
    "optim.beta1=0.8",
    "optim.beta2=0.9",
    "optim.weight_decay=0.3",
    "optim.max_grad_norm=0.5",
    "optim.kind=muon",
    "optim.kind=muon optim.momentum=0.8",
    "optim.kind=muon optim.momentum_warmup_steps=5",  # another momentum at step 0
]


def test_root_is_the_same_exactly_for_trials_with_equal_steps(monkeypatch):
    """By hand: a field that is missing here would let trials share steps that differ."""
    base = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "train.micro_batch_size=4"]
    base += ["train.global_batch_size=32", "model.block_size=16", "train.max_steps=20"]
    base += ["schedule.warmup_steps=2", "train.dtype=float32", "optim.max_grad_norm=1"]

    def root(*words: str, data: str = "tokens", cpus: int = 1) -> str:
        experiment = load_experiment(None, [*base, *" ".join(words).split()])
        return settings_of(experiment, experiment.steps()(0), data, cpus)

    assert [word for word in SAME_STEPS if root(word) != root()] == []
    roots = {word: root(word) for word in OTHER_STEPS}
    roots |= {"": root(), "data": root(data="others"), "cpus": root(cpus=2)}
    monkeypatch.setattr("orchestrator.sweep.trials.torch_version", lambda: "0.1")
    roots["torch"] = root()
    assert len(set(roots.values())) == len(roots), roots
    own = "optim.kind=tests/own/lion.py:lion"
    seen = ["schedule.max_lr=1e-4", "optim.groups.embedding.lr_scale=1.0"]
    seen += ["optim.groups.embedding.weight_decay=0.1", "optim.momentum_warmup_steps=5"]
    seen.append("optim.momentum=0.8")
    found = {root(own), *(root(own, word) for word in seen)}
    found.add(root(own, *seen[-2:]))  # both begin with the momentum of the warmup
    assert len(found) == len(seen) + 2


def trial(name, rates, root="root") -> Branch:
    return Branch(name, root, np.array(rates, np.float64))


# Settings of an update: a usual one, and others that differ in one setting.
USUAL = (1.0, 1.0, 1.0, 1.0)
OTHERS = [(0.5, 1.0, 1.0, 1.0), (1.0, 2.0, 1.0, 1.0), (1.0, 1.0, 2.0, 1.0), (1.0, 1.0, 1.0, 2.0)]


@st.composite
def trials(draw, least=1, most=7) -> list[Branch]:
    """Trials that share a lot: three kinds of updates, two roots, up to nine steps.

    As for planned trials, the root has the settings of step 0, and one that never changes may be
    absent.
    """
    updates = [USUAL, draw(st.sampled_from(OTHERS)), draw(st.sampled_from(OTHERS))]
    steps = st.lists(st.sampled_from(updates), min_size=1, max_size=9)
    trial_of = st.tuples(steps, st.sampled_from("ab"), st.booleans())
    made = []
    for i, (settings, root, is_short) in enumerate(
        draw(st.lists(trial_of, min_size=least, max_size=most))
    ):
        rates, *columns = np.array(settings).T
        others = dict(zip(NAMES[1:], columns, strict=True))
        root += "".join(f" {column[0]}" for column in columns)
        if is_short:
            others = {name: c for name, c in others.items() if (c != c[0]).any()}
        made.append(Branch(f"t{i}", root, rates.copy(), others=others))
    return made


def prefixes(found) -> set:
    """Return all states after one or more steps of any trial: as many as the fewest steps."""
    states = set()
    for t in found:
        firsts = [float(word) for word in t.root.split()[1:]]
        rest = [t.others.get(n, [v] * t.steps) for n, v in zip(NAMES[1:], firsts, strict=True)]
        updates = list(zip(t.rates, *rest, strict=True))
        states |= {(t.root, tuple(updates[:n])) for n in range(1, t.steps + 1)}
    return states


# ---- the tree ----
@given(trials())
def test_tree_has_one_step_for_each_state(found):
    assert build_tree(found).steps_in_tree == build_tree(found).steps_to_run == len(prefixes(found))


@given(trials(), st.data())
def test_cuts_change_no_step(found, data):
    cuts = {t.name: data.draw(st.sets(st.integers(1, 9))) for t in found}
    for t in found:  # a cut is a stored state: it is the same for every trial that passes it
        for other in found:
            cuts[t.name] |= {
                s
                for s in cuts[other.name]
                if s <= min(t.steps, other.steps) and t.key(s) == other.key(s)
            }
    stages = grow(found, cuts)
    assert sum(s.steps for s in stages) == len(prefixes(found))
    ends = {s.id for s in stages}
    assert {t.key(c) for t in found for c in cuts[t.name] if c <= t.steps} <= ends


@given(trials())
def test_stages_of_a_trial_are_a_chain(found):
    stages = build_tree(found)
    seen = set()
    for stage in stages.stages:
        assert stage.parent is None or stage.parent in seen  # parents before children
        seen.add(stage.id)
    for t in found:
        path = stages.stages_of(t.name)
        assert [s.start for s in path] == [0, *(s.stop for s in path[:-1])]
        assert [s.parent for s in path] == [None, *(s.id for s in path[:-1])]
        assert path[-1].stop == t.steps
        assert [s.id for s in path] == [t.key(s.stop) for s in path]
        assert [s for s in stages.stages if t.name in s.ends] == path[-1:]


@given(trials())
def test_stage_ends_only_where_a_trial_ends_or_two_differ(found):
    stages = build_tree(found)
    for stage in stages.stages:
        assert stage.ends or len(stages.children.get(stage.id, [])) > 1


@given(trials(), st.randoms())
def test_order_of_trials_does_not_change_the_tree(found, draw):
    shuffled = draw.sample(found, len(found))
    assert {s.id: s.start for s in grow(found)} == {s.id: s.start for s in grow(shuffled)}


def test_rates_are_compared_bit_for_bit():
    nearly = np.nextafter(1.0, 2.0)
    assert build_tree([trial("a", [1.0, 1.0]), trial("b", [1.0, nearly])]).steps_in_tree == 3
    assert build_tree([trial("a", [0.0, 1.0]), trial("b", [-0.0, 1.0])]).steps_in_tree == 4


def test_other_settings_are_compared_bit_for_bit():
    def varied(name, values):
        return Branch(name, "r", np.ones(3), others={"momentum": np.array(values)})

    nearly = np.nextafter(1.0, 2.0)
    constant = trial("constant", [1.0, 1.0, 1.0], "r")
    found = [constant, varied("same", [1.0] * 3), varied("late", [1.0, 1.0, nearly])]
    tree = build_tree([*found, varied("back", [1.0, 0.5, 1.0])])
    assert tree.steps_in_tree == 6
    assert [stage.ends for stage in tree.stages_of("same")] == [(), (), ("constant", "same")]
    assert found[2].key(2) == constant.key(2) != found[2].key(3) != constant.key(3)


def test_key_of_a_trial_with_constant_settings_is_that_of_its_rates():
    """Keys are names of folders: those of earlier versions stay."""
    assert trial("a", [1.0, 0.5]).key(2) == "7c48b086691dfb3d22df"


def test_other_roots_share_no_step_and_equal_trials_share_all():
    assert build_tree([trial("a", [1, 1]), trial("b", [1, 1], "other")]).steps_in_tree == 4
    twins = build_tree([trial("a", [1, 1]), trial("b", [1, 1])])
    assert twins.steps_in_tree == 2 and twins.stages[0].ends == ("a", "b")


def test_key_depends_on_root_step_and_rates():
    a = trial("a", [1.0, 2.0, 3.0])
    keys = {
        a.key(0),
        a.key(1),
        a.key(2),
        trial("b", [2.0, 1.0]).key(2),
        trial("c", [1.0, 2.0], "other").key(2),
    }
    assert len(keys) == 5
    assert a.key(2) == trial("longer", [1.0, 2.0, 9.0, 9.0]).key(2)


def test_tree_of_24_long_trials_has_the_expected_steps():
    rates = np.full(600_000, 1e-3)
    found = [
        Branch(f"t{i}", "r", np.concatenate([rates[: 500_000 + i], rates[500_000 + i :] * 0.5]))
        for i in range(24)
    ]
    assert build_tree(found).steps_in_tree == 500_000 + 23 + sum(100_000 - i for i in range(24))


# ---- stored stages ----
@given(trials(2), st.data())
def test_only_stages_that_a_missing_result_needs_run(found, data):
    stages = grow(found)
    ids = [s.id for s in stages]
    standing = data.draw(st.sets(st.sampled_from(ids)))
    finished = data.draw(st.sets(st.sampled_from(ids)))
    p = build_tree(found, {}, standing, finished)

    def must_run(stage) -> bool:
        if stage.ends and stage.id not in finished:
            return True
        needed = any(must_run(c) and c.id not in standing for c in p.children.get(stage.id, []))
        return needed and stage.id not in standing

    assert p.to_run == {s.id for s in p.stages if must_run(s)}
    assert p.steps_to_run <= p.steps_in_tree


@given(trials(2), trials(1))
def test_grown_tree_runs_only_new_steps(first, more):
    more = [replace(t, name=f"new-{t.name}") for t in more]
    old = build_tree(first)
    states = {s.id: s.stop for s in old.stages}
    p = build_tree([*first, *more], states, states, {s.id for s in old.stages if s.ends})
    new = prefixes(more) - prefixes(first)
    assert (
        p.steps_to_run == len(new) + p.steps_again
    )  # again: from a stored state to where a new trial leaves its stage
    inner = {s.id for s in p.stages} - set(states)
    assert p.steps_again == 0 or inner & {s.id for s in p.stages if p.below([s.id]) & set(states)}


@given(trials(2))
def test_finished_tree_runs_nothing(found):
    ids = {s.id: s.stop for s in grow(found)}
    assert build_tree(found, ids, ids, set(ids)).to_run == frozenset()
    assert (
        build_tree(found, ids, (), {s.id for s in grow(found) if s.ends}).to_run == frozenset()
    )  # only results are left


def test_missing_result_at_a_stored_state_runs_no_step():
    trunk = trial("trunk", [1.0] * 10)
    states = {trunk.key(6): 6, trunk.key(10): 10}
    p = build_tree([trunk, trial("short", [1.0] * 6)], states, states, {trunk.key(10)})
    assert p.to_run == {trunk.key(6)}
    assert p.steps_to_run == 0
    states = StageStates(p)
    assert [s.id for s in states.ready()] == [trunk.key(6)]
    assert states.needed() == {trunk.key(6)}


def test_diverged_stage_and_its_branches_do_not_run_again():
    rates = [1.0] * 8
    found = [trial("a", rates), trial("b", [*rates[:6], 0.5])]
    dead = found[0].key(4)
    p = build_tree(found, {dead: 4}, (), (), {dead})
    assert p.to_run == frozenset()
    assert {StageStates(p).of_trial(t.name) for t in found} == {DIVERGED}


def test_stored_stage_below_a_diverged_one_does_not_run():
    """Also if the tree grew: `to_run` leaves out all stages below."""
    rates = [1.0] * 8
    trials = [trial("a", rates), trial("b", [*rates[:6], 0.5])]
    dead, stored = trials[0].key(4), trials[0].key(6)
    p = build_tree(trials, {dead: 4, stored: 6}, {stored}, (), {dead})
    grown = StageStates(build_tree([]))
    grown.extend(p)
    for states in (StageStates(p), grown):
        assert set(states.by_stage.values()) == {DIVERGED}
        assert states.ready() == []


def test_trial_that_was_finished_before_a_stage_above_it_diverged_keeps_its_result():
    long = trial("long", [1.0] * 8)
    states = {long.key(4): 4, long.key(8): 8}
    p = build_tree([long, trial("short", [1.0] * 6)], states, {long.key(8)}, {long.key(8)})
    played = StageStates(p)
    played.start(long.key(4))
    played.end(long.key(4), DIVERGED)
    assert played.of_trial("short") == DIVERGED
    assert played.of_trial("long") == DONE


# ---- states ----
def play(p: StageTree, draw, outcomes=(DONE,), slots=3, on_hold=(), drop=()):
    """Run a tree in any order that `ready` allows; yield the states after every event."""
    states, running = StageStates(p, on_hold), []
    while True:
        ready = states.ready()
        yield states, running
        if ready and len(running) < slots and (not running or draw.random() < 0.6):
            stage = ready[0] if draw.random() < 0.5 else draw.choice(ready)
            states.start(stage.id)
            running.append(stage.id)
        elif running:
            states.end(running.pop(draw.randrange(len(running))), draw.choice(outcomes))
        elif states.on_hold:
            states.release(drop)
        else:
            return


@given(trials(2), st.randoms(use_true_random=False), st.data())
def test_needed_checkpoints_are_exactly_those_that_stages_start_from(found, draw, data):
    """`Progress` removes all others. Without its first checkpoint, a stage could never run."""
    outcomes = data.draw(
        st.sampled_from([(DONE,), (DONE, DONE, FAILED), (DONE, DONE, DIVERGED, STOPPED)])
    )
    p = build_tree(found)
    there: set[str] = set()
    begun: set[str] = set()
    for states, running in play(p, draw, outcomes):
        for stage in running:
            if stage not in begun:
                begun.add(stage)
                assert p.by_id[stage].parent is None or p.by_id[stage].parent in there
        ended = {s.id for s in p.stages if states.by_stage[s.id] == DONE}
        there = {i for i in ended if i in states.needed()}
        coming = [
            s for s in p.stages if states.by_stage[s.id] in (WAITING, RUNNING, FAILED, BLOCKED)
        ]
        assert states.needed() == {s.parent for s in coming} - {None}
    # At the end, only failed stages need a checkpoint, for the next start of the sweep.
    failed = {s.parent for s in p.stages if states.by_stage[s.id] in (FAILED, BLOCKED)}
    assert there == states.needed() & ended and there <= failed


@given(trials(2), st.randoms(use_true_random=False), st.sampled_from([FAILED, DIVERGED, STOPPED]))
def test_failed_stage_loses_its_descendants_and_no_other(found, draw, how):
    p = build_tree(found)
    *_, (states, _) = play(p, draw, (DONE, DONE, how))
    bad = [
        s
        for s in p.stages
        if states.by_stage[s.id] == how and (s.parent is None or states.by_stage[s.parent] == DONE)
    ]
    lost = p.below([s.id for s in bad])
    for stage in p.stages:
        expected = (
            {BLOCKED if how == FAILED else how}
            if stage.id in lost
            else {how}
            if stage in bad
            else {DONE}
        )
        assert states.by_stage[stage.id] in expected
    for t in found:
        assert (states.of_trial(t.name) == DONE) == all(
            states.by_stage[s.id] == DONE for s in p.stages_of(t.name)
        )
    assert states.pending == []


@given(trials(2))
def test_longest_remaining_path_comes_first(found):
    states = StageStates(build_tree(found))
    longest = {
        s.id: max(t.steps for t in found if t.name in s.trials) - s.start
        for s in states.tree.stages
    }
    ready = [longest[s.id] for s in states.ready()]
    assert ready == sorted(ready, reverse=True)
    assert all(s.parent is None for s in states.ready())


@given(trials(2), st.randoms(use_true_random=False), st.data())
def test_held_stages_wait_and_dropped_trials_are_stopped(found, draw, data):
    p = build_tree(found)
    step = data.draw(st.integers(1, 5))
    held = {s.id for s in p.stages if s.start >= step}
    drop = set(data.draw(st.sets(st.sampled_from([t.name for t in found]))))
    for states, _ in play(p, draw, on_hold=held, drop=drop):
        if states.on_hold:
            assert all(states.by_stage[i] == WAITING for i in held)
    for t in found:
        path = p.stages_of(t.name)
        stopped = any(s.id in held and set(s.trials) <= drop for s in path)
        assert states.of_trial(t.name) == (STOPPED if stopped else DONE)


def test_stage_can_start_again():
    states = StageStates(build_tree([trial("a", [1.0])]))
    (stage,) = states.ready()
    states.start(stage.id)
    assert states.ready() == [] and states.of_trial("a") == RUNNING
    states.again(stage.id)
    assert states.ready() == [stage]


def test_stage_with_a_stored_start_survives_the_failure_of_its_parent():
    """The first part of the trunk runs again for a new branch and fails; the old branch goes on."""
    old, new = trial("old", [1.0] * 6 + [0.5] * 2), trial("new", [1.0] * 3 + [0.1])
    p = build_tree([old, new], {old.key(6): 6}, {old.key(6)})
    states = StageStates(p)
    root = p.stages_of("new")[0]
    assert root.stop == 3 and root.id in p.to_run
    states.start(root.id)
    states.end(root.id, FAILED)
    assert states.of_trial("new") == FAILED
    assert [s.start for s in states.ready()] == [6]


def test_equal_names_are_an_error():
    with pytest.raises(AssertionError, match="names"):
        build_tree([trial("a", [1.0]), trial("a", [2.0])])
