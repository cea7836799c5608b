"""The state of a running sweep: which stages can start, how stages ended, which checkpoints can go.

`Progress` answers the questions of `tune.execute` and of the reports. It writes stage.json of each
stage that starts, and knows no Ray.
"""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import replace

from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs import events, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.records import StageResult, StageSpec, read_result, read_spec
from orchestrator.sweep.stage import has_result, write_stopped
from orchestrator.sweep.states import DONE, FAILED, RUNNING, WAITING, StageStates
from orchestrator.sweep.stored import StoredStages, StoredState
from orchestrator.sweep.tree import Stage, StageTree
from orchestrator.sweep.trials import PlannedTrial
from orchestrator.workers import hangs
from orchestrator.workers.diagnose import diagnose


class StageProcessError(Exception):
    """Tune reported that the process of a stage raised an exception or died."""


class Progress:
    """The state of a running sweep.

    Args:
        folder: Folder of the sweep.
        tree: The stages.
        stored: What was on disk when the tree was built.
        trials: Trials and probes by name.
        keep_branches: False: remove checkpoints from which no later stage starts.
        diverged_above: `sweep.diverged_above`.
        probe_step: Step at which the probes leave their trials.
        workers: Workers of each stage.
        judge_probes: Called once when all probes have ended; returns the trials to drop.
        next_sample: Called when nothing else is ready; returns more trials, or none.

    Attributes:
        states: State of every stage.
        on_stage_end: Called with each stage that has ended.
        tick: Called several times a second.
        steps_run: Updates made in this process.
        failures: How the stages ended that failed, by their id.
        reasons: Why a stage failed, diverged or was stopped, by its id.
        wait_reasons: Why a stage that had started waits again, by its id.
        retried: Stages that were tried a second time.
        peak_bytes: The most bytes that the checkpoints took on disk.
    """

    def __init__(
        self,
        folder: SweepFolder,
        tree: StageTree,
        stored: StoredStages,
        trials: dict[str, PlannedTrial],
        *,
        keep_branches: bool = True,
        diverged_above: float | None = None,
        probe_step: int | None = None,
        workers: int = 1,
        judge_probes: Callable[[], Collection[str]] = tuple,
        next_sample: Callable[[], list[PlannedTrial]] = list,
    ) -> None:
        self.folder = folder
        self.tree = tree
        self.stored = stored
        self.trials = dict(trials)
        self.keep_branches = keep_branches
        self.diverged_above = diverged_above
        self.workers = workers
        self.judge_probes = judge_probes
        self.next_sample = next_sample
        self.on_stage_end: Callable[[Stage], object] = _ignore_stage
        self.tick: Callable[[], object] = _ignore_tick

        self.probes = {trial.name for trial in trials.values() if trial.is_probe}
        self.states = StageStates(tree, self._stages_after_probes(probe_step))
        self.steps_run = 0
        self.retried: set[str] = set()
        self.failures: dict[str, Ending] = {}
        self.reasons: dict[str, str | None] = {}
        self.wait_reasons: dict[str, str] = {}
        self.peak_bytes = 0

    def _stages_after_probes(self, probe_step: int | None) -> list[str]:
        """Return the stages that wait until the probes have been judged."""
        if not self.probes or probe_step is None:
            return []
        return [
            stage.id
            for stage in self.tree.stages
            if stage.start >= probe_step and self.probes.isdisjoint(stage.trials)
        ]

    # ---- what `tune.execute` asks ----

    def next(self) -> str | None:
        """Return the id of a stage to start, with its folder prepared; None: none is ready."""
        if stop.requested(self.folder):
            return None
        self.release_judged()
        stage = self._first_ready()
        if stage is None:
            return None
        self._prepare(stage)
        self.states.start(stage.id)
        return stage.id

    def _first_ready(self) -> Stage | None:
        while True:
            ready = self.states.ready()
            if ready:
                return ready[0]
            sample = self.next_sample()
            if not sample:
                return None
            self._add(sample)

    def _add(self, trials: list[PlannedTrial]) -> None:
        """Add trials. They start from stored states, and share nothing with stages that run now."""
        self.trials |= {trial.name: trial for trial in trials}
        new = self.stored.tree([trial.branch for trial in trials], at_decays=True)
        self.tree = self.tree.merged_with(new)
        self.states.extend(self.tree)

    def _prepare(self, stage: Stage) -> None:
        folder = self.folder.stage(stage.id)
        spec = self._spec(stage)
        spec.write(folder)
        message = hangs.report(folder)
        if message is not None:  # in an attempt whose driver was killed
            events.note(self.folder, "hang", message, stage=stage.id)
        folder.clear_ending()
        # The workers leave a stage alone that has all that it can have.
        if not has_result(folder, spec, spec.parsed_experiment()):
            folder.result_file.unlink(missing_ok=True)

    def _spec(self, stage: Stage) -> StageSpec:
        """Return stage.json, with the experiment of a trial that ends here if there is one."""
        trial = self.trials[(stage.ends or stage.trials)[0]]
        spec = StageSpec(
            id=stage.id,
            root=trial.branch.root,
            start=stage.start,
            stop=stage.stop,
            experiment=trial.experiment.model_dump(),
            rates=trial.rates.to_json(),
            data_dir=str(trial.dataset.directory),
            diverged_above=self.diverged_above,
        )
        if stage.id in self.tree.stored:
            # All its steps are made; it only completes the end of a trial.
            end = self.stored.states[stage.id]
            folder = self.folder.stage(stage.id)
            if end.path == folder.path:
                old = read_spec(folder)
                assert old is not None
                return replace(spec, start=old.start, parent=old.parent, begin=old.begin)
            return replace(_starting_at(spec, end), start=end.step)
        if stage.parent is None:
            return spec
        return _starting_at(spec, self.stored.states[stage.parent])

    def ended(self, stage: str, died: bool) -> None:
        """Record how a stage ended.

        Args:
            stage: Id of the stage.
            died: True if it ended with an exception, or its process died.
        """
        folder = self.folder.stage(stage)
        stop_requested = stop.requested(self.folder) is not None
        result = read_result(folder)
        if result is None and not died and not stop_requested:
            result = write_stopped(folder, "stopped by the scheduler")

        error = StageProcessError("the process of a stage ended") if died else None
        ending = diagnose(folder, error, self.workers)
        if result is not None:  # also if the process died after it had written the result
            self._record_result(stage, result)
        elif stop_requested and ending.kind in ("again", "done"):
            self._wait_for_next_start(stage, ending)
        else:
            self._record_failure(stage, ending)
        self._measure_disk()
        self.release_judged()
        self.remove_unneeded()
        self.on_stage_end(self.tree.by_id[stage])

    def _record_result(self, stage: str, result: StageResult) -> None:
        if result.outcome != DONE:
            self.reasons[stage] = result.reason
        self.states.end(stage, result.outcome)
        self.steps_run += result.steps_run
        self.stored.add(stage, self.folder.stage(stage), result)

    def _wait_for_next_start(self, stage: str, ending: Ending) -> None:
        """Leave a stage that was asked to stop to the next start of the sweep."""
        self.steps_run += ending.facts.get("steps_run", 0)
        self._wait(stage, ending.reason or "asked to stop before it began")

    def _record_failure(self, stage: str, ending: Ending) -> None:
        """Try a stage once more if its process hung or was killed, else let it fail."""
        if ending.cause == "hang" and ending.reason is not None:
            events.note(self.folder, "hang", ending.reason, stage=stage)
        if ending.may_be_transient and stage not in self.retried:
            self.retried.add(stage)
            step = max(self.folder.stage(stage).checkpoint_steps(), default=0)
            message = f"stage {stage} begins again: {ending.reason}"
            events.note(self.folder, "restart", message, stage=stage, step=step)
            self._wait(stage, f"{ending.reason}; once more")
            return
        self.failures[stage] = ending
        self.reasons[stage] = ending.reason
        self.states.end(stage, FAILED)

    def _wait(self, stage: str, reason: str) -> None:
        self.wait_reasons[stage] = reason
        self.states.again(stage)

    def release_judged(self) -> None:
        """Once all probes have ended, let the trials go on that they do not speak against."""
        if not self.states.on_hold:
            return
        if all(self.states.of_trial(probe) not in (WAITING, RUNNING) for probe in self.probes):
            self.states.release(self.judge_probes())

    # ---- disk ----

    def remove_unneeded(self) -> None:
        """Remove checkpoints of judged probes and, without `keep_branches`, those of branch points.

        A checkpoint from which a stage will start, or that is the result of a trial, stays.
        """
        judged_probes: set[str] = set() if self.states.on_hold else self.probes
        if self.keep_branches and not judged_probes:
            return
        needed = {self.stored.states.get(key) for key in self.states.needed()}
        for folder in self.folder.stages():
            if self._keeps_checkpoints(folder, judged_probes):
                continue
            for step in folder.checkpoint_steps():
                state = StoredState(folder.path, step)
                if state not in needed:
                    checkpoint.remove(state.checkpoint)
                    self.stored.forget(state)

    def _keeps_checkpoints(self, folder: RunFolder, judged_probes: set[str]) -> bool:
        stage = self.tree.by_id.get(folder.name)
        if stage is not None:
            if self.states.by_stage[stage.id] in (WAITING, RUNNING, FAILED):
                return True
            if judged_probes.issuperset(stage.trials):
                return False
        if self.keep_branches:
            return True
        result = read_result(folder)
        return result is not None and result.is_whole

    def _measure_disk(self) -> None:
        total = 0
        for folder in self.folder.stages():
            for part in folder.checkpoints.glob("*/*"):
                # Other stages rename and remove files meanwhile.
                with contextlib.suppress(OSError):
                    total += part.stat().st_size
        self.peak_bytes = max(self.peak_bytes, total)

    # ---- what the reports ask ----

    def running(self) -> list[RunFolder]:
        """Return the folders of the stages that run now. Other threads may call this."""
        states = list(self.states.by_stage.items())
        return [self.folder.stage(stage) for stage, state in states if state == RUNNING]

    def last_stage(self, trial: str) -> StoredState | None:
        """Return the folder and the end of a trial's last stage that has lines, done or not."""
        # Search from the end: a stored stage has its whole curve, however new branches cut the
        # steps before it.
        for stage in reversed(self.tree.stages_of(trial)):
            own = self.folder.stage(stage.id)
            folder = self.stored.folders.get(stage.id, own)
            if not folder.journal_file.exists():
                state = self.stored.states.get(stage.id)
                if state is None:
                    continue
                folder = state.folder
            if folder.path.parent != own.path.parent:
                return None  # the run that the sweep branches off
            return StoredState(folder.path, stage.stop)
        return None

    def result(self, trial: str) -> StageResult | None:
        """Return the result of the last stage of a trial that is done."""
        if self.states.of_trial(trial) != DONE:
            return None
        return self.stored.results.get(self.tree.stages_of(trial)[-1].id)

    def reason(self, trial: str) -> str | None:
        """Return why a trial has no result."""
        for stage in self.tree.stages_of(trial):
            if stage.id in self.reasons:
                return self.reasons[stage.id]
            result = self.stored.results.get(stage.id)
            if result is not None and result.outcome != DONE:
                return result.reason
        return None


def _starting_at(spec: StageSpec, state: StoredState) -> StageSpec:
    return replace(spec, parent=str(state.path), begin=str(state.checkpoint))


def _ignore_stage(stage: Stage) -> None:
    pass


def _ignore_tick() -> None:
    pass
