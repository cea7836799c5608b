"""The estimate of a lone run: from an earlier measurement, or else from its own first steps.

Nothing is measured before the run, which would have to wait for it.
"""

import time

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment
from orchestrator.cost import cache
from orchestrator.cost.correct import DUE_S, Correction
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
    """Estimates the time of a run from step 0, whose journal lines it reads, and corrects it twice.

    Args:
        experiment: The run.
        state_bytes: Size of its checkpoints.
        estimate: Estimate from an earlier measurement; None: the first steps tell.
        num_workers: Workers, of which each copies a part of a checkpoint.

    Attributes:
        estimate: Expected time, memory and disk; None as long as they are unknown.
    """

    def __init__(
        self,
        experiment: Experiment,
        state_bytes: int,
        estimate: Estimate | None,
        num_workers: int = 1,
    ) -> None:
        super().__init__(None if estimate is None else estimate["time_s"])
        self.experiment = experiment
        self.state_bytes = state_bytes
        self.estimate = estimate
        self.num_workers = num_workers
        self._began = time.monotonic()
        self._first: int | None = None  # step of the first line since the workers started
        self._step = 0
        self._first_s = 0.0  # of the steps until `_first`
        self._steps_s = 0.0  # of those after it
        self._others_s = 0.0  # until `_first`, not in steps
        self._evaluation_s = 0.0

    def comment(self, line: Line) -> str | None:
        """Return a line for the user: the estimate or its correction; None if neither is due."""
        pace_s = self._pace(line)
        sizes = self.experiment.batch_sizes
        left = sizes.before(self.experiment.train.max_steps) - sizes.before(self._step)
        if pace_s is None or left == 0:
            return None
        elapsed_s = time.monotonic() - self._began
        left_s = left * pace_s + END_S
        left_s += evaluations(self.experiment, self._step) * self._evaluation_s
        if self.planned_s is not None:
            return self.line(self._steps_s, elapsed_s, left_s)
        if self._steps_s < LEAST_S:
            return None
        self._due = DUE_S[1:]
        self.planned_s = elapsed_s + left_s
        self.estimate = {
            "time_s": self.planned_s,
            "share_over": elapsed_s / self.planned_s,
            "memory_gib": self._memory_gib(line),
            **disk(self.experiment, self.state_bytes),
        }
        return f"expected: {expected_line(self.estimate)}"

    def _pace(self, line: Line) -> float | None:
        """Return the seconds per sequence so far, or None if they are unknown.

        The steps of the first line do not count: the first one may compile the model.
        """
        step = line["step"]
        step_s = line.get("perf/step_time_s")
        if step <= self._step:
            self._first = None  # the workers have started again
        if step_s is None:
            return None
        before = self._step
        self._step = step
        if self._first is None:
            self._first = step
            self._first_s = step * step_s
            self._steps_s = 0.0
        else:
            self._steps_s += (step - before) * step_s
        if line["run/attempt"] == 1:
            self._learn_evaluations(line, self._first)
        if step == self._first:
            return None
        sizes = self.experiment.batch_sizes
        return self._steps_s / (sizes.before(step) - sizes.before(self._first))

    def _learn_evaluations(self, line: Line, first: int) -> None:
        """Take the seconds of an evaluation from the time that is not spent in steps.

        Those until the first line count until there are others; the first one may compile, too.
        """
        others_s = (self._first_s + self._steps_s) * (1 / line["run/goodput"] - 1)
        count = evaluations(self.experiment, first, line["step"])
        if count > 0:
            self._evaluation_s = (others_s - self._others_s) / count
        elif line["step"] == first:
            self._others_s = others_s
            if not self.experiment.train.compile:
                self._evaluation_s = others_s / max(1, evaluations(self.experiment, 0, first))

    def _memory_gib(self, line: Line) -> float:
        """Return the memory so far and, on a CPU, that of the copy that becomes a checkpoint."""
        copied = self.state_bytes / self.num_workers if "memory/max_resident_gib" in line else 0
        return (peak_memory_gib([line]) or 0.0) + copied / 2**30


def forecast_of(experiment: Experiment, dataset: Manifest, layout: Layout) -> RunForecast:
    """Return the forecast of a run that starts now; print its estimate if that is known."""
    n_vocab = dataset.tokenizer["n_vocab"]
    estimate = None
    timing = cache.read(experiment, n_vocab, layout)
    if timing is not None and not experiment.train.compile:  # it was measured without
        estimate = TokenCounts.of(dataset).expected(experiment, timing)
        print(f"expected: {expected_line(estimate)}", flush=True)
    facts = model_facts(experiment, n_vocab)
    copied = state_bytes(experiment, facts)
    return RunForecast(experiment, copied, estimate, layout.num_workers)
