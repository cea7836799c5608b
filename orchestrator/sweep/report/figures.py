"""Figures of a sweep: its tree, the final losses and the curves.

matplotlib is imported on the first call, and never through pyplot, whose state is global. The
colors are Okabe and Ito's palette (jfly.uni-koeln.de/color) and viridis: readers with color
blindness can tell them apart.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.sweep.report.ranking import Row, Setting, rank
from orchestrator.sweep.tree import StageTree
from orchestrator.text import clip, short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#333333"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")
NAMED = len(PALETTE)  # trials that have a color and a name in the curves
GRAY = "#bbbbbb"  # all other trials
LISTED = 120  # settings in the figure of final losses, at most
POINTS = 2000  # points of a line, at most: more than a figure has pixels


def stage_tree(tree: StageTree) -> "Figure":
    """Draw the learning rate over the steps; steps that trials share are drawn once.

    Lines are wider and darker where more trials share them, and dots mark the branches. The x-axis
    counts updates, as the journal does: the rate of update n stands at n, and a stage starts at
    the last point of its parent.
    """
    figure, (axes,) = _panels([("step", "learning rate")])
    rates = {trial.name: trial.rates for trial in tree.branches}
    most = max((len(stage.trials) for stage in tree.stages), default=1)
    for stage in tree.stages:
        steps = _thinned(max(1, stage.start), stage.stop)
        style = _line_style(len(stage.trials), most)
        axes.plot(steps, rates[stage.trials[0]][steps - 1], solid_capstyle="round", **style)

    branches = [s for s in tree.stages if len(tree.children.get(s.id, ())) > 1]
    axes.plot(
        [s.stop for s in branches],
        [rates[s.trials[0]][s.stop - 1] for s in branches],
        "o",
        color=INK,
        markersize=4,
        label="branches",
        zorder=10_000,
    )
    for count in sorted({1, most}):
        axes.plot([], [], label=f"trials: {count:,}", **_line_style(count, most))
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    _scale_rates(axes, [float(trial.rates.max()) for trial in tree.branches])
    axes.set_title(_tree_title(tree), fontsize=10, color=INK, loc="left")
    return figure


def _line_style(count: int, most: int) -> dict[str, Any]:
    """Return the style of a stage that `count` trials share.

    Lines of many trials are drawn on top, so that no branch hides the trunk.
    """
    from matplotlib import colormaps

    share = math.log(count) / math.log(max(2, most))
    color = colormaps["viridis"](0.675 * (1 - share))
    return {"linewidth": 1.1 + 3.4 * share, "color": color, "zorder": 2 + count}


def _thinned(first: int, last: int) -> np.ndarray:
    """Return at most POINTS whole steps from `first` to `last`, both included."""
    steps = np.linspace(first, last, min(POINTS, last - first + 1))
    return np.unique(steps.round().astype(int))


def _tree_title(tree: StageTree) -> str:
    asked = tree.steps_asked
    saved = asked - tree.steps_in_tree
    stored = tree.steps_in_tree - tree.steps_to_run
    title = f"{len(tree.branches):,} trials: {asked:,} steps asked, {tree.steps_in_tree:,} run"
    if stored and not tree.diverged:
        title += f" ({stored:,} of them stored already)"
    title += f", {saved:,} saved ({saved / max(1, asked):.1%})"

    rates = {trial.name: trial.rates for trial in tree.branches}
    visible = {
        (s.start, s.stop, rates[s.trials[0]][s.start : s.stop].tobytes()) for s in tree.stages
    }
    hidden = len(tree.stages) - len(visible)  # other seeds, for example
    if hidden:
        title += f"; lines of {hidden:,} stages lie under equal ones"
    return title


def final_losses(rows: Iterable[Row]) -> "Figure":
    """Draw the final loss of each setting, the best on top: a dot per seed, a bar at the mean."""
    rows = list(rows)
    settings = [s for s in rank(rows) if s.values]
    listed = settings[:LISTED]
    metric = rows[0].metric if rows else "loss"
    figure, (axes,) = _panels([(f"final {metric}", None)], height=1.2 + 0.19 * max(7, len(listed)))
    for y, s in enumerate(listed):
        axes.plot(list(s.values.values()), [y] * len(s.values), "o", color=PALETTE[0], markersize=4)
        if len(s.values) > 1:
            axes.plot([s.mean], [y], "|", color=PALETTE[0], markersize=11, markeredgewidth=2)
    if listed:
        axes.axvline(listed[0].mean, color=INK, linewidth=0.7, linestyle=":")
        _cut_outliers(axes, [value for s in listed for value in s.values.values()])
    names = short_names(s.name for s in settings)
    labels = [_label(s, names[s.name]) for s in listed]
    axes.set_yticks(range(len(listed)), labels, fontsize=7.5)
    axes.set_ylim(len(listed) - 0.4, -0.6)

    notes = []
    if len(settings) > LISTED:
        notes.append(f"the best {LISTED} of {len(settings)} settings")
    without = len({row.setting for row in rows}) - len(settings)
    if without:
        notes.append(f"{without} without a result")
    if any(s.ties for s in listed):
        notes.append("~ not told from the best")
    axes.set_title("; ".join(notes), fontsize=9, color=INK, loc="left")
    return figure


def _label(s: Setting, name: str) -> str:
    state = f" ({s.state})" if s.rank is None else ""
    return clip(name, 48) + state + (" ~" if s.ties else "")


def _cut_outliers(axes: "Axes", values: list[float]) -> None:
    """End the x-axis before a few losses that lie far above the rest, and say so."""
    low, high = np.percentile(values, [0, 75])
    limit = max(v for v in values if v <= high + 4 * (high - low))
    above = sum(v > limit for v in values)
    if not above or limit == low:
        return
    margin = 0.05 * (limit - low)
    axes.set_xlim(low - margin, limit + margin)
    axes.annotate(
        f"{above} above {limit:.4g}, up to {max(values):.4g} →",
        (1, 1),
        (0, 3),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=PALETTE[1],
    )


def curves(rows: Iterable[Row], histories: Mapping[str, list[dict[str, Any]]]) -> "Figure":
    """Draw learning rate and loss over the steps. The best NAMED trials have a color and a name.

    Args:
        rows: Trials. Those without a history are left out.
        histories: Journal lines of each trial, by its name.
    """
    ordered = sorted((row for row in rows if row.trial in histories), key=_final_or_inf)
    metric = ordered[0].metric if ordered else "loss"
    figure, (top, bottom) = _panels([(None, "learning rate"), ("step", metric)], height=8)
    names = short_names(row.trial for row in ordered)
    peaks: list[float] = []
    losses: list[tuple[int, float]] = []
    for i, row in reversed(list(enumerate(ordered))):  # the best last, so on top
        style: dict[str, Any] = {"color": GRAY, "linewidth": 0.8}
        if i < NAMED:
            style = {"color": PALETTE[i], "linewidth": 1.5, "label": clip(names[row.trial], 40)}
        rates = _points(histories[row.trial], "optim/lr")
        values = _points(histories[row.trial], metric)
        _draw_curve(top, rates, style)
        _draw_curve(bottom, values, style)
        peaks.append(max((rate for _, rate in rates), default=0.0))
        losses += values
    _scale_rates(top, peaks)
    _skip_first_losses(bottom, losses)
    handles, labels = bottom.get_legend_handles_labels()
    if labels:
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        top.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, **place)
    if len(ordered) > NAMED:
        title = f"the best {NAMED} of {len(ordered)} trials have a color"
        bottom.set_title(title, fontsize=9, color=INK, loc="left")
    return figure


def _points(lines: list[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """Return the finite (step, value) pairs of one metric."""
    values = [(line["step"], line[metric]) for line in lines if metric in line]
    return [(step, value) for step, value in values if math.isfinite(value)]


def _draw_curve(axes: "Axes", found: list[tuple[int, float]], style: Mapping[str, Any]) -> None:
    line = ".-" if len(found) == 1 else "-"  # a line of one point cannot be seen
    axes.plot([step for step, _ in found], [value for _, value in found], line, **style)


def _final_or_inf(row: Row) -> float:
    return row.final if row.has_result and row.final is not None else math.inf


def _skip_first_losses(axes: "Axes", losses: list[tuple[int, float]]) -> None:
    """End the y-axis below the first losses, which would flatten the differences that follow."""
    last = max((step for step, _ in losses), default=0)
    later = [loss for step, loss in losses if step >= 0.15 * last]
    if not later:
        return
    low, high = np.percentile(later, [0, 98])
    if high > low and max(loss for _, loss in losses) > high + 0.3 * (high - low):
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _scale_rates(axes: "Axes", peaks: list[float]) -> None:
    """Start the y-axis at zero; use a logarithm if the peaks lie a factor of 10 or more apart."""
    peaks = [p for p in peaks if p > 0]
    if peaks and max(peaks) >= 10 * min(peaks):
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(min(peaks) / 30, max(peaks) * 1.5)
    else:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _panels(
    labels: list[tuple[str | None, str | None]], height: float = 5.5
) -> tuple["Figure", list["Axes"]]:
    """Return a figure with a panel per pair of labels (x, y). All panels have the same x-axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(labels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (x, y) in zip(panels, labels, strict=True):
        axes.set_xlabel(x or "", color=INK)
        axes.set_ylabel(y or "", color=INK)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)
