"""Finds the trained model that a word means: a run, a checkpoint, or a GPT-2 of Hugging Face.

Nothing here imports torch, so that a command can refuse a wrong word before it does.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from model.gpt_config import GPT2_SIZES
from orchestrator.checkpoint import store
from orchestrator.errors import UserError
from orchestrator.mirror import remote
from orchestrator.paths import expand_home
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import find_run, refuse_sweep, run_places


def is_gpt2(word: str) -> bool:
    """Return whether `word` names weights of Hugging Face, and not a run or checkpoint of ours."""
    if (expand_home(word) / "config.json").is_file():
        return True
    return word in GPT2_SIZES and not any(place.path.exists() for place in run_places(word))


def require(
    word: str, is_wanted: Callable[[RunFolder], bool], given_in: str = "RUN_OR_CHECKPOINT"
) -> None:
    """Refuse a word for `find_run` that names nothing. An address is looked up later."""
    if remote.address_of(word, given_in) is None:
        find_run(word, is_wanted)


def is_model(folder: RunFolder) -> bool:
    """Return whether this is a checkpoint, or a run for which `has_checkpoint` is true."""
    return _is_checkpoint(folder) or has_checkpoint(folder)


def has_checkpoint(folder: RunFolder) -> bool:
    """Return whether this is a run with a checkpoint; False if it is no run.

    Raises:
        UserError: It is a run without a checkpoint, or a sweep.
    """
    refuse_sweep(folder)
    if folder.checkpoint_steps():
        return True
    traces = (folder.run_file, folder.journal_file, folder.checkpoints)
    if _is_checkpoint(folder) or not any(path.exists() for path in traces):
        return False
    problem = "has no checkpoint yet; continue it until its first one (train.checkpoint_interval)"
    if folder.checkpointed_file.exists():
        problem = "has lost its checkpoints; restore them"
    raise UserError(f"{folder.path}: this run {problem}")


def _is_checkpoint(folder: RunFolder) -> bool:
    return (folder.path / store.MANIFEST).is_file()


def find_checkpoint(word: str, *, best: bool = False, data: bool = False) -> Path:
    """Return a verified checkpoint.

    Args:
        word: Folder of a checkpoint, folder of a run, or name of a run in the storage. For a run it
            is the newest valid checkpoint; damaged ones are skipped with a message. All of them
            may be addresses in a mirror.
        best: For a run, take the checkpoint with the lowest val loss instead.
        data: Copy the datasets of a mirrored run too.

    Raises:
        UserError: None was found, or it is damaged.
    """
    folder = find_run(
        remote.here(word, checkpoints="all" if best else "newest", data=data), is_model
    )
    if not best:
        return checkpoint_of(folder.path, _warn)
    if not folder.checkpoints.is_dir():
        raise UserError(
            f"--best: {word} is one checkpoint; give the run's folder to choose among its "
            "checkpoints"
        )
    step = store.best(folder.checkpoints)
    if step is None:
        raise UserError(
            f"--best: no checkpoint in {folder.checkpoints} has a val loss (train.eval_interval "
            "was off)"
        )
    store.verify(folder.checkpoint(step))
    return folder.checkpoint(step)


def _warn(line: str) -> None:
    """Print to stderr: stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def checkpoint_of(path: Path, warn: Callable[[str], None] = print) -> Path:
    """Return a verified checkpoint: `path` itself, or the newest valid one of a run's folder.

    Args:
        path: The folder.
        warn: Called with a message for each damaged checkpoint that is skipped.

    Raises:
        UserError: There is none, or `path` is a damaged checkpoint.
    """
    if _is_checkpoint(RunFolder(path)):
        store.verify(path)
        return path
    found = store.latest_valid(RunFolder(path).checkpoints, warn)
    if found is None:
        raise UserError(
            f"{path}: neither a checkpoint nor a run with a usable one; give <storage>/<name> or a "
            "folder step-… in its checkpoints/"
        )
    return found
