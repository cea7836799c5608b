"""The folder of a sweep: what of its tree stands on disk, whichever plan made it. Reads; removes nothing.

Eats `stages/<id>/` (and the checkpoints of a run that the sweep branches off); yields states by key, so that today's
tree finds what yesterday's, with other branches, has left.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator import checkpoint, rates, stage_run
from orchestrator.runs import read_json
from orchestrator.stages import Plan, Trial, grow, plan


@dataclass
class Stored:
    """`states`: `{key: (folder, step)}` of checkpoints; `results`: `{key: result.json}`; both by the key of the state."""

    states: dict[str, tuple[Path, int]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)  # of the results

    def plan(self, trials: Iterable[Trial], at_plateaus: bool = False) -> Plan:
        """The tree of `trials` with all of this in it; see `stages.plan`."""
        steps = {key: step for key, (_, step) in self.states.items()}
        steps |= {key: result["step"] for key, result in self.results.items()}
        return plan(trials, steps, self.states,
                    {k for k, r in self.results.items() if r["outcome"] == stage_run.DONE and r["is_whole"]},
                    *({k for k, r in self.results.items() if r["outcome"] == outcome}
                      for outcome in (stage_run.DIVERGED, stage_run.STOPPED)), at_plateaus=at_plateaus)


def scan(stages: Path, trials: Iterable[Trial], diverged_above: float | None = None, stops: bool = False) -> Stored:
    """What the folder `stages/` holds for a tree of `trials`; `stops`: also what a scheduler stopped stays so.

    A stage that was interrupted goes on in its own folder. Its checkpoints serve other stages only where today's tree has
    no such stage any more.
    """
    found, todays = Stored(), {stage.id for stage in grow(trials)}
    for folder in sorted(stages.glob("*/stage.json")):
        folder = folder.parent
        order, result = stage_run.read_order(folder), read_json(folder / "result.json")
        if result and result["outcome"] == stage_run.DIVERGED and result["limit"] not in (None, diverged_above):
            continue
        if result and result["outcome"] == stage_run.STOPPED and not stops:
            continue
        if result:
            found.results[result["key"]], found.folders[result["key"]] = result, folder
            if checkpoint.path_of(folder / "checkpoints", result["step"]).is_dir() and result["outcome"] == stage_run.DONE:
                found.states[result["key"]] = folder, result["step"]
        elif order.id not in todays:
            made = checkpoint.steps(folder / "checkpoints")
            of_stage = Trial("", order.root, rates.from_json(order.rates).first(max(made, default=0)))
            found.states |= {key: (folder, step) for step, key in of_stage.keys(made).items()}
    return found


def add_run(found: Stored, run_dir: Path, trial: Trial, upto: int) -> list[int]:
    """Add the checkpoints of a lone run, up to step `upto`, as states of `trial`, whose first steps are the run's."""
    made = [step for step in checkpoint.steps(run_dir / "checkpoints") if step <= upto]
    found.states |= {key: (run_dir, step) for step, key in trial.keys(made).items()}
    return made


def data_of(found: Path) -> str:
    """The identity of the tokens that a checkpoint was trained on."""
    return checkpoint.read_manifest(found)["fingerprints"]["data"]
