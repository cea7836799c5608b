"""Keeps the books of a sweep while it runs: what may start, what has ended and how, which checkpoints may go.

Eats a plan and what is stored; answers to `sweep.execute` and to whoever watches. It knows folders, and no Ray.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import checkpoint, stage_run
from orchestrator.runs import read_json
from orchestrator.stage_run import Order
from orchestrator.stages import DIVERGED, DONE, FAILED, RUNNING, STOPPED, WAITING, Plan, Progress, Stage
from orchestrator.sweep_folder import Stored
from orchestrator.trials import Candidate

MISSING = "its process died twice without a word: out of memory, or its machine is gone"


class Keeper:
    """One sweep's progress on disk.

    Args:
        folder: of the sweep. stored: what `scan` found. candidates: by name, probes among them.
        watch: called with each stage that has ended. verdict: called once when all probes have ended, with their final
            losses by name; returns the names of the trials to drop. more: trials that a sampler wants to have now, when
            nothing else is ready.
    """

    def __init__(self, folder: Path, plan: Plan, stored: Stored, candidates: dict[str, Candidate], *,
                 keep_branches: bool = True, diverged_above: float | None = None, probe_step: int | None = None,
                 watch: Callable[[Stage], None] = lambda stage: None, tick: Callable[[], None] = lambda: None,
                 verdict: Callable[[], Collection[str]] = tuple, more: Callable[[], list[Candidate]] = list):
        self.folder, self.stages, self.plan, self.candidates = folder, folder / "stages", plan, candidates
        self.stored, self.keep_branches, self.diverged_above = stored, keep_branches, diverged_above
        self.watch, self.tick, self.verdict, self.more = watch, tick, verdict, more
        self.probes = [c.name for c in candidates.values() if c.probe]
        held = [s.id for s in plan.stages if s.start >= probe_step and not set(s.trials) & set(self.probes)] if self.probes else ()
        self.progress = Progress(plan, held)
        self.steps_run, self.tried_again, self.reasons = 0, set(), {}
        self.peak_bytes = 0

    # ---- what execute asks ----
    def next(self) -> str | None:
        self.judge()
        ready = self.progress.ready()
        while not ready and (wanted := self.more()):
            self._add(wanted)
            ready = self.progress.ready()
        if not ready:
            return None
        stage = ready[0]
        self._order(stage).write(self.stages / stage.id)
        for old in (self.stages / stage.id).glob("failure-rank*.txt"):
            old.unlink()
        self.progress.start(stage.id)
        return stage.id

    def ended(self, stage: str, died: bool) -> None:
        folder = self.stages / stage
        result = read_json(folder / "result.json")
        if not died and result is None:
            result = stage_run.note_stop(folder, "stopped by the scheduler")
        state = self._failed(stage, folder) if died else result["outcome"]
        if state in (DIVERGED, STOPPED):
            self.reasons[stage] = result["reason"]
        if state != WAITING:
            self.progress.end(stage, state)
        if result:
            self.steps_run += result["steps_run"]
            self.stored.results[stage], self.stored.folders[stage] = result, folder
            if state == DONE:
                self.stored.states[stage] = folder, self.plan.by_id[stage].stop
        self._note_disk()
        self.judge()
        self.tidy()
        self.watch(self.plan.by_id[stage])

    def _add(self, candidates: list[Candidate]) -> None:
        """Each begins from the longest stored prefix of its own; what runs at this moment it cannot share."""
        self.candidates |= {c.name: c for c in candidates}
        self.plan = self.plan.joined(self.stored.plan([c.trial for c in candidates], at_plateaus=True))
        self.progress.extend(self.plan)

    # ---- decisions ----
    def _failed(self, stage: str, folder: Path) -> str:
        """FAILED, or WAITING where a process died without raising anything: that is tried once more."""
        files = sorted(folder.glob("failure-rank*.txt"), key=lambda f: f.stat().st_mtime_ns)  # the others are its echo
        traces = [f.read_text("utf-8") for f in files]
        if not traces and stage not in self.tried_again:
            self.tried_again.add(stage)
            self.progress.again(stage)
            return WAITING
        self.reasons[stage] = traces[0].strip().splitlines()[-1] if traces else MISSING
        return FAILED

    def judge(self) -> None:
        """Once every probe is over, drop the trials that they speak against, and let the others go on."""
        if self.progress.held and all(self.progress.trial(p) not in (WAITING, RUNNING) for p in self.probes):
            self.progress.release(self.verdict())

    def _order(self, stage: Stage) -> Order:
        """What stage.json says: of the trials that make the stage, one that ends with it if any does."""
        candidate = self.candidates[(stage.ends or stage.trials)[0]]
        data = candidate.dataset.directory
        order = Order(stage.id, candidate.trial.root, stage.start, stage.stop, candidate.experiment.model_dump(),
                      candidate.rates.to_json(), str(data), diverged_above=self.diverged_above)
        before = stage_run.read_order(self.stages / stage.id)
        if stage.id in self.plan.standing:
            place, step = self.stored.states[stage.id]
            if place == self.stages / stage.id:  # its steps are made: it only ends a trial now
                return replace(order, start=before.start, parent=before.parent, begin=before.begin)
            return replace(order, start=step, parent=str(place), begin=str(checkpoint.path_of(place / "checkpoints", step)))
        if stage.parent is None:
            return order
        place, step = self.stored.states[stage.parent]
        return replace(order, parent=str(place), begin=str(checkpoint.path_of(place / "checkpoints", step)))

    # ---- disk ----
    def tidy(self) -> None:
        """Without `keep_branches`, remove the checkpoints that no pending stage begins from and that are no result."""
        if self.keep_branches:
            return
        needed = self.progress.needed()
        for stage in self.plan.stages:
            result = self.stored.results.get(stage.id)
            if result and not result["is_whole"] and stage.id not in needed and self.progress.state[stage.id] == DONE:
                checkpoint.keep_only(self.stages / stage.id / "checkpoints", None)
                self.stored.states.pop(stage.id, None)

    def _note_disk(self) -> None:
        parts = self.stages.glob("*/checkpoints/*/*")
        self.peak_bytes = max(self.peak_bytes, sum(p.stat().st_size for p in parts if p.is_file()))

    # ---- what watchers ask ----
    def last_stage(self, trial: str) -> tuple[Path, int] | None:
        """The folder of the trial's last stage that has lines, done or not, and the trial's step at its end."""
        # From its end: a stage that stands has its whole curve, whatever new branches now cut on the way to it.
        for stage in reversed(self.plan.path(trial)):
            folder = self.stored.folders.get(stage.id) or self.stages / stage.id
            if not (folder / "metrics.jsonl").exists():
                folder = self.stored.states.get(stage.id, (None, 0))[0]
            if folder:
                return (folder, stage.stop) if folder.parent == self.stages else None  # the run it branches off is no stage
        return None

    def result(self, trial: str) -> dict[str, Any]:
        """result.json of the trial's end; nothing where it has none."""
        if self.progress.trial(trial) != DONE:
            return {}
        return self.stored.results.get(self.plan.path(trial)[-1].id, {})

    def reason(self, trial: str) -> str | None:
        """Why the trial has no result."""
        for stage in self.plan.path(trial):
            if stage.id in self.reasons:
                return self.reasons[stage.id]
            result = self.stored.results.get(stage.id)
            if result and result["outcome"] != DONE:
                return result["reason"]
        return None
