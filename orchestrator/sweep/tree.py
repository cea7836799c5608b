"""The tree of stages of a sweep: steps that several trials share are one stage, which runs once.

Branches (`branch.py`) with one root, and with settings that are equal bit for bit before step n,
have the same weights after n steps. The tree of stages is a trie over the steps, so no plan of the
same trials has fewer steps. Source: Shin et al., "Hippo: Sharing Computations in Hyper-Parameter
Optimization", PVLDB 15(5), 2022.

This module reads no files. Steps [start, stop) are updates counted from 0; a stage ends in the
state after `stop` updates. A state has a key, and equal keys mean equal weights.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.sweep.branch import Branch


@dataclass(frozen=True)
class Stage:
    """Steps [start, stop) that some trials share."""

    id: str  # key of the state after `stop` updates
    parent: str | None  # id of the stage before it; None at step 0
    start: int
    stop: int
    trials: tuple[str, ...]  # names of the trials that share these steps
    ends: tuple[str, ...]  # names of those that have no step after them

    @property
    def steps(self) -> int:
        return self.stop - self.start

    @property
    def example(self) -> str:
        """Name of a trial of this stage: one that ends here, if there is any."""
        return (self.ends or self.trials)[0]


Cuts = Mapping[str, Collection[int]]  # by name of the branch


def grow(branches: Iterable[Branch], cuts: Cuts | None = None) -> list[Stage]:
    """Return the stages of a tree, parents before children, in the order of the branches.

    Args:
        branches: The trials.
        cuts: Steps at which the stages of a branch end, besides those where the tree branches.
    """
    cuts = cuts or {}
    stages: list[Stage] = []
    # All branches of a group have one root, one parent and equal settings at step `start`.
    waiting: list[tuple[list[Branch], int, str | None]]
    waiting = [(group, 0, None) for group in reversed(_groups(list(branches), 0))]
    while waiting:
        group, start, parent = waiting.pop()
        stop = _end(group, start, cuts)
        assert stop > start, "a group makes its first update together"
        stage = Stage(
            id=group[0].key(stop),
            parent=parent,
            start=start,
            stop=stop,
            trials=tuple(branch.name for branch in group),
            ends=tuple(branch.name for branch in group if branch.steps == stop),
        )
        stages.append(stage)
        longer = [branch for branch in group if branch.steps > stop]
        waiting += [(next_, stop, stage.id) for next_ in reversed(_groups(longer, stop))]
    return stages


def _groups(branches: list[Branch], step: int) -> list[list[Branch]]:
    """Put branches together that make the same update at `step`."""
    groups: dict[tuple[str, tuple[bytes, ...]], list[Branch]] = {}
    for branch in branches:
        groups.setdefault((branch.root, branch.update(step)), []).append(branch)
    return list(groups.values())


def _end(group: list[Branch], start: int, cuts: Cuts) -> int:
    """Return the end of a group's common steps: a branch's end, a cut or the first difference."""
    stops = [branch.steps for branch in group]
    for branch in group:
        stops += [cut for cut in cuts.get(branch.name, ()) if cut > start]
    stop = min(stops)
    for branch in group[1:]:
        stop = group[0].first_difference(branch, start, stop)
    return stop


@dataclass(frozen=True)
class StageTree:
    """A tree of stages, and which of them need not run.

    Attributes:
        branches: The trials, and the probes.
        stages: Parents before children.
        stored: Ids of stages whose end is on disk as a checkpoint.
        finished: Ids of stages whose trials have their results.
        diverged: Ids of stages that diverged, so that no stage below them can run.
        stopped: Ids of stages that a scheduler ended early.
    """

    branches: tuple[Branch, ...]
    stages: tuple[Stage, ...]
    stored: frozenset[str] = frozenset()
    finished: frozenset[str] = frozenset()
    diverged: frozenset[str] = frozenset()
    stopped: frozenset[str] = frozenset()

    @cached_property
    def by_id(self) -> dict[str, Stage]:
        return {stage.id: stage for stage in self.stages}

    @cached_property
    def children(self) -> dict[str | None, list[Stage]]:
        """Stages by the id of their parent."""
        found: dict[str | None, list[Stage]] = {}
        for stage in self.stages:
            found.setdefault(stage.parent, []).append(stage)
        return found

    @cached_property
    def to_run(self) -> frozenset[str]:
        """Ids of the fewest stages that give every trial its result, with what is stored."""
        ended_early = self.diverged | self.stopped
        lost = ended_early | self.below(ended_early)
        found: set[str] = set()
        for stage in reversed(self.stages):  # children before parents
            if stage.id in lost:
                continue
            lacks_result = bool(stage.ends) and stage.id not in self.finished
            children = self.children.get(stage.id, ())
            starts_another = any(c.id in found and c.id not in self.stored for c in children)
            if lacks_result or (starts_another and stage.id not in self.stored):
                found.add(stage.id)
        return frozenset(found)

    def below(self, ids: Collection[str]) -> frozenset[str]:
        """Return the ids of all descendants of some stages."""
        found: set[str] = set()
        for stage in self.stages:
            if stage.parent in ids or stage.parent in found:
                found.add(stage.id)
        return frozenset(found)

    def merged_with(self, other: "StageTree") -> "StageTree":
        """Return this tree with the trials of another tree added. No stage of this tree is cut.

        For a stage in both trees, this tree decides whether it is stored, finished, diverged or
        stopped: the stage may be running.
        """
        merged = dict(self.by_id)
        for stage in other.stages:
            known = merged.get(stage.id)
            if known is not None:
                trials = known.trials + stage.trials
                stage = replace(known, trials=trials, ends=known.ends + stage.ends)
            merged[stage.id] = stage
        new = other.by_id.keys() - self.by_id.keys()
        return StageTree(
            self.branches + other.branches,
            tuple(merged.values()),
            stored=self.stored | (other.stored & new),
            finished=self.finished | (other.finished & new),
            diverged=self.diverged | (other.diverged & new),
            stopped=self.stopped | (other.stopped & new),
        )

    @cached_property
    def _stages_of(self) -> dict[str, list[Stage]]:
        found: dict[str, list[Stage]] = {}
        for stage in sorted(self.stages, key=lambda stage: stage.stop):
            for trial in stage.trials:
                found.setdefault(trial, []).append(stage)
        return found

    def stages_of(self, trial: str) -> list[Stage]:
        """Return the stages of a trial from step 0 on."""
        return self._stages_of[trial]

    def cost(self, stage: Stage) -> int:
        """Return the steps to run in a stage: 0 if its end is stored and a result is missing."""
        return 0 if stage.id in self.stored else stage.steps

    @property
    def steps_asked(self) -> int:
        """Steps of all trials if each is trained alone."""
        return sum(branch.steps for branch in self.branches if not branch.is_probe)

    @property
    def steps_in_tree(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def steps_to_run(self) -> int:
        return sum(self.cost(self.by_id[id_]) for id_ in self.to_run)

    @property
    def steps_again(self) -> int:
        """Steps that ran before and run again, because no checkpoint is stored at the branch."""
        made = {*self.stored, *self.finished, *self.diverged}
        for stage in reversed(self.stages):
            if stage.id in made and stage.parent is not None:
                made.add(stage.parent)
        return sum(self.cost(self.by_id[id_]) for id_ in self.to_run if id_ in made)


def build_tree(
    branches: Iterable[Branch],
    states: Mapping[str, int] | None = None,
    stored: Collection[str] = (),
    finished: Collection[str] = (),
    diverged: Collection[str] = (),
    stopped: Collection[str] = (),
    at_decays: bool = False,
) -> StageTree:
    """Return the tree of some branches, cut at each state that is known.

    Args:
        branches: The trials.
        states: Step of each known state, by its key.
        stored, finished, diverged, stopped: Keys of states; see `StageTree`.
        at_decays: Cut also where the rate of a branch begins to fall: trials that are not known
            yet may branch off there.
    """
    branches = tuple(branches)
    states = states or {}
    assert len({branch.name for branch in branches}) == len(branches), "names must differ"
    steps = sorted(set(states.values()))
    cuts = {}
    for branch in branches:
        keys = branch.keys(step for step in steps if step <= branch.steps)
        cuts[branch.name] = [step for step, key in keys.items() if key in states]
        decay_start = branch.decay_start()
        if at_decays and decay_start is not None:
            cuts[branch.name].append(decay_start)
    return StageTree(
        branches,
        tuple(grow(branches, cuts)),
        frozenset(stored),
        frozenset(finished),
        frozenset(diverged),
        frozenset(stopped),
    )
