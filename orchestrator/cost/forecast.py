"""The estimate of a lone run: from an earlier measurement, or else from its own first steps.

Nothing is measured before the run, which would have to wait for it.
"""

import time

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment
from orchestrator.cost import cache
from orchestrator.cost.correct import Correction
from orchestrator.cost.estimate import expected_line
from orchestrator.cost.timing import Estimate, disk, evaluations, state_bytes
from orchestrator.cost.tokens import TokenCounts
from orchestrator.data.dataset import Manifest
from orchestrator.runs.facts import model_facts
from orchestrator.runs.journal import Line
from orchestrator.runs.metrics import peak_memory_gib

LEAST_S = 3.0  # seconds of steps that are needed to tell their pace
END_S = 1.0  # from the last step to the end: its checkpoint, and the last lines to MLflow


class RunForecast(Correction):
    """Estimates the time of a run from step 0, whose journal lines it reads, and corrects it once.

    Args:
        experiment: The run.
        state_bytes: Size of its checkpoints.
        estimate: Estimate from an earlier measurement; None: the first steps tell.

    Attributes:
        estimate: Expected time, memory and disk; None as long as they are unknown.
    """

    def __init__(self, experiment: Experiment, state_bytes: int, estimate: Estimate | None) -> None:
        super().__init__(None if estimate is None else estimate["time_s"])
        self.experiment = experiment
        self.state_bytes = state_bytes
        self.estimate = estimate
        self._began = time.monotonic()
        self._first_step = 0  # of the first line since the last start of the workers
        self._step = 0
        self._steps_s = 0.0  # of the steps after `_first_step`
        self._evaluation_s = 0.0

    def comment(self, line: Line) -> str | None:
        """Return a line for the user: the estimate or its correction; None if neither is due."""
        step = line["step"]
        step_s = line.get("perf/step_time_s")
        if step <= self._step:
            self._first_step = self._step = 0  # the workers have started again
        if step_s is None:
            return None
        seen_s = step_s
        if self._first_step == 0:
            self._first_step = step
            self._steps_s = 0.0
            if line["run/attempt"] == 1:
                # With the warm-up, which later lines leave out.
                seen_s = step * step_s
                others_s = seen_s / line["run/goodput"] - seen_s
                self._evaluation_s = others_s / max(1, evaluations(self.experiment, 0, step))
        else:
            self._steps_s += (step - self._step) * step_s
            step_s = self._steps_s / (step - self._first_step)
            seen_s = self._steps_s
        self._step = step
        elapsed_s = time.monotonic() - self._began
        left_s = (self.experiment.train.max_steps - step) * step_s
        left_s += evaluations(self.experiment, step) * self._evaluation_s + END_S
        if self.planned_s is not None:
            return self.line(self._steps_s, elapsed_s, left_s)
        if seen_s < LEAST_S:
            return None
        self.planned_s = elapsed_s + left_s
        self.estimate = {
            "time_s": self.planned_s,
            "memory_gib": self._memory_gib(line),
            **disk(self.experiment, self.state_bytes),
        }
        return f"expected: {expected_line(self.estimate)}"

    def _memory_gib(self, line: Line) -> float:
        """Return the memory so far and, on a CPU, that of the copy that becomes a checkpoint."""
        copy = self.state_bytes / 2**30 if "memory/max_resident_gib" in line else 0.0
        return (peak_memory_gib([line]) or 0.0) + copy


def forecast_of(experiment: Experiment, dataset: Manifest, layout: Layout) -> RunForecast:
    """Return the forecast of a run that starts now; print its estimate if that is known."""
    n_vocab = dataset.tokenizer["n_vocab"]
    timing = cache.read(experiment, n_vocab, layout)
    estimate = None
    if timing is not None:
        estimate = TokenCounts.of(dataset).expected(experiment, timing)
        print(f"expected: {expected_line(estimate)}", flush=True)
    facts = model_facts(experiment, n_vocab)
    return RunForecast(experiment, state_bytes(experiment, facts), estimate)
