"""Progress as metrics of Ray, on the Prometheus pages of its nodes. See deploy/grafana.json."""

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.metrics import Gauge

GAUGES = {
    "step": "updates that are done",
    "steps": "updates that the run or the sweep has",
    "train_loss": "nats per token, since the last line",
    "val_loss": "nats per token; of a sweep, that of its best trial",
    "tokens_per_second": "over all workers",
    "left_seconds": "expected time to the end",
}


def show(name: str, **values: float | None) -> None:
    """Set gauges of the run or sweep `name`. A value that is None leaves its gauge as it is."""
    import ray

    if not ray.is_initialized():
        return
    for key, value in values.items():
        if value is not None:
            _gauge(key).set(float(value), {"name": name})


@functools.cache
def _gauge(key: str) -> "Gauge":
    from ray.util.metrics import Gauge

    return Gauge(f"espalier_{key}", GAUGES[key], ("name",))
