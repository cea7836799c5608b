"""The folder of a sweep: what of its tree stands on disk, whichever plan made it. Reads; removes nothing.

Eats `stages/<id>/` (and the checkpoints of a run that the sweep branches off); yields states by key, so that today's
tree finds what yesterday's, with other branches, has left.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store as checkpoint
from orchestrator.errors import UserError
from orchestrator.files import read_json
from orchestrator.sweep import stage as stage_run
from orchestrator.sweep.tree import Plan, Trial, grow, plan
from orchestrator.train import rates


@dataclass
class Stored:
    """`states`: `{key: (folder, step)}` of checkpoints; `results`: `{key: result.json}`; both by the key of the state.

    `ends`: the keys at which a stage ended. Other states lie inside of stages, and are used where they save steps.
    """

    states: dict[str, tuple[Path, int]] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)  # of the results
    ends: set[str] = field(default_factory=set)

    def plan(self, trials: Iterable[Trial], at_plateaus: bool = False) -> Plan:
        """The tree of `trials` with all of this in it; see `stages.plan`."""
        trials = list(trials)
        finished = {
            k for k, r in self.results.items() if r["outcome"] == stage_run.DONE and r["is_whole"]
        }
        used = self.ends | {
            key for t in trials if t.key(t.steps) not in finished for key in self._latest(t)
        }
        steps = {key: step for key, (_, step) in self.states.items() if key in used}
        steps |= {key: result["step"] for key, result in self.results.items()}
        dead, stopped = (
            {k for k, r in self.results.items() if r["outcome"] == outcome}
            for outcome in (stage_run.DIVERGED, stage_run.STOPPED)
        )
        return plan(trials, steps, self.states, finished, dead, stopped, at_plateaus=at_plateaus)

    def _latest(self, trial: Trial) -> list[str]:
        """The trial's last state that is stored, if any."""
        steps = sorted({step for _, step in self.states.values() if step <= trial.steps})
        return [key for key in trial.keys(steps).values() if key in self.states][-1:]

    def add(self, key: str, folder: Path, result: dict[str, Any]) -> None:
        """A stage that has ended in this process; `key`: its id, the key of its end."""
        # What diverged says so of the step at which it did, and for the books of its stage.
        for known in {key, result["key"]}:
            self.results[known], self.folders[known] = result, folder
        if result["outcome"] == stage_run.DONE:
            self.states[key] = folder, result["step"]
            self.ends.add(key)

    def forget(self, folder: Path, step: int) -> None:
        """A checkpoint that was removed."""
        for key in [key for key, place in self.states.items() if place == (folder, step)]:
            del self.states[key]

    def damaged(self, plan: Plan) -> list[str]:
        """Forget the states from which `plan` would begin and that are not what was written; why not."""
        begun = {i if i in plan.standing else plan.by_id[i].parent for i in plan.to_run}
        found = []
        for key in begun & self.states.keys() & plan.standing:
            folder, step = self.states[key]
            try:
                checkpoint.verify(checkpoint.path_of(folder / "checkpoints", step))
            except UserError as error:
                found.append(str(error))
                del self.states[key]
        return found


def scan(
    stages: Path, trials: Iterable[Trial], diverged_above: float | None = None, stops: bool = False
) -> Stored:
    """What the folder `stages/` holds for a tree of `trials`; `stops`: also what a scheduler stopped stays so.

    A stage that was interrupted goes on in its own folder. Its checkpoints serve other stages only where today's tree has
    no such stage any more.
    """
    found, todays = Stored(), {stage.id for stage in grow(trials)}
    for folder in sorted(path.parent for path in stages.glob("*/stage.json")):
        order, result = stage_run.read_order(folder), read_json(folder / "result.json")
        outcome = result and result["outcome"]
        if outcome == stage_run.DIVERGED and result["limit"] not in (None, diverged_above):
            continue
        if outcome == stage_run.STOPPED and not stops:
            continue
        if result:
            found.results[result["key"]], found.folders[result["key"]] = result, folder
        if outcome == stage_run.DONE or not result and order.id not in todays:
            made = checkpoint.steps(folder / "checkpoints")
            of_stage = Trial(
                "", order.root, rates.from_json(order.rates).first(max(made, default=0))
            )
            found.states |= {key: (folder, step) for step, key in of_stage.keys(made).items()}
        if outcome == stage_run.DONE and result["key"] in found.states:
            found.ends.add(result["key"])
    return found


def add_run(found: Stored, run_dir: Path, trial: Trial, upto: int) -> None:
    """Add the checkpoints of a lone run, up to step `upto`, as states of `trial`, whose first steps are the run's."""
    made = [step for step in checkpoint.steps(run_dir / "checkpoints") if step <= upto]
    found.states |= {key: (run_dir, step) for step, key in trial.keys(made).items()}


def data_of(found: Path) -> str:
    """The identity of the tokens that a checkpoint was trained on."""
    return checkpoint.read_manifest(found)["fingerprints"]["data"]
