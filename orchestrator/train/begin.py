"""Builds the first state: from a checkpoint of the run or of its parent, or with new weights."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint import store
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UnreadableError, UserError
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train import numerics
from orchestrator.train.init_from import initial_model
from orchestrator.train.numerics import Worker, agree
from orchestrator.train.state import TrainState, build, restore


@dataclass(frozen=True)
class Begin:
    """State at the start of training.

    Attributes:
        state: The state; the same on all ranks.
        is_own: It was read from a checkpoint in the folder of this run.
    """

    state: TrainState
    is_own: bool


def begin(
    experiment: Experiment,
    folder: RunFolder,
    n_vocab: int,
    worker: Worker,
    parent: Path | None = None,
) -> Begin:
    """Build the state that training starts from.

    Damaged checkpoints in `folder` are skipped: rank 0 renames them and records an event.

    Args:
        experiment: The configuration.
        folder: Folder of the run. Its newest valid checkpoint is used.
        n_vocab: Number of tokens of the tokenizer.
        worker: This process. All ranks must call this function.
        parent: Checkpoint to start from if `folder` has none. None: new weights, as
            `train.init_from` says.

    Raises:
        UserError: `parent` is damaged, or a resumed run would not give the same bits as before and
            `train.allow_drift` is false.
    """
    own_step = agree(_newest_step(folder) if worker.is_main else 0, worker)
    is_own = own_step > 0
    path = folder.checkpoint(own_step) if is_own else parent
    if path is None:
        model = initial_model(experiment, n_vocab)
        return Begin(build(experiment, model, worker), is_own=False)
    if not is_own:
        store.verify(path)
    elif not worker.is_main:
        _verify_as_rank_0_did(path)
    state = restore(experiment, path, worker)
    if is_own:
        _check_numerics(experiment, folder, path, worker, state.step)
    return Begin(state, is_own)


def _newest_step(folder: RunFolder) -> int:
    """Return the step of the newest valid checkpoint; 0 if there is none. Only for rank 0."""

    def skip(message: str) -> None:
        print(message, flush=True)
        events.note(folder, "checkpoint_damaged", message)

    try:
        path = store.latest_valid(folder.checkpoints, skip, set_aside=True)
    except UnreadableError as error:
        # Not a UserError: Ray starts the workers again, and then the file may be readable.
        raise RuntimeError(str(error)) from error
    if path is None:
        return 0
    return store.read_manifest(path)["step"]


def _verify_as_rank_0_did(path: Path) -> None:
    """Verify on this machine what rank 0 found valid. A difference is not a UserError."""
    try:
        store.verify(path)
    except UserError as error:
        raise RuntimeError(
            f"rank 0 could read this checkpoint, and this worker cannot: {error}"
        ) from error


def _check_numerics(
    experiment: Experiment, folder: RunFolder, path: Path, worker: Worker, step: int
) -> None:
    """Refuse a start that would change the bits, or record an event if `train.allow_drift`."""
    before = store.read_manifest(path)["fingerprints"]["numerics"]
    now = numerics.fingerprint(experiment, worker)
    differences = numerics.refuse_drift(before, now, experiment, folder.path)
    if not worker.is_main:
        return
    for difference in differences:
        message = f"results will differ in their last bits from an uninterrupted run: {difference}"
        events.note(folder, "drift", message, step=step)
