"""The state of a running sweep: which stages can start, how stages ended, which checkpoints can go.

`tune.execute` asks `Progress.next` for stages to start, and calls `Progress.ended` when a stage has
ended. This module does not import Ray.
"""

import contextlib
from collections.abc import Callable, Collection
from dataclasses import replace

from orchestrator.config.sweep import SweepSection
from orchestrator.errors import NOT_WRITABLE
from orchestrator.runs import events, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.records import StageResult, StageSpec, read_result, read_spec
from orchestrator.sweep.stage import has_result, write_stopped
from orchestrator.sweep.states import DIVERGED, DONE, FAILED, RUNNING, WAITING, StageStates
from orchestrator.sweep.stored import StoredStages, StoredState, checkpoint_bytes, remove_unneeded
from orchestrator.sweep.tree import Stage, StageTree
from orchestrator.sweep.trials import PlannedTrial, spec_of
from orchestrator.workers import hangs
from orchestrator.workers.attempts import PATIENCE
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
        begun: Steps at which each stage was started in this process, by its id.
        full_disk: Why no stage starts any more; None unless it could not be
            written to the disk.
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
        self.begun: dict[str, list[int]] = {}
        self.full_disk: str | None = None
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
        if stop.requested(self.folder) or self.full_disk is not None:
            return None
        self.release_judged()
        try:
            stage = self._first_ready()
            if stage is None:
                return None
            self._prepare(stage)
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            what, advice = NOT_WRITABLE[error.errno]
            self.full_disk = (
                f"{what}: {self.folder.path} ({error.strerror}). {advice} and run the same command "
                "again"
            )
            return None
        self.states.start(stage.id)
        self.begun.setdefault(stage.id, []).append(self._newest_step(stage.id))
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
        folder.reserve()
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
        spec = spec_of(trial, stage.start, stage.stop, self.settings.diverged_above)
        if stage.id in self.tree.stored:
            # All steps are done; only the result of a trial is missing.
            end = self.stored.states[stage.id]
            folder = self.folder.stage(stage.id)
            if end.path == folder.path:
                old = read_spec(folder, trial.base)
                assert old is not None
                return replace(spec, start=old.start, parent=old.parent, begin=old.begin)
            return replace(_starting_at(spec, end), start=end.step)
        if stage.parent is None:
            return spec
        return _starting_at(spec, self.stored.states[stage.parent])

    def ended(self, stage: str, died: bool, problem: str | None = None) -> None:
        """Record how a stage ended.

        Args:
            stage: Id of the stage.
            died: True if it ended with an exception, or its process died.
            problem: Why its node could not begin it.
        """
        folder = self.folder.stage(stage)
        with contextlib.suppress(OSError):  # the file system may have become read-only
            folder.reserve_file.unlink(missing_ok=True)
        stop_requested = stop.requested(self.folder) is not None
        result = read_result(folder)
        if result is None and not died and problem is None and not stop_requested:
            result = write_stopped(folder, "stopped by the scheduler")

        error = RuntimeError("the process of a stage ended") if died else None
        ending = diagnose(folder, error, self.workers)
        if problem is not None:
            ending = Ending("user", problem)
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
        remove_unneeded(self)
        self._note_lost_trials(self.tree.by_id[stage])
        self.on_stage_end(self.tree.by_id[stage])

    def _note_lost_trials(self, stage: Stage) -> None:
        """Note each trial that gets no result, because a stage has failed or diverged."""
        state = self.states.by_stage[stage.id]
        for trial in stage.trials:
            if state in (DIVERGED, FAILED) and trial not in self.probes:
                message = f"trial {trial}: {self.stage_reason(stage.id)}"
                events.note(self.folder, f"trial_{state}", message, trial=trial)

    def _record_failure(self, stage: str, ending: Ending) -> None:
        """Try a stage again if its process hung or was killed; else it has failed.

        As in a lone run, `PATIENCE` attempts in a row without a new checkpoint are enough.
        """
        if ending.cause == "hang" and ending.reason is not None:
            events.note(self.folder, "hang", ending.reason, stage=stage)
        if ending.cause == "disk_full":
            self.full_disk = ending.reason
        step = self._newest_step(stage)
        is_stuck = self.begun[stage][-PATIENCE:] == [step] * PATIENCE
        if ending.may_be_transient and not is_stuck:
            # The advice is for the end of the command.
            reason = (ending.reason or "").partition("; run the same command")[0]
            message = f"stage {stage} begins again: {reason}"
            events.note(self.folder, "restart", message, stage=stage, step=step)
            self._wait(stage, f"{reason}; the stage starts once more")
            return
        self.failures[stage] = ending
        self.states.end(stage, FAILED)

    def _newest_step(self, stage: str) -> int:
        return max(self.folder.stage(stage).checkpoint_steps(), default=0)

    def _wait(self, stage: str, reason: str) -> None:
        self.wait_reasons[stage] = reason
        self.states.again(stage)

    def release_judged(self) -> None:
        """Once all probes have ended, release the stages after them; drop the worse trials."""
        if not self.states.on_hold:
            return
        if all(self.states.of_trial(probe) not in (WAITING, RUNNING) for probe in self.probes):
            self.states.release(self.judge_probes())

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
        if self.full_disk is not None and self.states.of_trial(trial) != DONE:
            return f"not begun: {self.full_disk.partition(':')[0]}"
        return None

    def stage_reason(self, stage: str) -> str | None:
        """Return why a stage failed, diverged or was stopped."""
        if stage in self.failures:
            return self.failures[stage].reason
        result = self.stored.results.get(stage)
        return None if result is None else result.reason


def _starting_at(spec: StageSpec, state: StoredState) -> StageSpec:
    return replace(spec, parent=str(state.path), begin=str(state.checkpoint))
