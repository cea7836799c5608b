"""Which setting of a sweep is best, and which differences its seeds cannot tell from chance. Pure.

Eats rows, one dict per trial (trial, setting, seed, fields, steps, state, metric, final, best, …; lower is better);
yields ranked Settings, a CSV and a table for the terminal.

The rule for ties. Seeds change a loss more than many settings do, and alike for all settings: the order of samples and the
first weights are the seed's. So a setting is compared with the best one seed by seed. With d_s = final(setting, s) -
final(best, s) over their n common seeds, the setting is a tie with the best if |mean d| <= t(0.975, n - 1) sd(d) / sqrt(n),
the two-sided paired t-test at 5 % ("Student", Biometrika 6, 1908). With one seed no spread is known, and only equal values
are ties. Two things that the rule does not say: a tie is not equality (more seeds may part the two), and each setting is
tested on its own, so that among 20 settings as good as the best about one is called worse; the best one, being the lowest of
many, is also a little lucky.

A setting is ranked only once all its seeds are done: the mean of those that survived is another setting's mean.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from orchestrator.text import aligned, clip

Row = Mapping[str, Any]
WIDTH = 120  # columns of the terminal's table
_WORST_FIRST = ("failed", "diverged", "blocked", "stopped", "running", "waiting")


@dataclass(frozen=True)
class Setting:
    """Outcome of one setting over its seeds.

    rank: 1 is the best, equal means share a rank; None where a seed has no result. n: seeds with a result; mean, spread:
    of their final values, spread being the sample standard deviation (None below two). values: {seed: final}. ties: it
    cannot be told from the best, by the module's rule; False for the best itself. state, reason: of its worst trial.
    """

    rank: int | None
    setting: str
    fields: dict[str, Any]
    n: int
    mean: float | None
    spread: float | None
    values: dict[int, float]
    ties: bool
    state: str
    reason: str | None


def rank(rows: Iterable[Row]) -> list[Setting]:
    """Settings, best first; then those without a rank, the ones with some results before those with none."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["setting"], []).append(row)
    found = [_setting(group) for group in groups.values()]
    done = sorted((s for s in found if s.n == len(groups[s.setting])), key=lambda s: s.mean)
    rest = sorted(
        (s for s in found if s.n < len(groups[s.setting])),
        key=lambda s: (s.mean is None, s.mean or 0.0),
    )
    means = [s.mean for s in done]
    ranked = [
        replace(s, rank=means.index(s.mean) + 1, ties=i > 0 and tied(s.values, done[0].values))
        for i, s in enumerate(done)
    ]
    return ranked + rest


def tied(values: Mapping[int, float], best: Mapping[int, float]) -> bool:
    """Whether the seeds common to both, {seed: final}, leave open which is lower; see the module's rule."""
    common = sorted(values.keys() & best.keys())
    if len(common) < 2:
        return list(values.values()) == list(best.values())
    differences = [values[seed] - best[seed] for seed in common]
    return abs(fmean(differences)) <= t_975(len(common) - 1) * stdev(differences) / math.sqrt(
        len(common)
    )


def t_975(degrees: int) -> float:
    """The 0.975 quantile of Student's t with that many degrees of freedom, at least 1.

    Bisects the closed form of its distribution: Abramowitz and Stegun, 26.7.3 and 26.7.4, in theta = atan(t / sqrt(degrees)).

    >>> [round(t_975(n), 3) for n in (1, 2, 9, 30)]
    [12.706, 4.303, 2.262, 2.042]
    """
    assert degrees >= 1
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _within(theta: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan theta)."""
    odd, cos = degrees % 2, math.cos(theta)
    term, total = (cos if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cos * cos * (k - 1) / k
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def _setting(group: list[Row]) -> Setting:
    values = dict(sorted((row["seed"], float(row["final"])) for row in group if has_result(row)))
    fields = {
        k: v
        for k, v in group[0]["fields"].items()
        if all(k in r["fields"] and r["fields"][k] == v for r in group)
    }
    state, reason = _worst(group)
    return Setting(
        None,
        group[0]["setting"],
        fields,
        len(values),
        fmean(values.values()) if values else None,
        stdev(values.values()) if len(values) > 1 else None,
        values,
        False,
        state,
        reason,
    )


def has_result(row: Row) -> bool:
    """Done, with a finite final value: what a ranking and a picture may use."""
    return row["state"] == "done" and row["final"] is not None and math.isfinite(row["final"])


def _worst(group: list[Row]) -> tuple[str, str | None]:
    """State of the group's worst trial, and why; with several seeds also for how many of them."""
    for state in _WORST_FIRST:
        bad = [row for row in group if row["state"] == state]
        if bad:
            why = next((row["reason"] for row in bad if row["reason"]), None)
            share = f"{len(bad)} of {len(group)} seeds" if len(group) > 1 else None
            return state, ": ".join(part for part in (share, why) if part) or None
    empty = next((row for row in group if not has_result(row)), None)
    return "done", empty and f"no finite {empty['metric']}"


def varying(rows: Iterable[Row]) -> list[str]:
    """Every field that some row varies, in the order in which they come up."""
    return list(dict.fromkeys(field for row in rows for field in row["fields"]))


def csv_text(rows: Iterable[Row]) -> str:
    """One line per trial in the order of the ranking, one column per varying field; empty where nothing is known."""
    rows = list(rows)
    fields = varying(rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    outcome = [
        "steps",
        "state",
        "metric",
        "final",
        "best",
        "val_bits_per_byte",
        "train_loss",
        "weights_sha256",
        "reason",
    ]
    writer.writerow(
        [
            "rank",
            "trial",
            "setting",
            "seed",
            *fields,
            *outcome,
            "setting_mean",
            "setting_spread",
            "setting_seeds",
            "ties_with_best",
        ]
    )
    for s in rank(rows):
        for row in (row for row in rows if row["setting"] == s.setting):
            writer.writerow(
                [
                    _cell(v)
                    for v in (
                        s.rank,
                        row["trial"],
                        s.setting,
                        row["seed"],
                        *(_field(row["fields"], f) for f in fields),
                        *(row[key] for key in outcome),
                        s.mean,
                        s.spread,
                        s.n,
                        s.ties if s.rank else None,
                    )
                ]
            )
    return out.getvalue()


def _field(fields: Mapping[str, Any], name: str) -> Any:
    # A field that is null on purpose is a value; one that this trial does not vary is none.
    return "null" if name in fields and fields[name] is None else fields.get(name)


def _cell(value: Any) -> Any:
    """As YAML and JSON write it, floats with every digit."""
    return json.dumps(value) if isinstance(value, (bool, list, dict)) else value


def shown(value: Any) -> str:
    """A field's value for a person: floats short, the rest as YAML writes it."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def table(rows: Iterable[Row]) -> str:
    """One line per setting, best first, at most WIDTH columns; below it what has no rank and why."""
    rows = list(rows)
    settings = rank(rows)
    ranked, rest = [s for s in settings if s.rank], [s for s in settings if not s.rank]
    blocks = []
    if ranked:
        steps = {row["setting"]: row["steps"] for row in rows}
        blocks += [_ranking(ranked, steps, rows[0]["metric"]), *_notes(ranked)]
    if rest:
        name = max(len(s.setting) for s in rest)
        head = ["not ranked:"] if ranked else ["nothing to rank yet:"]
        blocks.append("\n".join(head + [_unranked(s, min(name, WIDTH // 2)) for s in rest]))
    return "\n".join(blocks)


def _ranking(ranked: list[Setting], steps: Mapping[str, int], metric: str) -> str:
    """With a column per field where that fits, else with the settings' names."""
    fields = varying({"fields": s.fields} for s in ranked)
    results = [_results(s, ranked[0]) for s in ranked]
    own = [] if "train.max_steps" in fields else ["steps"]  # else a field's column says it
    tail = [metric, "spread", "seeds", "above best", ""]
    leaves = [f.rpartition(".")[2] for f in fields]
    heads = [
        leaf if leaves.count(leaf) == 1 else field
        for field, leaf in zip(fields, leaves, strict=True)
    ]
    wide = [
        [
            str(s.rank),
            *(shown(s.fields[f]) if f in s.fields else "-" for f in fields),
            *(f"{steps[s.setting]:,}" for _ in own),
            *r,
        ]
        for s, r in zip(ranked, results, strict=True)
    ]
    text = aligned([["rank", *heads, *own, *tail], *wide], left=range(1, 1 + len(fields)))
    if fields and max(map(len, text.splitlines())) <= WIDTH:
        return text
    room = WIDTH - 62  # what the other columns take at most
    named = [
        [str(s.rank), clip(s.setting, room), f"{steps[s.setting]:,}", *r]
        for s, r in zip(ranked, results, strict=True)
    ]
    return aligned([["rank", "setting", "steps", *tail], *named], left=(1,))


def _results(s: Setting, best: Setting) -> list[str]:
    above = "" if s is best else f"{s.mean - best.mean:+.4f}"
    return [
        f"{s.mean:.4f}",
        "" if s.spread is None else f"{s.spread:.4f}",
        str(s.n),
        above,
        "~" if s.ties else "",
    ]


def _notes(ranked: list[Setting]) -> list[str]:
    most = max(s.n for s in ranked)
    if most == 1:
        equal = " (~: equal to the best)" if any(s.ties for s in ranked) else ""
        return [
            f"one seed: no spread known, so a small difference may be chance; sweep.seeds=3 would tell{equal}"
        ]
    tied_ones = sum(s.ties for s in ranked)
    if tied_ones == 0:
        return (
            [f"each of the others differs from the best over {most} seeds (paired t-test at 5 %)"]
            if len(ranked) > 1
            else []
        )
    return [f"~ {tied_ones} that {most} seeds cannot tell from the best (paired t-test at 5 %)"]


def _unranked(s: Setting, name: int) -> str:
    line = f"  {clip(s.setting, name):<{name}}  {s.state:<8}  {' '.join((s.reason or '').split())}".rstrip()
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
