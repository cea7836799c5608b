"""The checkpoints and results of a sweep's stages on disk, and the removal of what is not needed.

They are found by the key of a state. So a tree with other branches finds what an earlier tree left.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.checkpoint import store as checkpoint
from orchestrator.checkpoint.format import refuse_outage
from orchestrator.errors import UnreadableError, UserError
from orchestrator.runs import journal_copy
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep.branch import Branch
from orchestrator.sweep.records import (
    StageResult,
    StageSpec,
    has_whole_curve,
    read_result,
    read_spec,
)
from orchestrator.sweep.states import DIVERGED, DONE, FAILED, RUNNING, STOPPED, WAITING, State
from orchestrator.sweep.tree import StageTree, build_tree, grow

if TYPE_CHECKING:
    from orchestrator.sweep.progress import Progress
    from orchestrator.sweep.source import BaseRun


@dataclass(frozen=True)
class StoredState:
    """The state after `step` updates in the folder of a stage or a run."""

    path: Path
    step: int

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.path)

    @property
    def checkpoint(self) -> Path:
        return self.folder.checkpoint(self.step)


class StoredStages:
    """States and results that are on disk, by the key of the state.

    Attributes:
        states: Checkpoints.
        results: How stages ended.
        folders: Folders of the results.
        ends: Keys of the states at which a stage ended. The other states lie inside stages; `tree`
            uses them where they save steps.
        made_by_others: For each stage that cannot be used because the code or the device is another
            one now: what has changed; empty if an earlier version did not record it.
    """

    def __init__(self) -> None:
        self.states: dict[str, StoredState] = {}
        self.results: dict[str, StageResult] = {}
        self.folders: dict[str, RunFolder] = {}
        self.ends: set[str] = set()
        self.made_by_others: list[list[str]] = []

    def tree(self, branches: Iterable[Branch], at_decays: bool = False) -> StageTree:
        """Return the tree of some branches, cut at what is stored; see `build_tree`."""
        branches = list(branches)
        finished = {
            key
            for key, result in self.results.items()
            if result.outcome == DONE and result.is_whole
        }
        used = set(self.ends)
        for branch in branches:
            if branch.key(branch.steps) not in finished:
                used |= self._latest(branch)
        steps = {key: state.step for key, state in self.states.items() if key in used}
        steps |= {key: result.step for key, result in self.results.items()}
        return build_tree(
            branches,
            steps,
            stored=self.states,
            finished=finished,
            diverged=self._keys_with(DIVERGED),
            stopped=self._keys_with(STOPPED),
            at_decays=at_decays,
        )

    def _keys_with(self, outcome: State) -> set[str]:
        return {key for key, result in self.results.items() if result.outcome == outcome}

    def _latest(self, branch: Branch) -> set[str]:
        """Return the key of the last stored state of a branch, or nothing."""
        steps = sorted({state.step for state in self.states.values() if state.step <= branch.steps})
        keys = [key for key in branch.keys(steps).values() if key in self.states]
        return set(keys[-1:])

    def add(self, stage: str, folder: RunFolder, result: StageResult) -> None:
        """Add a stage that ended in this process."""
        # A stage that diverged has another key at its last step than at its planned end.
        for key in {stage, result.key}:
            self.results[key] = result
            self.folders[key] = folder
        if result.outcome == DONE:
            self.states[stage] = StoredState(folder.path, result.step)
            self.ends.add(stage)

    def add_run(self, folder: RunFolder, branch: Branch, last_step: int) -> None:
        """Add the checkpoints of a lone run as states of a branch that starts with its steps."""
        steps = [step for step in folder.checkpoint_steps() if step <= last_step]
        for step, key in branch.keys(steps).items():
            self.states[key] = StoredState(folder.path, step)

    def forget(self, state: StoredState) -> None:
        """Note that a checkpoint was removed."""
        self.states = {key: known for key, known in self.states.items() if known != state}

    def restore_journals(self) -> list[str]:
        """Restore the journals of stages that are done. Return what was wrong with each."""
        problems = []
        for key, result in self.results.items():
            if result.outcome == DONE:
                try:
                    problem = journal_copy.restore(self.folders[key], result.step)
                except UnreadableError:
                    raise
                except UserError as error:
                    problem = f"lines of {self.folders[key].journal_file} are lost: {error}"
                problems.append(problem)
        return [problem for problem in problems if problem is not None]

    def forget_damaged(self, tree: StageTree) -> list[str]:
        """Forget damaged checkpoints: of trials that are done, and where stages would start.

        A trial whose last checkpoint was removed stays done.

        Returns:
            What is wrong with each damaged checkpoint.

        Raises:
            UnreadableError: A checkpoint, or the disk, cannot be read at the moment.
        """
        problems: list[UserError] = []
        for done in tree.finished & tree.by_id.keys():
            ended, result = self.folders[done], self.results[done]
            if result.step not in ended.checkpoint_steps():
                continue
            if _is_damaged(ended.checkpoint(result.step), problems):
                del self.results[done]
                # The stage runs again: it resumes in its folder, so that no other stage may.
                self.states = {k: s for k, s in self.states.items() if s.path != ended.path}
        starts = [id_ if id_ in tree.stored else tree.by_id[id_].parent for id_ in tree.to_run]
        for key in set(starts):
            if key is None or key not in self.states or key not in tree.stored:
                continue
            if _is_damaged(self.states[key].checkpoint, problems):
                del self.states[key]
        return [str(problem) for problem in problems]


def _is_damaged(path: Path, problems: list[UserError]) -> bool:
    """Verify a checkpoint, and append what is wrong with it to the problems of others."""
    try:
        checkpoint.verify(path, remember=True)
    except UnreadableError:
        raise
    except UserError as error:
        problems.append(error)
        refuse_outage(problems)
        return True
    return False


def scan(
    sweep: SweepFolder,
    branches: Iterable[Branch],
    diverged_above: float | None = None,
    keeps_stopped: bool = False,
    made_by: Callable[[StageSpec], Mapping[str, str]] | None = None,
    base: "BaseRun | None" = None,
) -> StoredStages:
    """Read the checkpoints and results of a sweep's stages.

    An interrupted stage continues in its own folder. Other stages may start from its checkpoints
    only if the tree of `branches` no longer has this stage. If the folder of a stage is lost, it
    runs again, and then those after it find their results.

    Args:
        sweep: Folder of the sweep.
        branches: The trials.
        diverged_above: `sweep.diverged_above`. Stages that diverged by another limit may run again.
        keeps_stopped: True if stages that a scheduler stopped may not run again.
        made_by: Returns the present device and code that would train a stage.
        base: The run that the sweep branches off, if there is one.
    """
    found = StoredStages()
    wanted = {stage.id for stage in grow(branches)}
    for folder in sweep.stages():
        spec = read_spec(folder, base)
        if spec is None or not has_whole_curve(spec, base):
            continue
        now = made_by(spec) if made_by is not None else {}
        if any(spec.made_by.get(key) != value for key, value in now.items()):
            changed = [key for key in now if spec.made_by.get(key) != now[key]]
            found.made_by_others.append(changed if spec.made_by else [])
            continue
        result = read_result(folder)
        if result is not None:
            if result.outcome == DIVERGED and result.limit not in (None, diverged_above):
                continue
            if result.outcome == STOPPED and not keeps_stopped:
                continue
            found.results[result.key] = result
            found.folders[result.key] = folder
        is_done = result is not None and result.outcome == DONE
        if is_done or (result is None and spec.id not in wanted):
            for step, key in spec.keys(folder.checkpoint_steps()).items():
                found.states[key] = StoredState(folder.path, step)
        if is_done and result is not None and result.key in found.states:
            found.ends.add(result.key)
    return found


def checkpoint_bytes(sweep: SweepFolder) -> int:
    """Return the size of all checkpoints of a sweep."""
    total = 0
    for folder in sweep.stages():
        for file in folder.checkpoints.glob("*/*"):
            # Running stages rename and remove files at the same time.
            with contextlib.suppress(OSError):
                total += file.stat().st_size
    return total


# ---- removal ----


def remove_unneeded(progress: "Progress") -> None:
    """Remove checkpoints of judged probes and, without `keep_branches`, those of branch points.

    Checkpoints from which a stage will start, and results of trials, stay.
    """
    judged_probes: set[str] = set() if progress.states.on_hold else progress.probes
    if _keeps_branches(progress) and not judged_probes:
        return
    needed = {progress.stored.states.get(key) for key in progress.states.needed()}
    for folder in progress.folder.stages():
        if _keeps_checkpoints(progress, folder, judged_probes):
            continue
        for step in folder.checkpoint_steps():
            state = StoredState(folder.path, step)
            if state not in needed:
                checkpoint.remove(state.checkpoint)
                progress.stored.forget(state)


def _keeps_branches(progress: "Progress") -> bool:
    # Later samples of optuna may branch off anywhere.
    return progress.settings.keep_branches or progress.settings.sampler == "optuna"


def _keeps_checkpoints(progress: "Progress", folder: RunFolder, judged_probes: set[str]) -> bool:
    stage = progress.tree.by_id.get(folder.name)
    if stage is not None:
        if progress.states.by_stage[stage.id] in (WAITING, RUNNING, FAILED):
            return True
        if judged_probes.issuperset(stage.trials):
            return False
    if _keeps_branches(progress):
        return True
    result = read_result(folder)
    return result is not None and result.is_whole
