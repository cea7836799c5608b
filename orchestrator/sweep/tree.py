"""The plan of a sweep: trials in, a tree of stages out. Pure: no files, no Ray, no clock.

A trial is what it does at each step: a root (all that is the same at every step of a run: data, model, optimizer, batch,
seed) and the learning rate of every step. Trials with one root whose rates agree, bit for bit, before step n make the
same weights in their first n steps, so these are run once: a stage is a stretch of steps that the same trials share.
The tree of stages is a trie over the steps, so the steps in it are the fewest that can be run.
Source of the idea: Shin et al., "Hippo: Sharing Computations in Hyper-Parameter Optimization", PVLDB 15(5), 2022.

Legend: steps [start, stop) are updates counted from 0; the state after `stop` updates is the stage's end.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Trial:
    """`rates`: the learning rate of every update, float64 (max_steps,). `root`: what never changes within a run.

    `asked`: False for a probe, which nobody asked for.
    """

    name: str
    root: str
    rates: np.ndarray
    asked: bool = True

    @property
    def steps(self) -> int:
        return len(self.rates)

    def plateau(self) -> list[int]:
        """The end of the last stretch of equal rates, where the trial goes on differently; none: nothing."""
        equal = np.flatnonzero(np.diff(self.rates) == 0)
        end = int(equal[-1]) + 2 if len(equal) else self.steps
        return [end] if end < self.steps else []

    def key(self, step: int) -> str:
        """Names the state after `step` updates, across trials, sweeps and processes: equal keys are equal weights."""
        return self.keys([step])[step]

    def keys(self, steps: Iterable[int]) -> dict[int, str]:
        """`key` of each of some rising steps, in one pass over the rates."""
        digest, rates, before, found = (
            hashlib.sha256(f"{self.root}/".encode()),
            self.rates.astype("<f8"),
            0,
            {},
        )
        for step in steps:
            assert before <= step <= self.steps
            digest.update(rates[before:step].data)
            found[step], before = digest.copy().hexdigest()[:20], step
        return found


@dataclass(frozen=True)
class Stage:
    """Steps [start, stop) of every trial in `trials`; those in `ends` have no step after them."""

    id: str
    parent: str | None
    start: int
    stop: int
    trials: tuple[str, ...]
    ends: tuple[str, ...]

    @property
    def steps(self) -> int:
        return self.stop - self.start


def grow(trials: Iterable[Trial], cuts: Mapping[str, Collection[int]] | None = None) -> list[Stage]:
    """The tree of the trials' stages, parents before children, in the order of the trials.

    Args:
        cuts: steps at which a trial's stages end besides where the tree branches: where a state is stored.
    """
    cuts, stages = cuts or {}, []
    # A group has one root, one parent, and one rate at step `start`: it shares at least that step.
    waiting = [(group, 0, None) for group in _apart(list(trials), 0)][::-1]
    while waiting:
        group, start, parent = waiting.pop()
        stop = _end(group, start, cuts)
        stage = Stage(
            group[0].key(stop),
            parent,
            start,
            stop,
            tuple(t.name for t in group),
            tuple(t.name for t in group if t.steps == stop),
        )
        stages.append(stage)
        rest = [t for t in group if t.steps > stop]
        waiting += [(branch, stop, stage.id) for branch in _apart(rest, stop)][::-1]
    return stages


def _apart(trials: list[Trial], step: int) -> list[list[Trial]]:
    """Trials that make step `step` alike, together."""
    groups: dict[tuple[str, bytes], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.root, trial.rates[step].tobytes()), []).append(trial)
    return list(groups.values())


def _end(group: list[Trial], start: int, cuts: Mapping[str, Collection[int]]) -> int:
    """Where the group's common stretch from `start` ends: at a trial's end, a divergence or a cut."""
    stop = min(t.steps for t in group)
    stop = min([stop, *(cut for t in group for cut in cuts.get(t.name, ()) if start < cut)])
    first = (
        group[0].rates[start:stop].view(np.int64)
    )  # bits, not values: 0.0 and -0.0 are two rates
    for other in group[1:]:
        differs = np.flatnonzero(first != other.rates[start:stop].view(np.int64))
        if len(differs):
            stop = start + int(differs[0])
            first = first[: stop - start]
    return stop


@dataclass(frozen=True)
class Plan:
    """A tree, and what of it stands already.

    standing: ids whose end is there as a checkpoint. finished: ids at which the trials that end there have their
    results. dead: ids at which training diverged, so that nothing below them will ever run. stopped: ids of stages that a
    scheduler ended early.
    """

    trials: tuple[Trial, ...]
    stages: tuple[Stage, ...]
    standing: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()
    dead: frozenset[str] = frozenset()
    stopped: frozenset[str] = frozenset()

    @cached_property
    def by_id(self) -> dict[str, Stage]:
        return {stage.id: stage for stage in self.stages}

    @cached_property
    def children(self) -> dict[str | None, list[Stage]]:
        found: dict[str | None, list[Stage]] = {}
        for stage in self.stages:
            found.setdefault(stage.parent, []).append(stage)
        return found

    @cached_property
    def to_run(self) -> frozenset[str]:
        """The stages without which a trial has no result: the fewest, given what stands."""
        runs: set[str] = set()
        lost = self.below(self.dead | self.stopped) | self.dead | self.stopped
        for stage in reversed(self.stages):  # children before parents
            if stage.id in lost:
                continue
            ending = bool(stage.ends) and stage.id not in self.finished
            wanted = any(
                child.id in runs and child.id not in self.standing
                for child in self.children.get(stage.id, ())
            )
            if ending or wanted and stage.id not in self.standing:
                runs.add(stage.id)
        return frozenset(runs)

    def below(self, ids: Collection[str]) -> frozenset[str]:
        """All descendants of `ids`."""
        found: set[str] = set()
        for stage in self.stages:
            if stage.parent in ids or stage.parent in found:
                found.add(stage.id)
        return frozenset(found)

    def joined(self, other: "Plan") -> "Plan":
        """This plan and, beside it, another's trials; a stage of both is one. Nothing that runs already is cut."""
        mine = {stage.id: stage for stage in self.stages}
        for stage in other.stages:
            known = mine.get(stage.id)
            mine[stage.id] = (
                replace(known, trials=known.trials + stage.trials, ends=known.ends + stage.ends)
                if known
                else stage
            )
        new = {stage.id for stage in other.stages} - {stage.id for stage in self.stages}
        return Plan(
            self.trials + other.trials,
            tuple(mine.values()),
            self.standing | other.standing & new,
            self.finished | other.finished & new,
            self.dead | other.dead & new,
            self.stopped | other.stopped & new,
        )

    @cached_property
    def _paths(self) -> dict[str, list[Stage]]:
        found: dict[str, list[Stage]] = {}
        for stage in self.stages:
            for trial in stage.trials:
                found.setdefault(trial, []).append(stage)
        return {trial: sorted(path, key=lambda stage: stage.stop) for trial, path in found.items()}

    def path(self, trial: str) -> list[Stage]:
        """The trial's stages from step 0 on."""
        return self._paths[trial]

    def cost(self, stage: Stage) -> int:
        """Steps that running it takes: none where its end stands and only a result is missing."""
        return 0 if stage.id in self.standing else stage.steps

    @property
    def steps_asked(self) -> int:
        """What the trials cost one by one."""
        return sum(trial.steps for trial in self.trials if trial.asked)

    @property
    def steps_in_tree(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def steps_to_run(self) -> int:
        return sum(self.cost(self.by_id[i]) for i in self.to_run)

    @property
    def steps_again(self) -> int:
        """Of these the ones that were run before, where no checkpoint stands from which to branch off."""
        made = {*self.standing, *self.finished, *self.dead}
        for stage in reversed(self.stages):
            if stage.id in made and stage.parent:
                made.add(stage.parent)
        return sum(self.cost(self.by_id[i]) for i in self.to_run if i in made)


def plan(
    trials: Iterable[Trial],
    states: Mapping[str, int] | None = None,
    standing: Collection[str] = (),
    finished: Collection[str] = (),
    dead: Collection[str] = (),
    stopped: Collection[str] = (),
    at_plateaus: bool = False,
) -> Plan:
    """The tree of `trials`, cut where something is stored.

    Args:
        states: `{key: step}` of everything stored; the others say what each key is.
        at_plateaus: cut also where a trial's rate begins to fall: trials that nobody knows yet may branch off there.
    """
    trials, states = tuple(trials), states or {}
    assert len({t.name for t in trials}) == len(trials), "trials have names of their own"
    steps = sorted(set(states.values()))
    cuts = {
        t.name: [s for s, key in t.keys(s for s in steps if s <= t.steps).items() if key in states]
        for t in trials
    }
    if at_plateaus:
        cuts = {t.name: [*cuts[t.name], *t.plateau()] for t in trials}
    return Plan(
        trials,
        tuple(grow(trials, cuts)),
        frozenset(standing),
        frozenset(finished),
        frozenset(dead),
        frozenset(stopped),
    )
