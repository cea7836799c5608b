"""Decides what happens to a step whose loss or gradient is not finite.

All ranks decide the same, because their gradients have the same bits.
"""

import math
from typing import Any, Literal

from orchestrator.config.sections import Train
from orchestrator.data.batches import Batches, check_unchanged
from orchestrator.runs import events
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.train.state import TrainState
from orchestrator.train.step import Gradient

Verdict = Literal["apply", "skip", "stop"]
APPLY: Verdict = "apply"
SKIP: Verdict = "skip"
STOP: Verdict = "stop"

# Skipped updates in a row after which the run ends: the cause is then not one bad batch.
PATIENCE = 10
# The same with a float16 scaler, which halves its scale each time: after 100 halvings, the scale is
# not the cause.
SCALER_PATIENCE = 100


class Guard:
    """Decides about the update of each step of a run.

    Args:
        folder: Folder of the run.
        config: Section `train`.
        batches: Micro-batches of the run, for the positions of their samples.
        is_writer: Whether this rank records events and how the run ended.
    """

    def __init__(self, folder: RunFolder, config: Train, batches: Batches, is_writer: bool) -> None:
        self.folder = folder
        self.config = config
        self.batches = batches
        self.is_writer = is_writer

    def judge(self, state: TrainState, gradient: Gradient) -> Verdict:
        """Return what to do with the update; `train.on_nonfinite` chooses between SKIP and STOP.

        APPLY is also returned for an infinite gradient with a float16 scaler: the scaler skips
        the update itself and lowers its scale.

        Raises:
            UserError: A token shard was changed, which may be the cause.
        """
        bad = [m for m, loss in enumerate(gradient.losses) if not math.isfinite(loss)]
        if not bad and math.isfinite(gradient.norm):
            state.nonfinite_in_a_row = 0
            return APPLY
        state.nonfinite_in_a_row += 1
        if not bad and state.scaler.is_enabled() and state.nonfinite_in_a_row <= SCALER_PATIENCE:
            return APPLY
        check_unchanged([self.batches.stream])
        is_patient = state.nonfinite_in_a_row <= PATIENCE
        verdict = SKIP if is_patient and self.config.on_nonfinite == "skip" else STOP
        if self.is_writer:
            self._record(state.step, bad, verdict, is_patient)
        return verdict

    def accept_end(self, state: TrainState, val_loss: float | None) -> bool:
        """Return whether a run may end with these weights: they and its last val loss are finite.

        No later step would show that the last update made the weights too large. If it did, the
        end of the run is recorded.
        """
        is_finite = all(bool(p.isfinite().all()) for p in state.model.parameters())
        if is_finite and math.isfinite(val_loss or 0.0):
            return True
        what = f"val/loss is {val_loss}" if is_finite else "the weights are not finite"
        message = f"step {state.step}: {what} after the last update. Lower schedule.max_lr."
        if self.is_writer:
            self.folder.write_ending(Ending("diverged", message, {"step": state.step - 1}))
        return False

    def _record(self, step: int, bad: list[int], verdict: Verdict, is_patient: bool) -> None:
        """Record an event or the end of the run, with the samples to look at.

        Args:
            step: Number of updates before this one.
            bad: Micro-batches whose loss is not finite. Empty: only the gradient norm is not
                finite, and each micro-batch of the step may be the cause.
            verdict: SKIP or STOP.
            is_patient: False after more than `PATIENCE` steps in a row.
        """
        windows = self._windows(step, bad)
        message = (
            f"step {step + 1}: the {'loss' if bad else 'gradient norm'} is not finite; the update "
            "was not applied"
        )
        if not is_patient:
            message += f", as were the {PATIENCE} before it"
        message += (
            f". Micro-batches and the offsets of their windows in train: {windows}. "
            "Lower schedule.max_lr or look at that text"
        )
        facts: dict[str, Any] = {"step": step, "windows": windows}
        if verdict == SKIP:
            events.note(self.folder, "nonfinite", message, **facts)
            return
        if is_patient:
            message += "; train.on_nonfinite=skip continues without it"
        self.folder.write_ending(Ending("diverged", f"{message}.", facts))

    def _windows(self, step: int, bad: list[int]) -> dict[int, list[int]]:
        """Return the offsets of the samples of each suspect micro-batch in the train split."""
        size = self.config.micro_batch_size
        suspects = bad or range(self.batches.micro_batches(step))
        offsets = self.batches.offsets(step)
        return {m: offsets[m * size : (m + 1) * size].tolist() for m in suspects}
