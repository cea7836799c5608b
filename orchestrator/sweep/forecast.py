"""How long a tree takes and how much disk, before it is run: its stages played through on a clock of paper.

Eats a plan, how many stages run at a time and what each costs; yields seconds and numbers of checkpoints.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.sweep.stage_states import Progress
from orchestrator.sweep.tree import Plan, Stage


@dataclass(frozen=True)
class Forecast:
    """seconds: from the first stage's start to the last one's end. checkpoints: the most that lie on disk at a time."""

    seconds: float
    checkpoints: int


def forecast(
    plan: Plan,
    slots: int,
    seconds: Callable[[Stage], float],
    results: Callable[[Stage], int],
    keep_branches: bool,
) -> Forecast:
    """Play the plan through, every stage running to its end.

    Args:
        seconds: of a stage. results: how many checkpoints the stage that ends a trial leaves behind.
    """
    progress, running, clock, peak = Progress(plan), [], 0.0, 0
    lying = {i: _left(plan.by_id[i], results) for i in plan.standing if i in plan.by_id}
    while True:
        for stage in progress.ready()[: slots - len(running)]:
            progress.start(stage.id)
            heapq.heappush(running, (clock + seconds(stage), stage.id))
        peak = max(
            peak, sum(lying.values()) + len(running)
        )  # each running stage may be writing one
        if not running:
            return Forecast(clock, peak)
        clock, ended = heapq.heappop(running)
        progress.end(ended)
        lying[ended] = _left(plan.by_id[ended], results)
        peak = max(peak, sum(lying.values()) + len(running))
        if not keep_branches:
            needed = progress.needed()
            lying = {i: n for i, n in lying.items() if i in needed or plan.by_id[i].ends}


def _left(stage: Stage, results: Callable[[Stage], int]) -> int:
    return results(stage) if stage.ends else 1
