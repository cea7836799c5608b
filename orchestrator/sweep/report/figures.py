"""The figure of a sweep's tree of stages. MLflow draws the curves and losses of the trials.

matplotlib is imported on the first call, and never through pyplot, whose state is global.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.sweep.tree import StageTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#333333"
POINTS = 2000  # points of a line, at most: more than a figure has pixels


def stage_tree(tree: StageTree) -> "Figure":
    """Draw the learning rate over the steps; steps that trials share are drawn once.

    Lines are wider and darker where more trials share them, and dots mark the branches. The x-axis
    counts updates, as the journal does: the rate of update n is at x = n, and a stage starts
    at the last point of its parent.
    """
    figure, axes = _empty_figure()
    rates = {branch.name: branch.rates for branch in tree.branches}
    most = max((len(stage.trials) for stage in tree.stages), default=1)
    for stage in tree.stages:
        steps = _thinned(max(1, stage.start), stage.stop)
        style = _line_style(len(stage.trials), most)
        axes.plot(steps, rates[stage.trials[0]][steps - 1], solid_capstyle="round", **style)

    forks = [stage for stage in tree.stages if len(tree.children.get(stage.id, ())) > 1]
    axes.plot(
        [stage.stop for stage in forks],
        [rates[stage.trials[0]][stage.stop - 1] for stage in forks],
        "o",
        color=INK,
        markersize=4,
        label="branches",
        zorder=10_000,
    )
    for count in sorted({1, most}):
        axes.plot([], [], label=f"trials: {count:,}", **_line_style(count, most))
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    _scale_rates(axes, [float(branch.rates.max()) for branch in tree.branches])
    axes.set_title(_title(tree), fontsize=10, color=INK, loc="left")
    return figure


def _empty_figure() -> tuple["Figure", "Axes"]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("learning rate", color=INK)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _line_style(count: int, most: int) -> dict[str, Any]:
    """Return the style of a stage that `count` trials share.

    Lines of many trials are drawn on top, so that no branch hides the trunk. Readers with color
    blindness can tell the colors of viridis apart.
    """
    from matplotlib import colormaps

    share = math.log(count) / math.log(max(2, most))
    color = colormaps["viridis"](0.675 * (1 - share))
    return {"linewidth": 1.1 + 3.4 * share, "color": color, "zorder": 2 + count}


def _thinned(first: int, last: int) -> np.ndarray:
    """Return at most POINTS whole steps from `first` to `last`, both included."""
    steps = np.linspace(first, last, min(POINTS, last - first + 1))
    return np.unique(steps.round().astype(int))


def _scale_rates(axes: "Axes", peaks: list[float]) -> None:
    """Start the y-axis at zero; use a logarithm if the peaks lie a factor of 10 or more apart."""
    peaks = [peak for peak in peaks if peak > 0]
    if peaks and max(peaks) >= 10 * min(peaks):
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(min(peaks) / 30, max(peaks) * 1.5)
    else:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _title(tree: StageTree) -> str:
    asked = tree.steps_asked
    saved = asked - tree.steps_in_tree
    stored = tree.steps_in_tree - tree.steps_to_run
    title = f"{len(tree.branches):,} trials: {asked:,} steps asked, {tree.steps_in_tree:,} run"
    if stored and not tree.diverged:
        title += f" ({stored:,} of them stored already)"
    title += f", {saved:,} saved ({saved / max(1, asked):.1%})"

    rates = {branch.name: branch.rates for branch in tree.branches}
    visible = set()
    for stage in tree.stages:
        line = rates[stage.trials[0]][stage.start : stage.stop]
        visible.add((stage.start, stage.stop, line.tobytes()))
    hidden = len(tree.stages) - len(visible)  # other seeds, for example
    if hidden:
        title += f"; lines of {hidden:,} stages lie under equal ones"
    return title
