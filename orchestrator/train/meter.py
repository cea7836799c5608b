"""Metrics of the training steps since the last log line: loss, speed, memory.

The losses of the open log window are part of a run's state: a checkpoint has them, so that each
logged loss has the same bits after a resume. The times belong to this process only.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from model.flops import mfu
from model.protocol import HasFlops
from orchestrator.config.experiment import Experiment
from orchestrator.config.steps import Steps, first_change
from orchestrator.train.numerics import Worker, device_name

if TYPE_CHECKING:
    from orchestrator.train.state import TrainState

Metrics = dict[str, float]
LOGGED_AS = {
    "lr": "optim/lr",
    "weight_decay": "optim/weight_decay_factor",
    "momentum": "optim/momentum",
    "batch_size": "train/batch_size",
}  # by name of the setting


@dataclass
class Meter:
    """Losses and times since the last log line.

    Attributes:
        last_step_only: Keep only the losses of the latest step. For runs that log only at the end:
            otherwise the window would grow with the run.
        losses: Losses of all micro-batches (nats per token), in micro-batch order.
        times: Seconds by name of the phase.
        steps: Number of steps.
        productive: Seconds that this process has spent on training steps.
        started: Time at which this process started to train.
    """

    last_step_only: bool = False
    losses: list[float] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    productive: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    _mark: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        """Add the time since the last lap to the phase `name`."""
        now = time.perf_counter()
        self.times[name] = self.times.get(name, 0.0) + now - self._mark
        self._mark = now

    def add(self, losses: list[float]) -> None:
        """Add a step with the losses of its micro-batches; a skipped step has none."""
        if self.last_step_only:
            self.losses = []
        self.losses += losses
        self.steps += 1

    def flush(self, tokens: int) -> Metrics:
        """Return the metrics of the window and empty it.

        Args:
            tokens: Tokens of the steps of the window.

        `perf/overhead_share` is the part of the training time that is not spent on forward,
        backward, reduction or optimizer.
        """
        compute = self.times.get("compute", 0.0)
        data = self.times.get("data", 0.0)
        training = compute + data + self.times.get("rest", 0.0)
        self.productive += training
        metrics = {
            "perf/checkpoint_stall_s": self.times.get("checkpoint", 0.0),
            "run/goodput": self.productive / (time.perf_counter() - self.started),
        }
        if self.losses:
            metrics["train/loss"] = math.fsum(self.losses) / len(self.losses)
            metrics["train/loss_max"] = max(self.losses)
        if self.steps:
            metrics["perf/tokens_per_sec"] = tokens / training
            metrics["perf/step_time_s"] = training / self.steps
            metrics["perf/data_wait_s"] = data / self.steps
            metrics["perf/overhead_share"] = (training - compute) / training
        self.losses = []
        self.times = {}
        self.steps = 0
        return metrics


def log_metrics(
    state: TrainState,
    experiment: Experiment,
    worker: Worker,
    epoch: float,
    steps: Steps,
) -> Metrics:
    """Return the metrics of a log line, and empty the log window.

    Args:
        state: State after the step of the line.
        experiment: The configuration.
        worker: This process.
        epoch: Number of passes over the train split so far.
        steps: Settings of every step.
    """
    state.meter.lap("rest")
    sizes, length = steps.batch_sizes, experiment.model.block_size
    before = sizes.before(max(0, state.step - state.meter.steps))
    metrics = state.meter.flush((sizes.before(state.step) - before) * length)
    metrics["train/tokens"] = sizes.before(state.step) * length
    metrics["train/epoch"] = epoch
    metrics |= _settings(steps, state.step, experiment.train.max_steps)
    metrics |= _rates_of_groups(state.optimizer, metrics["optim/lr"])
    metrics["optim/grad_norm"] = state.grad_norm
    metrics["run/attempt"] = worker.attempt
    if state.skipped:
        metrics["train/skipped_steps"] = state.skipped
    if state.scaler.is_enabled():
        metrics["optim/loss_scale"] = state.scaler.get_scale()
    if isinstance(state.model, HasFlops):
        utilization = mfu(
            metrics.get("perf/tokens_per_sec", 0.0),
            state.model.flops_per_token(experiment.model.block_size),
            device_name(worker.device),
            experiment.train.dtype,
            worker.world_size,
        )
        if utilization is not None:
            metrics["perf/mfu"] = utilization
    return metrics | memory_metrics(worker.device)


def _settings(steps: Steps, step: int, max_steps: int) -> Metrics:
    """Return the learning rate of the last update, and its settings that have changed so far.

    Trials that share their steps so far log the same ones.
    """
    return {
        logged: steps.value(name, step - 1)
        for name, logged in LOGGED_AS.items()
        if name == "lr" or first_change(steps, name, max_steps) < step
    }


def _rates_of_groups(optimizer: torch.optim.Optimizer, lr: float) -> Metrics:
    """Return the learning rate of each group of parameters; empty if all have that of the step."""
    scales = {
        name: group["lr_scale"] for group in optimizer.param_groups for name in group["groups"]
    }
    if set(scales.values()) == {1.0}:
        return {}
    return {f"optim/lr.{name}": lr * scale for name, scale in scales.items()}


def memory_metrics(device: str) -> Metrics:
    """Return the peak memory in GiB: torch's allocations on a GPU, the resident set on a CPU."""
    if device.startswith("cuda"):
        return {"memory/max_allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"memory/max_resident_gib": peak / 2**30}
