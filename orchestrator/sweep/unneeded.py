"""Removes checkpoints that a running sweep does not need any more."""

from typing import TYPE_CHECKING

from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep.records import read_result
from orchestrator.sweep.states import FAILED, RUNNING, WAITING
from orchestrator.sweep.stored import StoredState

if TYPE_CHECKING:
    from orchestrator.sweep.progress import Progress


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
