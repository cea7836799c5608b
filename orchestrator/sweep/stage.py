"""One stage of a sweep, trained in its folder `stages/<id>/`. No Ray here.

    stage.json     what to train (`StageSpec`)
    metrics.jsonl, checkpoints/, samples/    as in the folder of a run, only for these steps
    stopped.json   the stage stopped on request; it continues from the checkpoint that it wrote
    result.json    how the stage ended (`StageResult`); written last

A stage resumes from its own last checkpoint after any interruption, like a run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import folders
from orchestrator.checkpoint import store as checkpoint
from orchestrator.code_hashes import module_hashes
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UnreadableError, UserError
from orchestrator.runs import journal, lock
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Line
from orchestrator.sweep.records import StageResult, StageSpec, lines_until, read_result, read_spec
from orchestrator.sweep.states import DIVERGED, DONE, STOPPED, State
from orchestrator.workers.marks import HELD

if TYPE_CHECKING:
    from orchestrator.train.numerics import Worker


def run_stage(
    folder: RunFolder, worker: Worker, stop_requested: Callable[[], bool] | None = None
) -> Iterator[Line]:
    """Train the stage of a folder to its end, watched for hangs. Yield each line of its journal.

    Every worker calls this function and yields the same lines. With several workers,
    torch.distributed must be initialized. A stage that has its result yields no line. A stage
    that stops on request, or raises, has no result and can be continued.

    Args:
        folder: The stage.
        worker: Rank, world size and device of this process.
        stop_requested: As for the trainer of a run.
    """
    # The driver imports this module, too, and needs no torch.
    from orchestrator.train.loop import Trainer
    from orchestrator.train.numerics import fingerprint
    from orchestrator.workers.watchdog import Watchdog

    spec = read_spec(folder)
    assert spec is not None, f"{folder.path} has no stage.json"
    experiment = spec.parsed_experiment()
    if has_result(folder, spec, experiment):
        return
    _refuse_other_code(spec, experiment)
    started = time.monotonic()
    watchdog = Watchdog(folder, worker, experiment.compute.hang_after_s)
    with folders.holding(folder.path), _sole_writer(folder, worker), watchdog:
        if worker.is_main:
            begin_folder(folder, spec)
        trainer = Trainer(
            experiment,
            folder,
            Path(spec.data_dir),
            worker,
            parent=Path(spec.begin) if spec.begin is not None else None,
            end_step=spec.stop,
            steps=spec.settings,
            stop_requested=stop_requested,
            report_phase=watchdog.report_phase,
        )
        first_step = trainer.state.step
        line_above: Line | None = None
        for line in trainer.run():
            # Tune may let this process wait here between two evaluations.
            watchdog.report_phase(HELD, trainer.state.step)
            yield line
            if _is_above_limit(line, spec, experiment):
                line_above = line
                break
        if worker.is_main:
            attempt = _Attempt(
                trainer.state.step,
                time.monotonic() - started,
                trainer.state.step - first_step,
                fingerprint(experiment, worker),
            )
            _record_end(folder, spec, experiment, attempt, line_above)


def _refuse_other_code(spec: StageSpec, experiment: Experiment) -> None:
    """Refuse a stage if this process has other code than the driver, whose key it would get.

    Raises:
        UserError: Files were edited after the sweep had started.
    """
    now = module_hashes(experiment.model.kind, experiment.optim.kind)
    changed = [name for name, value in now.items() if spec.made_by.get(name, value) != value]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: edited after the sweep had started; run the same command again"
        )


def _sole_writer(
    folder: RunFolder, worker: Worker
) -> contextlib.AbstractContextManager[str | None]:
    """Wait until no worker of an earlier driver writes in the folder: workers may outlive it."""
    if not worker.is_main:
        return contextlib.nullcontext()
    return lock.held(folder.writer_lock, lock.WRITER_WAIT_S)


def begin_folder(folder: RunFolder, spec: StageSpec) -> None:
    """Remove how an earlier attempt ended; write the line of a stage without steps."""
    folder.ending_file.unlink(missing_ok=True)
    folder.result_file.unlink(missing_ok=True)
    if spec.start < spec.stop or spec.parent is None or journal.read(folder):
        return
    # The stage has no steps: a trial ends at the state of another folder. Copy the line of this
    # step, to which the trainer adds the metrics of the end.
    for line in lines_until(RunFolder(spec.parent), spec.stop):
        if line["step"] == spec.stop:
            journal.Journal(folder).write(line)


def _is_above_limit(line: Line, spec: StageSpec, experiment: Experiment) -> bool:
    """Return whether a stage diverged by the loss of a line."""
    if spec.diverged_above is None or line.get("train/loss", 0.0) <= spec.diverged_above:
        return False
    # At the end of a trial, the log window may be shorter than that of a longer trial. Such a line
    # is not compared.
    return line["step"] % (experiment.train.log_interval or spec.stop) == 0


# ---- how a stage ends ----


@dataclass(frozen=True)
class _Attempt:
    """What one attempt at a stage did: its last step, its cost, and the numerics."""

    step: int
    seconds: float
    steps_run: int
    numerics: dict[str, Any] | None = None


def _record_end(
    folder: RunFolder,
    spec: StageSpec,
    experiment: Experiment,
    attempt: _Attempt,
    line_above: Line | None,
) -> None:
    """Write result.json; if the stage was asked to stop, add the cost to stopped.json instead."""
    ending = folder.read_ending()
    if ending is not None and ending.kind == "again":
        cost = {"seconds": attempt.seconds, "steps_run": attempt.steps_run}
        folder.write_ending(replace(ending, facts={**ending.facts, **cost}))
        return
    if ending is not None:  # facts["step"] is the last step before a value was not finite
        result = _result(spec, attempt, DIVERGED, ending.facts["step"] + 1, reason=ending.reason)
    elif line_above is not None:
        step = line_above["step"]
        limit = spec.diverged_above
        reason = (
            f"step {step}: train/loss {line_above['train/loss']:.4f} is above "
            f"sweep.diverged_above={limit:g}"
        )
        result = _result(spec, attempt, DIVERGED, step, reason=reason, limit=limit)
    else:
        result = _result(spec, attempt, DONE, spec.stop, **_end_of_trial(folder, spec, experiment))
    result.write(folder)


def _end_of_trial(folder: RunFolder, spec: StageSpec, experiment: Experiment) -> dict[str, Any]:
    """Return the hash of the weights if a trial ends here, else keep only the last checkpoint."""
    if spec.stop < experiment.train.max_steps:
        checkpoint.keep_only(folder.checkpoints, spec.stop)
        return {}
    weights = checkpoint.load_tensors(folder.checkpoint(spec.stop), "model")
    return {"is_whole": True, "weights_sha256": checkpoint.weights_sha256(weights)}


def write_stopped(folder: RunFolder, reason: str) -> StageResult:
    """Write the result of a stage that a scheduler ended at its last line."""
    spec = read_spec(folder)
    assert spec is not None
    last = journal.last(folder)
    step = spec.start if last is None else last["step"]
    attempt = _Attempt(step, 0.0, step - spec.start)
    result = _result(spec, attempt, STOPPED, spec.stop, reason=f"{reason} after step {step}")
    result.write(folder)
    return result


def _result(
    spec: StageSpec, attempt: _Attempt, outcome: State, step: int, **more: Any
) -> StageResult:
    return StageResult(
        id=spec.id,
        start=spec.start,
        stop=spec.stop,
        step=step,
        outcome=outcome,
        key=spec.key(step),
        seconds=attempt.seconds,
        steps_run=attempt.steps_run,
        numerics=attempt.numerics,
        **more,
    )


def has_result(folder: RunFolder, spec: StageSpec, experiment: Experiment) -> bool:
    """Return whether the result of a stage is complete, so that it need not run.

    A stage that is done runs again if a trial ends with it now, or if its last checkpoint is
    missing or damaged. A stage that diverged runs again if `sweep.diverged_above` has changed.
    """
    result = read_result(folder)
    if result is None or result.outcome == STOPPED:
        return False
    if result.outcome == DIVERGED:
        return result.limit is None or result.limit == spec.diverged_above
    if not result.is_whole and spec.stop == experiment.train.max_steps:
        return False
    try:
        checkpoint.verify(folder.checkpoint(spec.stop))
    except UnreadableError:
        raise
    except UserError:
        return False
    return True
