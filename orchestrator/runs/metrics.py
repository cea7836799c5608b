"""The table of metrics: unit, interval and meaning of each value in a line of the journal."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from model.optim import GROUPS


@dataclass(frozen=True)
class Metric:
    """One metric of the journal.

    Attributes:
        name: Key in the journal and in MLflow.
        unit: Unit of the value; "" for a number without one.
        meaning: One line for people.
        interval: Logged every `train.log_interval` or every `train.eval_interval` steps.
        exact: True if a resumed run and any number of workers give the same bits. False if the
            value depends on the machine or on when the run was stopped.
    """

    name: str
    unit: str
    meaning: str
    interval: Literal["log", "eval"] = "log"
    exact: bool = False


_EXACT_LOGGED = (
    Metric(
        "train/loss",
        "nats per token",
        "mean over all micro-batches since the last log line",
        exact=True,
    ),
    Metric(
        "train/loss_max", "nats per token", "largest loss of a micro-batch since then", exact=True
    ),
    Metric("train/tokens", "tokens", "tokens trained on since step 0", exact=True),
    Metric("train/epoch", "epochs", "passes over the train split", exact=True),
    Metric(
        "train/skipped_steps", "steps", "updates skipped because they were not finite", exact=True
    ),
    Metric("optim/lr", "", "learning rate of the last update", exact=True),
    *(
        Metric(
            f"optim/lr.{group}", "", f"the same of group {group}, where rates differ", exact=True
        )
        for group in GROUPS
    ),
    Metric(
        "optim/weight_decay_factor", "", "factor of all weight decays, once it changes", exact=True
    ),
    Metric("optim/momentum", "", "momentum of the last update, once it changes", exact=True),
    Metric(
        "train/batch_size", "sequences", "those of the last update, once it changes", exact=True
    ),
    Metric("optim/grad_norm", "", "norm of the last gradient before clipping", exact=True),
    Metric("optim/loss_scale", "", "scale of the loss in float16", exact=True),
)
_EVALUATED = (
    Metric("val/loss", "nats per token", "loss of the val split", "eval", True),
    Metric("val/bits_per_byte", "bits per byte", "the same per byte of text", "eval", True),
    Metric("val/best_loss", "nats per token", "lowest val/loss until now", "eval", True),
    Metric("val/ema_loss", "nats per token", "val/loss of the averaged weights", "eval", True),
    Metric("train/eval_loss", "nats per token", "loss of a part of the train split", "eval", True),
)
_MEASURED = (
    Metric("perf/tokens_per_sec", "tokens per second", "speed of training, all workers"),
    Metric("perf/mfu", "0 to 1", "model FLOPs utilization: used share of the GPUs' peak speed"),
    Metric("perf/step_time_s", "seconds", "mean time of a step"),
    Metric("perf/data_wait_s", "seconds", "mean time of a step spent waiting for data"),
    Metric("perf/overhead_share", "0 to 1", "share of the step time that is not the step's work"),
    Metric("perf/checkpoint_stall_s", "seconds", "time that training waited for checkpoints"),
    Metric("memory/max_allocated_gib", "GiB", "peak memory of the GPU of rank 0"),
    Metric("memory/max_resident_gib", "GiB", "peak memory of the process of rank 0"),
    Metric("run/attempt", "", "number of the start of the workers, from 1"),
    Metric("run/goodput", "0 to 1", "share of this attempt's time spent in steps"),
)

METRICS = {metric.name: metric for metric in _EXACT_LOGGED + _EVALUATED + _MEASURED}


def of(name: str) -> Metric:
    """Return the entry of a metric. A name that is not in the table gets an entry, not exact."""
    return METRICS.get(name) or Metric(name, "", "")


def median_step_s(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the median time of a step in these journal lines; None if no line has one."""
    times = [line["perf/step_time_s"] for line in lines if "perf/step_time_s" in line]
    return statistics.median(times) if times else None


def peak_memory_gib(lines: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the largest peak memory in these journal lines; None if no line has one."""
    return max(
        (value for line in lines for name, value in line.items() if of(name).unit == "GiB"),
        default=None,
    )
