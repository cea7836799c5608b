"""Which steps have a log line, an evaluation or a checkpoint, and what the end of a run adds.

The end of a run may move: `train.max_steps` may grow after a run has ended, and a trial of a sweep
may branch off at the end of another trial. The result must equal that of a run without that end:

1. The last line of a run has a training loss and an evaluation, also if no interval requires them.
   Measuring them leaves the log window and the best loss of the state as they were.
2. When the run goes on, metrics that only its end required leave the line (`rewind_journal`).
3. If a step is trained before it is known to be the last one, its line lacks these metrics. The
   next start adds them (`read_last_line`, `Trainer._complete_last_line`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.config.sections import Train
from orchestrator.runs import journal, metrics
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal, Line

if TYPE_CHECKING:
    from orchestrator.train.numerics import Worker
    from orchestrator.train.state import TrainState


@dataclass(frozen=True)
class Due:
    """What is required after a step.

    Attributes:
        log, evaluate, checkpoint: The interval in the `train` section requires it.
        end_of_run: This is the last step of the run, not only of a stage.
    """

    log: bool
    evaluate: bool
    checkpoint: bool
    end_of_run: bool

    @classmethod
    def after(cls, step: int, end_step: int, config: Train) -> Due:
        """Return what is due after `step` updates. After 0 updates, only an evaluation can be due.

        Args:
            step: Number of updates that are done.
            end_step: Last step that this process trains.
            config: Section `train`.
        """
        return cls(
            log=step > 0 and _is_multiple(step, config.log_interval),
            evaluate=_is_multiple(step, config.eval_interval),
            checkpoint=step > 0 and _is_multiple(step, config.checkpoint_interval),
            end_of_run=step == end_step == config.max_steps,
        )

    @property
    def line(self) -> bool:
        """Whether the step has a journal line."""
        return self.log or self.evaluate or self.end_of_run


def _is_multiple(step: int, interval: int | None) -> bool:
    """Return whether an action with this interval is due; with None it never is."""
    return interval is not None and step % interval == 0


def rewind_journal(lines: Journal, state: TrainState, config: Train, end_step: int) -> None:
    """Move the lines that this process will write again out of the journal.

    Args:
        lines: Journal of the run.
        state: State that training starts from.
        config: Section `train` of this start, which may have other intervals than the last one.
        end_step: Last step that this process trains.
    """
    step = state.step
    if step == 0 or state.line_due:
        lines.rewind(step - 1)  # the line of `step` is not written yet, or is written again
    elif Due.after(step, end_step, config).end_of_run:
        lines.rewind(step)
    else:
        # If the run ended at this step before, its line has metrics that only the end required.
        lines.rewind(
            step,
            lambda line: by_interval(line, config.log_interval, config.eval_interval),
        )


def by_interval(line: Line, log_interval: int | None, eval_interval: int | None) -> Line | None:
    """Remove the metrics that only the last step of a run logs; None if no metric remains.

    Args:
        line: A line that was perhaps written at the end of a run.
        log_interval: `train.log_interval` of the run.
        eval_interval: `train.eval_interval` of the run.
    """
    intervals = {"log": log_interval, "eval": eval_interval}
    due = {name for name, every in intervals.items() if every and line["step"] % every == 0}
    kept = {
        name: value
        for name, value in line.items()
        if name not in ("step", "timestamp") and metrics.of(name).interval in due
    }
    if not kept:
        return None
    return {"step": line["step"], "timestamp": line["timestamp"], **kept}


@dataclass(frozen=True)
class LastLine:
    """The journal line of the last step.

    Attributes:
        metrics: What the journal has; empty on other ranks than 0.
        needs_log: The training loss is missing. The same on all ranks.
        needs_evaluation: The val loss is missing. The same on all ranks.
    """

    metrics: dict[str, float]
    needs_log: bool
    needs_evaluation: bool


def read_last_line(folder: RunFolder, step: int, worker: Worker) -> LastLine:
    """Return what the journal has for the last step.

    All ranks call this function: only rank 0 reads the journal, but all take part in the
    evaluation.
    """
    from orchestrator.train.numerics import agree

    metrics: dict[str, float] = {}
    if worker.is_main:
        lines = journal.read(folder)
        if lines and lines[-1]["step"] == step:
            metrics = {k: v for k, v in lines[-1].items() if k not in ("step", "timestamp")}
    return LastLine(
        metrics,
        needs_log=bool(agree(int("train/loss" not in metrics), worker)),
        needs_evaluation=bool(agree(int("val/loss" not in metrics), worker)),
    )
