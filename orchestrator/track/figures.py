"""Figures of a run: the loss curve and the learning rate, as matplotlib figures without a display.

Eats journal records (`{"step", "timestamp", "train/loss", …}`); yields Figures for `savefig`. matplotlib is imported on
the first call and never through pyplot, whose state is global: these run in the tracker's thread.
"""

import math
from collections.abc import Iterable
from typing import Any

INK, TRAIN, VAL = "#333333", "#4c78a8", "#e45756"


def loss_curve(records: Iterable[dict[str, Any]]):
    """`train/loss` and `val/loss` (nats per token) over the optimizer step; non-finite values are left out."""
    records = list(records)
    figure, axes = _axes("step", "loss (nats per token)")
    train, val = points(records, "train/loss"), points(records, "val/loss")
    if train:
        axes.plot(*zip(*train, strict=True), color=TRAIN, linewidth=1.2, label="train")
    if val:
        axes.plot(
            *zip(*val, strict=True), color=VAL, linewidth=1.6, marker="o", markersize=4, label="val"
        )
        step, best = min(val, key=lambda p: p[1])
        axes.annotate(
            f"best {best:.4f} at step {step}",
            (step, best),
            (0, 14),
            textcoords="offset points",
            ha="right" if step > val[len(val) // 2][0] else "left",
            color=VAL,
            fontsize=9,
        )
    if train or val:
        axes.legend(frameon=False)
    return figure


def schedule_curve(lrs: Iterable[tuple[int, float]]):
    """Learning rate over the optimizer step, from (step, rate) pairs."""
    figure, axes = _axes("step", "learning rate")
    lrs = list(lrs)
    if lrs:
        axes.plot(*zip(*lrs, strict=True), color=TRAIN, linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return figure


def points(records: Iterable[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """The finite (step, value) pairs of one metric."""
    return [
        (r["step"], r[key])
        for r in records
        if isinstance(r.get(key), (int, float)) and math.isfinite(r[key])
    ]


def _axes(x: str, y: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
