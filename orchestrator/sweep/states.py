"""The state of every stage of a tree: which may start, which cannot run, which are still needed.

This module reads no files.
"""

from collections.abc import Collection, Mapping
from typing import Literal

from orchestrator.sweep.tree import Stage, StageTree

State = Literal["waiting", "running", "done", "failed", "diverged", "blocked", "stopped"]
WAITING: State = "waiting"
RUNNING: State = "running"
DONE: State = "done"
FAILED: State = "failed"
DIVERGED: State = "diverged"
BLOCKED: State = "blocked"  # the stage that it would start from failed
STOPPED: State = "stopped"  # by a scheduler, or because of its probe


def longest_paths(tree: StageTree, costs: Mapping[str, float]) -> dict[str, float]:
    """Return the cost of the longest path of stages that starts with each stage.

    Args:
        tree: The stages.
        costs: By id of the stage; a stage without one costs nothing.
    """
    longest: dict[str, float] = {}
    for stage in reversed(tree.stages):
        below = [longest[child.id] for child in tree.children.get(stage.id, ())]
        longest[stage.id] = costs.get(stage.id, 0.0) + max(below, default=0.0)
    return longest


class StageStates:
    """The state of every stage of a tree.

    Args:
        tree: The stages.
        on_hold: Ids of stages that wait until `release`, also if their parents are done.
    """

    def __init__(self, tree: StageTree, on_hold: Collection[str] = ()) -> None:
        self.tree = tree
        self.on_hold = set(on_hold)
        self.by_stage: dict[str, State] = {}
        self.extend(tree)

    def extend(self, tree: StageTree) -> None:
        """Continue with a tree that has more stages; see `StageTree.merged_with`."""
        self.tree = tree
        for stage in tree.stages:  # parents before children
            if stage.id not in self.by_stage:
                self.by_stage[stage.id] = self._first_state(stage)
        self.remaining = self._remaining_steps()

    def _first_state(self, stage: Stage) -> State:
        if stage.id in self.tree.diverged:
            return DIVERGED
        if stage.id in self.tree.stopped:
            return STOPPED
        waits_or_done = WAITING if stage.id in self.tree.to_run else DONE
        return self._lost_with_parent(stage) or waits_or_done

    def _lost_with_parent(self, stage: Stage) -> State | None:
        """Return the state that the end of its parent gives to a stage; None: it can still run."""
        if stage.parent is None or stage.id in self.tree.finished:
            return None
        parent = self.by_stage[stage.parent]
        if parent in (DIVERGED, STOPPED):
            return parent
        if parent in (FAILED, BLOCKED) and stage.id not in self.tree.stored:
            return BLOCKED
        return None

    def _remaining_steps(self) -> dict[str, float]:
        """Return the steps of the longest path of stages to run, from each stage on."""
        tree = self.tree
        return longest_paths(tree, {id_: tree.cost(tree.by_id[id_]) for id_ in tree.to_run})

    def ready(self) -> list[Stage]:
        """Return the stages that may start now, the one with the longest remaining path first."""
        ready = [stage for stage in self.tree.stages if self._may_start(stage)]
        # The sort is stable: stages with equal paths keep the order of the tree.
        return sorted(ready, key=lambda stage: -self.remaining[stage.id])

    def _may_start(self, stage: Stage) -> bool:
        if self.by_stage[stage.id] != WAITING or stage.id in self.on_hold:
            return False
        if stage.parent is None or stage.id in self.tree.stored:
            return True
        return self.by_stage[stage.parent] == DONE

    def start(self, stage: str) -> None:
        """Note that a stage runs."""
        assert self.by_stage[stage] == WAITING
        self.by_stage[stage] = RUNNING

    def again(self, stage: str) -> None:
        """Let a stage wait again that ended before its last step and can continue."""
        assert self.by_stage[stage] == RUNNING
        self.by_stage[stage] = WAITING

    def end(self, stage: str, state: State = DONE) -> None:
        """Note how a stage ended. If it is not done, the stages below it cannot run."""
        assert self.by_stage[stage] == RUNNING
        if state == DONE:
            self.by_stage[stage] = DONE
        else:
            self._lose(stage, state)

    def _lose(self, stage: str, state: State) -> None:
        """Give a final state to a stage and to those below it that cannot run any more."""
        assert state in (FAILED, DIVERGED, STOPPED)
        self.by_stage[stage] = state
        for other in self.tree.stages:
            if self.by_stage[other.id] in (WAITING, DONE):
                lost = self._lost_with_parent(other)
                self.by_stage[other.id] = lost or self.by_stage[other.id]

    def release(self, dropped: Collection[str] = ()) -> None:
        """Let the stages on hold start, except those that only `dropped` trials need."""
        for stage in self.tree.stages:
            waits = stage.id in self.on_hold and self.by_stage[stage.id] == WAITING
            if waits and set(stage.trials) <= set(dropped):
                self.by_stage[stage.id] = STOPPED
        self.on_hold.clear()

    def of_trial(self, name: str) -> State:
        """Return the state of a trial: DONE, WAITING, RUNNING, or that of its first lost stage."""
        stages = self.tree.stages_of(name)
        states = [self.by_stage[stage.id] for stage in stages]
        if stages[-1].id in self.tree.finished and states[-1] == DONE:
            return DONE  # whatever happened to the stages before it since then
        for state in states:
            if state not in (WAITING, RUNNING, DONE):
                return state
        if states[-1] != WAITING or set(states) == {WAITING}:
            return states[-1]
        return RUNNING

    @property
    def pending(self) -> list[Stage]:
        """Stages that wait or run."""
        return [
            stage for stage in self.tree.stages if self.by_stage[stage.id] in (WAITING, RUNNING)
        ]

    def needed(self) -> set[str]:
        """Return the ids of the stages whose last checkpoint is still needed.

        Another stage starts from it, or it has all steps of a trial and only the result is missing.
        Stages that failed still need theirs: the next start of the sweep tries them again.
        """
        found: set[str] = set()
        for stage in self.tree.stages:
            if self.by_stage[stage.id] not in (WAITING, RUNNING, FAILED, BLOCKED):
                continue
            if stage.id in self.tree.stored:
                found.add(stage.id)
            elif stage.parent is not None:
                found.add(stage.parent)
        return found
