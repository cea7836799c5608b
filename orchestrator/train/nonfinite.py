"""What happens to a step whose loss or gradient is not finite: one verdict, the same on every worker.

Eats a step's reduced gradient, which every worker has to the bit; yields what to do with its update, and where the text
lies that it came from: in `stopped.json` where the run ends by it, as an event where it goes on without it.
"""

import math
from pathlib import Path

from orchestrator.config.experiment import Train
from orchestrator.data.batches import Batches
from orchestrator.runs import events
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.train.state import TrainState
from orchestrator.train.step import Gradient

APPLY, SKIP, STOP = "apply", "skip", "stop"
PATIENCE = 10  # updates in a row that may be left out: then it is not the text
SCALED_PATIENCE = 100  # of a float16 scaler, which halves its scale each time: by then none is left


class Guard:
    """Judges every step of a run; only the worker that `writes` leaves words."""

    def __init__(self, run_dir: Path, train: Train, batches: Batches, writes: bool):
        self.run_dir, self.train, self.batches, self.writes = run_dir, train, batches, writes

    def judge(self, s: TrainState, gradient: Gradient) -> str:
        """APPLY, SKIP or STOP for the update of `s` by `gradient`.

        A float16 scaler learns its scale by infinite gradients, and skips those by itself.
        """
        bad = [m for m, loss in enumerate(gradient.losses) if not math.isfinite(loss)]
        if not bad and math.isfinite(gradient.norm):
            s.nonfinite_in_a_row = 0
            return APPLY
        s.nonfinite_in_a_row += 1
        if not bad and s.scaler.is_enabled() and s.nonfinite_in_a_row <= SCALED_PATIENCE:
            return APPLY
        skips = self.train.on_nonfinite == "skip" and s.nonfinite_in_a_row <= PATIENCE
        if self.writes:
            self._leave_word(s.step, bad, skips, s.nonfinite_in_a_row > PATIENCE)
        return SKIP if skips else STOP

    def _leave_word(self, step: int, bad: list[int], skips: bool, lost: bool) -> None:
        size, offsets = self.train.micro_batch_size, self.batches.offsets(step)
        blamed = bad or range(self.train.global_batch_size // size)
        windows = {m: [int(o) for o in offsets[m * size : (m + 1) * size]] for m in blamed}
        again = f", as were the {PATIENCE} before it" if lost else ""
        what = "loss" if bad else "gradient norm"
        message = (
            f"step {step + 1}: the {what} is not finite; the update was not applied{again}. Micro-batches and the "
            f"offsets of their windows in train: {windows}. Lower schedule.max_lr or look at that text"
        )
        facts = {"step": step, "windows": windows}
        if skips:
            events.note(self.run_dir, "nonfinite", message, **facts)
            return
        hint = "" if again else "; train.on_nonfinite=skip goes on without it"
        RunFolder(self.run_dir).write_ending(Ending("diverged", f"{message}{hint}.", facts))
