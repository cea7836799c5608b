"""Keeps the books of a sweep while it runs: what may start, what has ended and how, which checkpoints may go.

Eats a plan and what is stored; answers to `sweep.execute` and to whoever watches. It knows folders, and no Ray.
"""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import parse_experiment
from orchestrator.files import read_json
from orchestrator.runs import events, stop
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep import stage as stage_run
from orchestrator.sweep.stage import Order
from orchestrator.sweep.stage_states import (
    DIVERGED,
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    WAITING,
    Progress,
)
from orchestrator.sweep.sweep_folder import Stored
from orchestrator.sweep.tree import Plan, Stage
from orchestrator.sweep.trials import Candidate
from orchestrator.workers import hangs

MISSING = "its process died twice without a word: out of memory, or its machine is gone"


class Keeper:
    """One sweep's progress on disk.

    Args:
        folder: of the sweep. stored: what `scan` found. candidates: by name, probes among them.
        watch: called with each stage that has ended. verdict: called once when all probes have ended;
            returns the names of the trials to drop. more: trials that a sampler wants to have now, when
            nothing else is ready.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        stored: Stored,
        candidates: dict[str, Candidate],
        *,
        keep_branches: bool = True,
        diverged_above: float | None = None,
        probe_step: int | None = None,
        watch: Callable[[Stage], None] = lambda stage: None,
        tick: Callable[[], None] = lambda: None,
        verdict: Callable[[], Collection[str]] = tuple,
        more: Callable[[], list[Candidate]] = list,
    ):
        self.folder, self.stages, self.plan, self.candidates = (
            folder,
            folder / "stages",
            plan,
            candidates,
        )
        self.stored, self.keep_branches, self.diverged_above = stored, keep_branches, diverged_above
        self.watch, self.tick, self.verdict, self.more = watch, tick, verdict, more
        self.probes = [c.name for c in candidates.values() if c.probe]
        held = (
            [
                s.id
                for s in plan.stages
                if s.start >= probe_step and not set(s.trials) & set(self.probes)
            ]
            if self.probes
            else ()
        )
        self.progress = Progress(plan, held)
        self.steps_run, self.tried_again, self.reasons = 0, set(), {}
        self.waits: dict[str, str] = {}  # why a stage that had begun waits again
        self.peak_bytes = 0

    # ---- what execute asks ----
    def next(self) -> str | None:
        if stop.requested(RunFolder(self.folder)):
            return None
        self.judge()
        ready = self.progress.ready()
        while not ready and (wanted := self.more()):
            self._add(wanted)
            ready = self.progress.ready()
        if not ready:
            return None
        stage, folder = ready[0], self.stages / ready[0].id
        self._order(stage).write(folder)
        self._hang(stage.id)  # of an attempt whose driver was killed
        for old in (folder / "stopped.json", *folder.glob("failure-rank*.txt")):
            old.unlink(missing_ok=True)
        if not self._is_done(stage):
            (folder / "result.json").unlink(missing_ok=True)
        self.progress.start(stage.id)
        return stage.id

    def ended(self, stage: str, died: bool) -> None:
        folder, hang = self.stages / stage, self._hang(stage)
        # A stage that starts removes what was there.
        result, stopped = (
            read_json(folder / "result.json"),
            read_json(folder / "stopped.json") or {},
        )
        asked = stop.requested(RunFolder(self.folder))
        if not died and not asked and result is None:
            result = stage_run.note_stop(folder, "stopped by the scheduler")
        if result:  # then it died of nothing that matters
            state = result["outcome"]
        elif asked and (stopped.get("again") or not died):
            state = self._stopped_as_asked(stage, stopped)
        else:
            state = self._failed(stage, folder, hang)
        if state in (DIVERGED, STOPPED):
            self.reasons[stage] = result["reason"]
        if state != WAITING:
            self.progress.end(stage, state)
        if result:
            self.steps_run += result["steps_run"]
            self.stored.add(stage, folder, result)
        self._note_disk()
        self.judge()
        self.tidy()
        self.watch(self.plan.by_id[stage])

    def _add(self, candidates: list[Candidate]) -> None:
        """Each begins from the longest stored prefix of its own; what runs at this moment it cannot share."""
        self.candidates |= {c.name: c for c in candidates}
        self.plan = self.plan.joined(
            self.stored.plan([c.trial for c in candidates], at_plateaus=True)
        )
        self.progress.extend(self.plan)

    # ---- decisions ----
    def _is_done(self, stage: Stage) -> bool:
        """Whether it has all that it can have, and its end stands: then a worker has nothing to do."""
        folder = self.stages / stage.id
        order = stage_run.read_order(folder)
        return stage_run.has_result(folder, order, parse_experiment(order.experiment, str(folder)))

    def _failed(self, stage: str, folder: Path, hang: str | None) -> str:
        """FAILED, or WAITING where a process hung, or died without raising anything: that is tried once more."""
        files = sorted(
            folder.glob("failure-rank*.txt"), key=lambda f: f.stat().st_mtime_ns
        )  # the others are its echo
        traces = [f.read_text("utf-8") for f in files]
        if (hang or not traces) and stage not in self.tried_again:
            self.tried_again.add(stage)
            return self._waits(stage, f"{hang or 'its process died'}; once more")
        # What the others raise where one hung and was ended is its echo too.
        self.reasons[stage] = hang or (traces[0].strip().splitlines()[-1] if traces else MISSING)
        return FAILED

    def _stopped_as_asked(self, stage: str, stopped: dict[str, Any]) -> str:
        """WAITING: the next start of the sweep goes on from the checkpoint of its last step, if it had begun."""
        self.steps_run += stopped.get("steps_run", 0)
        return self._waits(stage, stopped.get("reason", "asked to stop before it began"))

    def _waits(self, stage: str, why: str) -> str:
        self.waits[stage] = why
        self.progress.again(stage)
        return WAITING

    def _hang(self, stage: str) -> str | None:
        """The verdict on a hang that ended the stage's workers; they are gone, and so are their marks then."""
        if message := hangs.report(RunFolder(self.stages / stage)):
            events.note(RunFolder(self.folder), "hang", message, stage=stage)
        return message

    def judge(self) -> None:
        """Once every probe is over, drop the trials that they speak against, and let the others go on."""
        if self.progress.held and all(
            self.progress.trial(p) not in (WAITING, RUNNING) for p in self.probes
        ):
            self.progress.release(self.verdict())

    def _order(self, stage: Stage) -> Order:
        """What stage.json says: of the trials that make the stage, one that ends with it if any does."""
        candidate = self.candidates[(stage.ends or stage.trials)[0]]
        data = candidate.dataset.directory
        order = Order(
            stage.id,
            candidate.trial.root,
            stage.start,
            stage.stop,
            candidate.experiment.model_dump(),
            candidate.rates.to_json(),
            str(data),
            diverged_above=self.diverged_above,
        )
        before = stage_run.read_order(self.stages / stage.id)
        if stage.id in self.plan.standing:
            place, step = self.stored.states[stage.id]
            if place == self.stages / stage.id:  # its steps are made: it only ends a trial now
                return replace(order, start=before.start, parent=before.parent, begin=before.begin)
            return replace(
                order,
                start=step,
                parent=str(place),
                begin=str(checkpoint.path_of(place / "checkpoints", step)),
            )
        if stage.parent is None:
            return order
        place, step = self.stored.states[stage.parent]
        return replace(
            order, parent=str(place), begin=str(checkpoint.path_of(place / "checkpoints", step))
        )

    # ---- disk ----
    def tidy(self) -> None:
        """Remove checkpoints that nobody will begin from: of probes that are judged and, without `keep_branches`, all that
        no stage to come begins from and that are no trial's result.
        """
        needed = {
            self.stored.states[key] for key in self.progress.needed() if key in self.stored.states
        }
        coming = {
            s.id
            for s in self.plan.stages
            if self.progress.state[s.id] in (WAITING, RUNNING, FAILED)
        }
        probes = set(self.probes) if not self.progress.held else set()
        if self.keep_branches and not probes:
            return
        for folder in [p.parent for p in self.stages.glob("*/checkpoints")]:
            stage, result = (
                self.plan.by_id.get(folder.name),
                read_json(folder / "result.json") or {},
            )
            is_probe = stage is not None and set(stage.trials) <= probes
            if (
                folder.name in coming
                or (self.keep_branches or result.get("is_whole"))
                and not is_probe
            ):
                continue
            for step in checkpoint.steps(folder / "checkpoints"):
                if (folder, step) not in needed:
                    checkpoint.remove(checkpoint.path_of(folder / "checkpoints", step))
                    self.stored.forget(folder, step)

    def _note_disk(self) -> None:
        """Others write and rename there meanwhile: what has gone is not counted."""
        total = 0
        for part in self.stages.glob("*/checkpoints/*/*"):
            with contextlib.suppress(OSError):
                total += part.stat().st_size
        self.peak_bytes = max(self.peak_bytes, total)

    # ---- what watchers ask ----
    def running(self) -> list[Path]:
        """Folders of the stages that run now. Another thread may ask."""
        return [
            self.stages / stage
            for stage, state in list(self.progress.state.items())
            if state == RUNNING
        ]

    def last_stage(self, trial: str) -> tuple[Path, int] | None:
        """The folder of the trial's last stage that has lines, done or not, and the trial's step at its end."""
        # From its end: a stage that stands has its whole curve, whatever new branches now cut on the way to it.
        for stage in reversed(self.plan.path(trial)):
            folder = self.stored.folders.get(stage.id) or self.stages / stage.id
            if not (folder / "metrics.jsonl").exists():
                folder = self.stored.states.get(stage.id, (None, 0))[0]
            if folder:
                return (
                    (folder, stage.stop) if folder.parent == self.stages else None
                )  # the run it branches off is no stage
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
