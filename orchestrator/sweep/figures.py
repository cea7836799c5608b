"""Figures of a sweep, as matplotlib figures without a display: its tree, its results, its curves, its fields.

Eats a stages.Plan, rows (one dict per trial, see comparison.py) and journal records; yields Figures for `savefig`. As in
figures.py, matplotlib is imported on the first call and never through pyplot. Colours: Okabe and Ito's palette for
categories (jfly.uni-koeln.de/color) and viridis for numbers, both made for colour-blind readers.
"""

import json
import math
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Any

import numpy as np

from orchestrator.sweep.ranking import Row, Setting, has_result, rank, shown, varying
from orchestrator.sweep.tree import Plan
from orchestrator.text import clip, short_names

INK = "#333333"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#000000")
PALE, BEST = "#bbbbbb", "#d55e00"
POINTS = 2000  # of a line: more than a figure has pixels across
NAMED = len(PALETTE)  # trials that still get a colour and a name each
LISTED = 120  # settings that still get a line each


def points(records: Iterable[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    """Return the finite (step, value) pairs of one metric."""
    pairs = ((record["step"], record.get(metric)) for record in records)
    return [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]


def tree(plan: Plan):
    """Learning rate over the step, one line per stage, so that what trials share is drawn once; dots where they part.

    x counts updates done, as the journal does: the rate of update n stands at n, and a stage starts where its parent ends.
    """
    figure, (axes,) = _panels([("step", "learning rate")])
    rates = {trial.name: trial.rates for trial in plan.trials}
    most = max((len(stage.trials) for stage in plan.stages), default=1)
    for stage in plan.stages:
        x = _thinned(max(1, stage.start), stage.stop)  # from the parent's last point on
        axes.plot(
            x,
            rates[stage.trials[0]][x - 1],
            solid_capstyle="round",
            **_weight(len(stage.trials), most),
        )
    forks = [s for s in plan.stages if len(plan.children.get(s.id, ())) > 1]
    axes.plot(
        [s.stop for s in forks],
        [rates[s.trials[0]][s.stop - 1] for s in forks],
        "o",
        color=INK,
        markersize=4,
        label="branches",
        zorder=10_000,
    )
    _rate_axis(axes, [float(trial.rates.max()) for trial in plan.trials])
    for count in sorted({1, most}):
        axes.plot([], [], label=f"trials: {count:,}", **_weight(count, most))
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    drawn = {(s.start, s.stop, rates[s.trials[0]][s.start : s.stop].tobytes()) for s in plan.stages}
    under = (
        f"; lines of {len(plan.stages) - len(drawn):,} stages lie under equal ones"
        if len(drawn) < len(plan.stages)
        else ""
    )
    axes.set_title(_paid(plan) + under, fontsize=10, color=INK, loc="left")
    return figure


def _paid(plan: Plan) -> str:
    saved, stored = plan.steps_asked - plan.steps_in_tree, plan.steps_in_tree - plan.steps_to_run
    more = f" ({stored:,} of them stored already)" if stored and not plan.dead else ""
    return (
        f"{len(plan.trials):,} trials: {plan.steps_asked:,} steps asked, {plan.steps_in_tree:,} run{more}, "
        f"{saved:,} saved ({saved / max(1, plan.steps_asked):.1%})"
    )


def _weight(count: int, most: int) -> dict[str, Any]:
    """Wide and dark for what many trials share; those above, so that a trunk is not hidden by its branches."""
    share = math.log(count) / math.log(max(2, most))
    return {
        "linewidth": 1.1 + 3.4 * share,
        "color": _colormap()(0.75 * (1 - share)),
        "zorder": 2 + count,
    }


def _thinned(first: int, last: int) -> np.ndarray:
    """At most POINTS whole steps of first..last, both included."""
    return np.unique(np.linspace(first, last, min(POINTS, last - first + 1)).round().astype(int))


def final_losses(rows: Iterable[Row]):
    """Final loss by setting, the best on top: a dot per seed, a bar at the mean, ~ for ties with the best."""
    rows = list(rows)
    settings = [s for s in rank(rows) if s.values]
    listed = settings[:LISTED]
    figure, (axes,) = _panels(
        [(f"final {rows[0]['metric']}" if rows else "final loss", None)],
        size=(9, max(2.5, 1.2 + 0.19 * len(listed))),
    )
    kinds = sorted({s.fields.get("schedule.kind") for s in listed}, key=str)
    colours = dict(zip(kinds, cycle(PALETTE), strict=False))
    for y, s in enumerate(listed):
        colour = colours[s.fields.get("schedule.kind")]
        axes.plot(list(s.values.values()), [y] * s.n, "o", color=colour, markersize=4.5, alpha=0.75)
        if s.n > 1:
            axes.plot([s.mean], [y], "|", color=colour, markersize=11, markeredgewidth=2)
    if listed:
        axes.axvline(listed[0].mean, color=INK, linewidth=0.7, linestyle=":")
        _cut(axes, [v for s in listed for v in s.values.values()])
    short = short_names(s.setting for s in settings)
    axes.set_yticks(range(len(listed)), [_label(s, short) for s in listed], fontsize=7.5)
    axes.set_ylim(len(listed) - 0.4, -0.6)  # the best on top
    if len(kinds) > 1:
        for kind in kinds:
            axes.plot([], [], "o", color=colours[kind], label=kind or "as in the experiment")
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    without = len({row["setting"] for row in rows}) - len(settings)
    notes = {
        f"the best {LISTED} of {len(settings)} settings": len(settings) > LISTED,
        f"{without} without a result": without,
        "~ not told from the best": any(s.ties for s in listed),
    }
    axes.set_title("; ".join(filter(notes.get, notes)), fontsize=9, color=INK, loc="left")
    return figure


def _label(s: Setting, short: Mapping[str, str]) -> str:
    return (
        clip(short[s.setting], 48) + ("" if s.rank else f" ({s.state})") + (" ~" if s.ties else "")
    )


def _cut(axes, values: list[float]) -> None:
    """Where a few losses lie far above the rest, end the axis before them and say so at its edge."""
    low, limit, beyond = min(values), _limit(values), sum(v > _limit(values) for v in values)
    if beyond and limit > low:
        axes.set_xlim(low - 0.05 * (limit - low), limit + 0.05 * (limit - low))
        axes.annotate(
            f"{beyond} above {limit:.4g}, up to {max(values):.4g} →",
            (1, 1),
            (0, 3),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=BEST,
        )


def curves(rows: Iterable[Row], histories: Mapping[str, list[dict[str, Any]]]):
    """Learning rate and loss over the step, a line per trial in each panel; `histories` are their journals' records.

    Up to NAMED trials have a colour and a name each; of more, the colour is the final loss, and the best one is named.
    """
    rows = [row for row in rows if row["trial"] in histories]
    metric = rows[0]["metric"] if rows else "loss"
    figure, (top, bottom) = _panels([(None, "learning rate"), ("step", metric)], size=(10, 8))
    paint, names, drawn = _painter(rows), short_names(row["trial"] for row in rows), []
    for row in sorted(rows, key=_order, reverse=True):  # the best last, so on top
        style = {"label": clip(names[row["trial"]], 40), **paint(row)}
        for axes, key in ((top, "optim/lr"), (bottom, metric)):
            found = points(histories[row["trial"]], key)
            axes.plot(
                [x for x, _ in found],
                [y for _, y in found],
                ".-" if len(found) == 1 else "-",
                **style,
            )
        drawn += found
    _rate_axis(top, [max(line.get_ydata(), default=0.0) for line in top.get_lines()])
    _skip_start(bottom, drawn)
    if 0 < len(rows) <= NAMED:
        handles = bottom.get_legend_handles_labels()
        top.legend(
            *(h[::-1] for h in handles),
            frameon=False,
            fontsize=8,
            loc="upper left",
            bbox_to_anchor=(1, 1),
        )
    elif _finals(rows):
        _colorbar(figure, [top, bottom], _finals(rows), f"final {metric}")
        best = min(rows, key=_order)
        bottom.set_title(
            f"thick: the best, {clip(names[best['trial']], 90)}", fontsize=9, color=BEST, loc="left"
        )
    return figure


def _painter(rows: list[Row]):
    """row -> how its lines look."""
    if len(rows) <= NAMED:
        colours = {row["trial"]: PALETTE[i] for i, row in enumerate(sorted(rows, key=_order))}
        return lambda row: {"color": colours[row["trial"]], "linewidth": 1.5}
    norm, best = (
        _norm(_finals(rows)),
        min(filter(has_result, rows), key=_order, default={"trial": None})["trial"],
    )

    def paint(row: Row) -> dict[str, Any]:
        if row["trial"] == best:
            return {"color": BEST, "linewidth": 2.4}
        return {
            "color": _colormap()(norm(row["final"])) if has_result(row) else PALE,
            "linewidth": 0.8,
            "alpha": 0.8,
        }

    return paint


def _skip_start(axes, drawn: list[tuple[int, float]]) -> None:
    """The fall from the first loss would flatten all that is worth comparing: end the axis at what follows it."""
    if not drawn:
        return
    last = max(step for step, _ in drawn)
    later = [value for step, value in drawn if step >= 0.15 * last]
    low, high = min(later), float(np.percentile(later, 98))
    if high > low and max(value for _, value in drawn) > high + 0.3 * (high - low):
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def parallel_coordinates(rows: Iterable[Row]):
    """A line per trial with a result, over one axis per varying field and the final loss; the colour is the loss."""
    names = varying(rows := list(filter(has_result, rows)))
    rows.sort(key=_order, reverse=True)
    figure, (axes,) = _panels([(None, None)], size=(max(7, 2.1 * (len(names) + 1)), 5.5))
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_yticks([])
    axes.set_title(
        "thick: the best trial" if rows else "no trial has a result yet",
        fontsize=9,
        color=BEST,
        loc="left",
    )
    if not rows:
        return figure
    fields = {
        field: column
        for field in names
        if len(set(column := [_value(row, field) for row in rows])) > 1
    }
    limit, metric = _limit(_finals(rows)), f"final {rows[0]['metric']}"
    columns = [*fields.values(), [min(row["final"], limit) for row in rows]]
    scales = [*map(_Scale, fields.values()), _Scale(columns[-1], continuous=True)]
    norm = _norm(_finals(rows))
    for i, row in enumerate(rows):
        best, shift = (
            i == len(rows) - 1,
            (0.5 - i / max(1, len(rows) - 1)) * 0.05,
        )  # a ribbon, not one line, where all agree
        heights = [
            s.at(c[i]) + (0 if s.continuous else shift)
            for s, c in zip(scales, columns, strict=True)
        ]
        axes.plot(
            range(len(columns)),
            heights,
            color=BEST if best else _colormap()(norm(row["final"])),
            linewidth=2.2 if best else 1.0,
            alpha=1 if best else 0.75,
        )
    for x, scale in enumerate(scales):
        axes.axvline(x, color=INK, linewidth=0.8, zorder=0)
        for value, label in scale.ticks():
            axes.annotate(
                clip(label, 18),
                (x, value),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
                bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6},
                zorder=5,
            )
    axes.set_xticks(
        range(len(columns)),
        [*fields, metric if rows[0]["final"] <= limit else f"{metric}, cut"],
        fontsize=9,
    )
    axes.set_xlim(-0.1, len(columns) - 0.55)
    _colorbar(figure, [axes], _finals(rows), metric)
    return figure


def _value(row: Row, field: str) -> float | str:
    """A number, or the text of anything else; a field that this trial does not vary is as the experiment has it."""
    value = row["fields"].get(field, "unchanged")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    return value if isinstance(value, str) else json.dumps(value)


class _Scale:
    """Places the values of one axis in 0..1: numbers evenly or by their logarithm, texts below them, at equal distances."""

    def __init__(self, column: list[float | str], continuous: bool = False):
        self.numbers = sorted({v for v in column if not isinstance(v, str)})
        self.texts = sorted({v for v in column if isinstance(v, str)})
        self.log = (
            bool(self.numbers) and self.numbers[0] > 0 and self.numbers[-1] >= 10 * self.numbers[0]
        )
        self.continuous = continuous or len(self.numbers) > 8

    def at(self, value: float | str) -> float:
        bottom = min(0.5, 0.12 * len(self.texts)) if self.numbers else 1.0  # what the texts take
        if isinstance(value, str):
            return (self.texts.index(value) + 0.5) / len(self.texts) * bottom
        low, high = self._shown(self.numbers[0]), self._shown(self.numbers[-1])
        return bottom + (1 - bottom) * (
            (self._shown(value) - low) / (high - low) if high > low else 0.5
        )

    def _shown(self, value: float) -> float:
        return math.log(value) if self.log else float(value)

    def ticks(self) -> list[tuple[float, str]]:
        """(height, label), from the lowest on, without those that would be written over the one below."""
        values: list[float | str] = list(self.numbers)
        if self.continuous:
            evenly = np.linspace(self._shown(self.numbers[0]), self._shown(self.numbers[-1]), 5)[
                1:-1
            ]
            values = [
                self.numbers[0],
                *(math.exp(v) if self.log else float(v) for v in evenly),
                self.numbers[-1],
            ]
        kept: list[tuple[float, str]] = []
        for value in [*self.texts, *values]:
            label = (
                value
                if isinstance(value, str)
                else f"{value:.4g}"
                if self.continuous
                else shown(value)
            )
            if not kept or self.at(value) - kept[-1][0] > 0.035:
                kept.append((self.at(value), label))
        return kept


def _finals(rows: list[Row]) -> list[float]:
    return [row["final"] for row in rows if has_result(row)]


def _order(row: Row) -> float:
    return row["final"] if has_result(row) else math.inf


def _limit(values: list[float]) -> float:
    """The largest value that is not far above the best three quarters."""
    low, high = np.percentile(values, [0, 75])
    return max(v for v in values if v <= high + 4 * (high - low) or high == low)


def _colormap():
    """viridis without its palest end, which is hard to see on white."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    return ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256)))


def _norm(values: list[float]):
    """Losses to 0..1; the few that lie far above the rest share the last colour."""
    from matplotlib.colors import Normalize

    low, high = (min(values), _limit(values)) if values else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1e-9, clip=True)


def _colorbar(figure, axes: list, values: list[float], label: str) -> None:
    from matplotlib.cm import ScalarMappable

    extend = "max" if max(values) > _limit(values) else "neither"
    figure.colorbar(
        ScalarMappable(_norm(values), _colormap()), ax=axes, label=label, extend=extend, pad=0.02
    )


def _rate_axis(axes, peaks: list[float]) -> None:
    """From zero, but logarithmic where peaks lie a factor of 10 apart or more."""
    peaks = [p for p in peaks if p > 0]
    if peaks and max(peaks) >= 10 * min(peaks):
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(min(peaks) / 30, max(peaks) * 1.5)
    else:
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _panels(labels: list[tuple[str | None, str | None]], size: tuple[float, float] = (10, 5.5)):
    """A figure and its axes, one below the other, that share their x; in the style of figures.py."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(labels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (x, y) in zip(panels, labels, strict=True):
        axes.set_xlabel(x or "", color=INK)
        axes.set_ylabel(y or "", color=INK)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)
