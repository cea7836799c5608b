"""Where a run begins: from its own latest valid checkpoint, from another one, or from first weights; on all workers alike.

Eats a run's folder and the checkpoint that it may branch off; yields the state, on every worker the same. What stands in the
way of the same bits is refused, or noted where the user allowed it.
"""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UnreadableError, UserError
from orchestrator.runs import events
from orchestrator.train import numerics, state
from orchestrator.train.init_from import initial_model
from orchestrator.train.numerics import Worker, agree


@dataclass(frozen=True)
class Begin:
    """`is_restored`: from a checkpoint; `is_own`: from one of this very folder."""

    state: state.TrainState
    is_restored: bool
    is_own: bool


def begin(
    experiment: Experiment, run_dir: Path, n_vocab: int, worker: Worker, parent: Path | None = None
) -> Begin:
    """The state to go on with; damaged checkpoints of the folder are set aside, and noted.

    Args:
        parent: the checkpoint to begin from where the folder has none of its own; None: the experiment's first weights.

    Raises:
        UserError: `parent` is damaged, or the last bits would be others and `train.allow_drift` is not set.
    """
    folder = run_dir / "checkpoints"
    step = agree(_latest(folder, run_dir) if worker.is_main else 0, worker)
    is_own = step >= 0
    path = checkpoint.path_of(folder, step) if is_own else parent
    if path is None:
        return Begin(
            state.build(experiment, initial_model(experiment, n_vocab), worker), False, False
        )
    if not is_own:
        checkpoint.verify(path)
    elif not worker.is_main:
        _verify_again(path)
    s = state.build(experiment, state.load_model(path), worker)
    state.restore(s, path)
    if is_own:
        _compare_numerics(experiment, run_dir, path, s.step, worker)
    return Begin(s, True, is_own)


def _latest(folder: Path, run_dir: Path) -> int:
    """Step of the latest valid checkpoint, -1 where there is none; for rank 0, which alone writes there."""

    def passed_over(message: str) -> None:
        print(message, flush=True)
        events.note(run_dir, "checkpoint_damaged", message)

    try:
        found = checkpoint.latest_valid(folder, passed_over, set_aside=True)
    except (
        UnreadableError
    ) as error:  # no mistake of the user's, and the next attempt may find it readable
        raise RuntimeError(str(error)) from error
    return int(found.name.removeprefix("step-")) if found else -1


def _verify_again(path: Path) -> None:
    """What rank 0 has verified, as this machine sees it: where that differs, it is no mistake of the user's."""
    try:
        checkpoint.verify(path)
    except UserError as error:
        raise RuntimeError(
            f"rank 0 could read this checkpoint, and this worker cannot: {error}"
        ) from error


def _compare_numerics(
    experiment: Experiment, run_dir: Path, path: Path, step: int, worker: Worker
) -> None:
    before = checkpoint.read_manifest(path)["fingerprints"]["numerics"]
    lines = numerics.check(before, numerics.fingerprint(experiment, worker), experiment, run_dir)
    for line in lines if worker.is_main else ():
        events.note(
            run_dir,
            "drift",
            f"the last bits will differ from those of a run never stopped: {line}",
            step=step,
        )
