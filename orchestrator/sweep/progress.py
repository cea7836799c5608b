"""The state of a running sweep: which stages can start, how stages ended, which checkpoints can go.

`tune.execute` asks `Progress.next` for stages to start, and calls `Progress.ended` when a stage has
ended. This module does not import Ray.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.sweep import SweepSection
from orchestrator.runs import events, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.records import StageResult, StageSpec, read_result, read_spec
from orchestrator.sweep.stage import has_result, write_stopped
from orchestrator.sweep.states import DONE, FAILED, RUNNING, WAITING, StageStates
from orchestrator.sweep.stored import StoredStages, StoredState, checkpoint_bytes
from orchestrator.sweep.tree import Stage, StageTree
from orchestrator.sweep.trials import PlannedTrial
from orchestrator.workers import hangs
from orchestrator.workers.diagnose import diagnose


class Progress:
    """The state of a running sweep.

    Args:
        folder: Folder of the sweep.
        tree: The stages.
        stored: What was on disk when the tree was built.
        trials: Trials and probes by name.
        settings: The `sweep:` section.
        workers: Workers of each stage.
        judge_probes: Called once when all probes have ended; returns the trials to drop.
        next_sample: Called when nothing else is ready; returns more trials, or none.

    Attributes:
        states: State of every stage.
        on_stage_end: Called with each stage that has ended.
        tick: Called several times a second.
        steps_run: Updates made in this process.
        failures: Ending of each stage that failed, by its id.
        wait_reasons: Why a stage that had started waits again, by its id.
        retried: Ids of stages that were started a second time.
        peak_bytes: The most bytes that the checkpoints took on disk.
    """

    def __init__(
        self,
        folder: SweepFolder,
        tree: StageTree,
        stored: StoredStages,
        trials: dict[str, PlannedTrial],
        settings: SweepSection,
        workers: int,
        judge_probes: Callable[[], Collection[str]],
        next_sample: Callable[[], list[PlannedTrial]],
    ) -> None:
        self.folder = folder
        self.tree = tree
        self.stored = stored
        self.trials = dict(trials)
        self.settings = settings
        self.workers = workers
        self.judge_probes = judge_probes
        self.next_sample = next_sample
        self.on_stage_end: Callable[[Stage], object] = lambda stage: None
        self.tick: Callable[[], object] = lambda: None

        self.probes = {trial.name for trial in trials.values() if trial.is_probe}
        self.states = StageStates(tree, self._stages_after_probes())
        self.steps_run = 0
        self.retried: set[str] = set()
        self.failures: dict[str, Ending] = {}
        self.wait_reasons: dict[str, str] = {}
        self.peak_bytes = 0

    def _stages_after_probes(self) -> list[str]:
        """Return the ids of the stages that wait until the probes are judged."""
        probe_step = self.settings.probe_step
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
        """Add trials. They start from stored states, and share no step with running stages."""
        self.trials |= {trial.name: trial for trial in trials}
        new = self.stored.tree([trial.branch for trial in trials], at_decays=True)
        self.tree = self.tree.merged_with(new)
        self.states.extend(self.tree)

    def _prepare(self, stage: Stage) -> None:
        folder = self.folder.stage(stage.id)
        spec = self._spec(stage)
        spec.write(folder)
        message = hangs.report(folder)
        if message is not None:  # a hang in an earlier attempt, whose driver was killed
            events.note(self.folder, "hang", message, stage=stage.id)
        folder.clear_ending()
        # The workers do nothing in a stage whose result is complete.
        if not has_result(folder, spec, spec.parsed_experiment()):
            folder.result_file.unlink(missing_ok=True)

    def _spec(self, stage: Stage) -> StageSpec:
        """Return the content of stage.json. A trial that ends here gives the experiment."""
        trial = self.trials[stage.example]
        spec = StageSpec(
            id=stage.id,
            root=trial.branch.root,
            start=stage.start,
            stop=stage.stop,
            experiment=trial.experiment.model_dump(),
            rates=trial.rates.to_json(),
            data_dir=str(trial.dataset.directory),
            diverged_above=self.settings.diverged_above,
        )
        if stage.id in self.tree.stored:
            # All steps are done; only the result of a trial is missing.
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

        error = RuntimeError("the process of a stage ended") if died else None
        ending = diagnose(folder, error, self.workers)
        if result is not None:  # also if the process died after it had written the result
            self.states.end(stage, result.outcome)
            self.steps_run += result.steps_run
            self.stored.add(stage, folder, result)
        elif stop_requested and ending.kind in ("again", "done"):
            # The next start of the sweep continues this stage.
            self.steps_run += ending.facts.get("steps_run", 0)
            self._wait(stage, ending.reason or "asked to stop before it began")
        else:
            self._record_failure(stage, ending)
        self.peak_bytes = max(self.peak_bytes, checkpoint_bytes(self.folder))
        self.release_judged()
        self.remove_unneeded()
        self.on_stage_end(self.tree.by_id[stage])

    def _record_failure(self, stage: str, ending: Ending) -> None:
        """Try a stage once more if its process hung or was killed; else it has failed."""
        if ending.cause == "hang" and ending.reason is not None:
            events.note(self.folder, "hang", ending.reason, stage=stage)
        if ending.may_be_transient and stage not in self.retried:
            self.retried.add(stage)
            step = max(self.folder.stage(stage).checkpoint_steps(), default=0)
            message = f"stage {stage} begins again: {ending.reason}"
            events.note(self.folder, "restart", message, stage=stage, step=step)
            self._wait(stage, f"{ending.reason}; the stage starts once more")
            return
        self.failures[stage] = ending
        self.states.end(stage, FAILED)

    def _wait(self, stage: str, reason: str) -> None:
        self.wait_reasons[stage] = reason
        self.states.again(stage)

    def release_judged(self) -> None:
        """Once all probes have ended, release the stages after them; drop the worse trials."""
        if not self.states.on_hold:
            return
        if all(self.states.of_trial(probe) not in (WAITING, RUNNING) for probe in self.probes):
            self.states.release(self.judge_probes())

    # ---- disk ----

    def remove_unneeded(self) -> None:
        """Remove checkpoints of judged probes and, without `keep_branches`, those of branch points.

        Checkpoints from which a stage will start, and results of trials, stay.
        """
        judged_probes: set[str] = set() if self.states.on_hold else self.probes
        if self._keeps_branches() and not judged_probes:
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

    def _keeps_branches(self) -> bool:
        # Later samples of optuna may branch off anywhere.
        return self.settings.keep_branches or self.settings.sampler == "optuna"

    def _keeps_checkpoints(self, folder: RunFolder, judged_probes: set[str]) -> bool:
        stage = self.tree.by_id.get(folder.name)
        if stage is not None:
            if self.states.by_stage[stage.id] in (WAITING, RUNNING, FAILED):
                return True
            if judged_probes.issuperset(stage.trials):
                return False
        if self._keeps_branches():
            return True
        result = read_result(folder)
        return result is not None and result.is_whole

    # ---- what the reports ask ----

    def running(self) -> list[RunFolder]:
        """Return the folders of the stages that run now. Other threads may call this."""
        states = list(self.states.by_stage.items())
        return [self.folder.stage(stage) for stage, state in states if state == RUNNING]

    def last_stage(self, trial: str) -> StoredState | None:
        """Return the folder and the end of a trial's last stage that has journal lines.

        The stage need not be done. None if only the run that the sweep branches off has lines.
        """
        # Search from the end: the curve of a stored stage is complete, even if the steps before it
        # belong to other stages now.
        for stage in reversed(self.tree.stages_of(trial)):
            own = self.folder.stage(stage.id)
            folder = self.stored.folders.get(stage.id, own)
            if not folder.journal_file.exists():
                state = self.stored.states.get(stage.id)
                if state is None:
                    continue
                folder = state.folder
            if folder.path.parent != own.path.parent:  # the run that the sweep branches off
                return None
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
            result = self.stored.results.get(stage.id)
            if stage.id in self.failures or (result is not None and result.outcome != DONE):
                return self.stage_reason(stage.id)
        return None

    def stage_reason(self, stage: str) -> str | None:
        """Return why a stage failed, diverged or was stopped."""
        if stage in self.failures:
            return self.failures[stage].reason
        result = self.stored.results.get(stage)
        return None if result is None else result.reason


def _starting_at(spec: StageSpec, state: StoredState) -> StageSpec:
    return replace(spec, parent=str(state.path), begin=str(state.checkpoint))
