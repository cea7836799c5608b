"""The open log window: losses and times since the last logged step, and the metrics that they make.

The losses are part of a run's state (a checkpoint carries them), so that every logged loss is the same bits after a
resume; the times belong to this process alone.
"""

import math
import resource
import sys
import time
from dataclasses import dataclass, field

import torch


@dataclass
class Meter:
    """`lap(name)` books the time since the last lap; `add` takes a step's M losses; `flush` yields the metrics."""

    losses: list[float] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    productive: float = 0.0  # seconds of training steps in this attempt
    started: float = field(default_factory=time.perf_counter)
    _mark: float = field(default_factory=time.perf_counter)

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.times[name] = self.times.get(name, 0.0) + now - self._mark
        self._mark = now

    def add(self, losses: list[float]) -> None:
        self.losses += losses
        self.steps += 1

    def flush(self, tokens_per_step: int) -> dict[str, float]:
        """Metrics of the window, which then is empty; keys and units as in the table of metrics.

        `perf/overhead_share` is the part of training that is not forward, backward, reduction or optimizer.
        """
        compute, data, rest = (self.times.get(k, 0.0) for k in ("compute", "data", "rest"))
        training = compute + data + rest
        self.productive += training
        metrics = {
            "perf/checkpoint_stall_s": self.times.get("checkpoint", 0.0),
            "run/goodput": self.productive / (time.perf_counter() - self.started),
        }
        if self.losses:  # none where the update of every step was left out
            # Micro-batch order is the order of the list, so the mean does not depend on the number of workers.
            metrics |= {
                "train/loss": math.fsum(self.losses) / len(self.losses),
                "train/loss_max": max(self.losses),
            }
        if self.steps:
            metrics |= {
                "perf/tokens_per_sec": self.steps * tokens_per_step / training,
                "perf/step_time_s": training / self.steps,
                "perf/data_wait_s": data / self.steps,
                "perf/overhead_share": (training - compute) / training,
            }
        self.losses, self.times, self.steps = [], {}, 0
        return metrics


def memory_metrics(device: str) -> dict[str, float]:
    """Peak memory in GiB: what torch allocated on the GPU, or this process's resident set on a CPU."""
    if device.startswith("cuda"):
        return {"memory/max_allocated_gib": torch.cuda.max_memory_allocated(device) / 2**30}
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return {
        "memory/max_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    }
