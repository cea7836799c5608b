"""What of a plan has happened: which stages may start, which are lost, which checkpoints are still needed. Pure.

Eats a plan and, one by one, how its stages end; yields what may be done next.
"""

from collections.abc import Collection

from orchestrator.sweep.tree import Plan, Stage

WAITING, RUNNING, DONE, FAILED, DIVERGED, BLOCKED, STOPPED = (
    "waiting",
    "running",
    "done",
    "failed",
    "diverged",
    "blocked",
    "stopped",
)
_ENDED_BADLY = (FAILED, DIVERGED, STOPPED)


class Progress:
    """What of a plan has happened: which stages may start, which are lost, which checkpoints are still needed."""

    def __init__(self, plan: Plan, held: Collection[str] = ()):
        """`held` stages wait until `release`d, even where their parents are done."""
        self.plan, self.held = plan, set(held)
        self.state = {
            stage.id: WAITING if stage.id in plan.to_run else DONE for stage in plan.stages
        }
        for stages, state in ((plan.dead, DIVERGED), (plan.stopped, STOPPED)):
            for stage in stages & self.state.keys():
                self._lose(stage, state)
        self.remaining = self._remaining()

    def extend(self, plan: Plan) -> None:
        """Go on with a plan that has more stages (`Plan.joined`)."""
        new = [stage for stage in plan.stages if stage.id not in self.state]
        self.plan = plan
        self.state |= {stage.id: WAITING if stage.id in plan.to_run else DONE for stage in new}
        for stage in new:
            above = self.state.get(stage.parent)
            if stage.id in plan.dead or above == DIVERGED:
                self._lose(stage.id, DIVERGED)
            elif above in (FAILED, BLOCKED, STOPPED) and stage.id not in plan.standing:
                self.state[stage.id] = BLOCKED
        self.remaining = self._remaining()

    def _remaining(self) -> dict[str, int]:
        """Steps of the longest path of stages to run, from each stage on."""
        longest: dict[str, int] = {}
        for stage in reversed(self.plan.stages):
            below = max(
                (longest[child.id] for child in self.plan.children.get(stage.id, ())), default=0
            )
            longest[stage.id] = below + (
                self.plan.cost(stage) if stage.id in self.plan.to_run else 0
            )
        return longest

    def ready(self) -> list[Stage]:
        """Stages that may start now, the one with the longest remaining path first."""
        found = [
            s
            for s in self.plan.stages
            if self.state[s.id] == WAITING and s.id not in self.held and self._has_start(s)
        ]
        return sorted(
            found, key=lambda s: -self.remaining[s.id]
        )  # stable: equal ones in the plan's order

    def _has_start(self, stage: Stage) -> bool:
        if stage.parent is None or stage.id in self.plan.standing:
            return True
        return self.state[stage.parent] == DONE

    def start(self, stage: str) -> None:
        assert self.state[stage] == WAITING
        self.state[stage] = RUNNING

    def again(self, stage: str) -> None:
        """It ended before its end, and may go on: its process died, or it was asked to stop."""
        assert self.state[stage] == RUNNING
        self.state[stage] = WAITING

    def end(self, stage: str, state: str = DONE) -> None:
        """`state`: DONE, or how it ended instead; then every stage below it is BLOCKED or, after DIVERGED, that too."""
        assert self.state[stage] == RUNNING
        if state == DONE:
            self.state[stage] = DONE
        else:
            self._lose(stage, state)

    def _lose(self, stage: str, state: str) -> None:
        """`stage` ended in `state`, and so goes what would have begun from it: not what begins from a stored state."""
        assert state in _ENDED_BADLY
        self.state[stage], lost = state, {stage}
        for other in self.plan.stages:
            if other.parent in lost and other.id not in self.plan.standing:
                lost.add(other.id)
                if self.state[other.id] in (WAITING, DONE) and other.id not in self.plan.finished:
                    self.state[other.id] = BLOCKED if state == FAILED else state

    def release(self, dropped: Collection[str] = ()) -> None:
        """Let the held stages go, but not those through which only `dropped` trials pass."""
        for stage in self.plan.stages:
            if (
                stage.id in self.held
                and self.state[stage.id] == WAITING
                and set(stage.trials) <= set(dropped)
            ):
                self.state[stage.id] = STOPPED
        self.held.clear()

    def trial(self, name: str) -> str:
        """A trial's state: DONE with a result, the first thing that went wrong on its path, or RUNNING or WAITING."""
        states = [self.state[stage.id] for stage in self.plan.path(name)]
        bad = next((s for s in states if s in (*_ENDED_BADLY, BLOCKED)), None)
        if bad:
            return bad
        return states[-1] if states[-1] != WAITING or set(states) == {WAITING} else RUNNING

    @property
    def pending(self) -> list[Stage]:
        return [s for s in self.plan.stages if self.state[s.id] in (WAITING, RUNNING)]

    def needed(self) -> set[str]:
        """Ids of the ends that a stage begins from, or is where it only lacks a result: one that is pending, or failed and
        will be tried again when the sweep is.
        """
        coming = [
            s for s in self.plan.stages if self.state[s.id] in (WAITING, RUNNING, FAILED, BLOCKED)
        ]
        return {s.id if s.id in self.plan.standing else s.parent for s in coming} - {None}
