"""How far a running sweep is, and how long it takes: from the journals of the stages that ran."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from orchestrator.cost.correct import DUE_S, Correction
from orchestrator.cost.estimate import expected_line
from orchestrator.cost.forecast import LEAST_S
from orchestrator.cost.timing import Estimate, evaluation_tokens, evaluations, state_bytes
from orchestrator.runs import journal
from orchestrator.runs.facts import model_facts
from orchestrator.runs.metrics import peak_memory_gib
from orchestrator.sweep.cost import disk_bytes
from orchestrator.sweep.states import RUNNING, longest_paths
from orchestrator.sweep.study import Study
from orchestrator.workers import marks


@dataclass(frozen=True)
class Now:
    """State of a sweep at one moment.

    Attributes:
        live: Steps that each running stage has made in this attempt, by its id.
        left_s: Seconds until the end; None if unknown.
    """

    live: dict[str, int]
    left_s: float | None


class Spent(NamedTuple):
    """Seconds that stages took, and the FLOPs of their steps and evaluations in that time."""

    steps_s: float = 0.0
    steps: float = 0.0
    evaluations_s: float = 0.0  # with checkpoints
    evaluations: float = 0.0


class Pace(Correction):
    """Follows the stages of a sweep, estimates its time, and corrects that twice.

    Args:
        study: The sweep.
        slots: Number of stages that can run at the same time.
        estimate: Estimate from an earlier measurement; None: the first steps tell.
        clock: Returns seconds.

    Attributes:
        estimate: Expected time, memory and disk; None as long as they are unknown.
    """

    def __init__(
        self,
        study: Study,
        slots: int,
        estimate: Estimate | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(None if estimate is None else estimate["time_s"])
        self.study = study
        self.progress = study.progress
        self.slots = slots
        self.estimate = estimate
        self.clock = clock
        self._began = clock()
        self._first: float | None = None  # when the first steps were seen
        self._ended: dict[str, Spent] = {}
        self._known_flops: dict[str, tuple[float, float]] = {}  # by name of the trial

    def look(self) -> Now:
        """Read how far the stages are that ran in this process."""
        live = {}
        spent = []
        for stage in list(self.progress.begun):
            if self.progress.states.by_stage[stage] == RUNNING:
                live[stage] = self._made(stage)
                spent.append(self._spent(stage))
            else:
                if stage not in self._ended:
                    self._ended[stage] = self._spent(stage)
                spent.append(self._ended[stage])
        total = Spent(*map(sum, zip(*spent, strict=True)))
        if total.steps and self._first is None:
            self._first = self.clock()
        return Now(live, self._left_s(live, total))

    def comment(self) -> str | None:
        """Return a line for the user: the estimate or its correction; None if neither is due."""
        if not self._due or self.study.sampler is not None:  # optuna's trials are not known yet
            return None
        now = self.look()
        if self._first is None or now.left_s is None:
            return None
        elapsed_s = self.clock() - self._began
        training_s = self.clock() - self._first
        if self.planned_s is not None:
            return self.line(training_s, elapsed_s, now.left_s)
        if training_s < DUE_S[0]:
            return None
        self._due = DUE_S[1:]
        self.planned_s = elapsed_s + now.left_s
        self.estimate = self._estimate(self.planned_s, elapsed_s / self.planned_s)
        return f"expected: {expected_line(self.estimate)}"

    def _estimate(self, time_s: float, share_over: float) -> Estimate:
        """Return the cost of the sweep: its memory is that so far, and of a checkpoint's copy."""
        lines = [line for stage in self.progress.begun for line in self._lines(stage)]
        checkpoint = 0
        for trial in self.study.trials_and_probes.values():
            facts = model_facts(trial.experiment, trial.dataset.tokenizer["n_vocab"])
            checkpoint = max(checkpoint, state_bytes(trial.experiment, facts))
        copy = 0 if self.study.layout.use_gpu else checkpoint
        return {
            "time_s": time_s,
            "share_over": share_over,
            "memory_gib": (peak_memory_gib(lines) or 0.0) + copy / 2**30,
            "disk_bytes": disk_bytes(self.study, self.slots, checkpoint),
        }

    # ---- the past ----

    def _made(self, stage: str) -> int:
        """Return the steps of a running stage in this attempt."""
        ranks = marks.read(self.progress.folder.stage(stage))
        return max(0, ranks[0].step - self._first_step(stage)) if ranks else 0

    def _first_step(self, stage: str) -> int:
        """Return the step from which this attempt at a stage started."""
        return max(self.progress.begun[stage][-1], self.progress.tree.by_id[stage].start)

    def _lines(self, stage: str) -> list[journal.Line]:
        """Return the journal lines of this attempt at a stage."""
        first = self._first_step(stage)
        lines = journal.read(self.progress.folder.stage(stage))
        return [line for line in lines if line["step"] > first or first == 0]

    def _spent(self, stage: str) -> Spent:
        """Return what the journal says about this attempt at a stage.

        Only the first line with times has the warm-up of the process. If there are more, it does
        not count for the time of a step.
        """
        trial = self.progress.tree.by_id[stage].example
        sequence_flops, evaluation_flops = self._flops(trial)
        sizes = self.progress.trials[trial].steps.batch_sizes
        step = self._first_step(stage)
        windows = []
        evaluated = goodput = 0.0
        waiting = 0
        for line in self._lines(stage):
            waiting += "val/loss" in line
            if "perf/step_time_s" in line:
                sequences = sizes.before(line["step"]) - sizes.before(step)
                windows.append((sequences, (line["step"] - step) * line["perf/step_time_s"]))
                step = line["step"]
                goodput = line["run/goodput"]
                evaluated = waiting
        if not windows:
            result = self.progress.stored.results.get(stage)
            if result is None or not result.steps_run:  # an earlier attempt made all its steps
                return Spent()
            sequences = sizes.before(result.step) - sizes.before(result.step - result.steps_run)
            return Spent(result.seconds, sequences * sequence_flops)
        training_s = sum(seconds for _, seconds in windows)
        sequences, steps_s = map(sum, zip(*(windows[1:] or windows), strict=True))
        return Spent(
            steps_s,
            sequences * sequence_flops,
            training_s / goodput - training_s,
            evaluated * evaluation_flops,
        )

    def _flops(self, trial: str) -> tuple[float, float]:
        """Return the FLOPs of a sequence in a step, and of an evaluation, of a trial."""
        if trial not in self._known_flops:
            planned = self.progress.trials[trial]
            experiment = planned.experiment
            splits = planned.dataset.splits
            facts = model_facts(experiment, planned.dataset.tokenizer["n_vocab"])
            per_token = facts["flops_per_token"] or 6 * facts["parameters"]
            tokens = evaluation_tokens(experiment, splits["val"].tokens, splits["train"].tokens)
            # A forward pass is a third of both passes.
            flops = per_token * experiment.model.block_size, per_token / 3 * tokens
            self._known_flops[trial] = flops
        return self._known_flops[trial]

    # ---- the future ----

    def _left_s(self, live: dict[str, int], spent: Spent) -> float | None:
        if not spent.steps or spent.steps_s < LEAST_S:
            if self.planned_s is None:
                return None
            return max(0.0, self.planned_s - (self.clock() - self._began))
        step_s = spent.steps_s / spent.steps  # of one FLOP
        evaluation_s = step_s
        if spent.evaluations:
            evaluation_s = spent.evaluations_s / spent.evaluations
        tree = self.progress.tree
        seconds = {}
        for stage in self.progress.states.pending:
            first = stage.stop - tree.cost(stage)
            if stage.id in live:  # an earlier attempt may have made some of its steps
                first = min(stage.stop, self._first_step(stage.id) + live[stage.id])
            sequence_flops, evaluation_flops = self._flops(stage.example)
            trial = self.progress.trials[stage.example]
            due = evaluations(trial.experiment, first, stage.stop)
            sizes = trial.steps.batch_sizes
            flops = sequence_flops * (sizes.before(stage.stop) - sizes.before(first))
            seconds[stage.id] = step_s * flops + evaluation_s * evaluation_flops * due
        longest = max(longest_paths(tree, seconds).values(), default=0.0)
        return max(sum(seconds.values()) / self.slots, longest)
