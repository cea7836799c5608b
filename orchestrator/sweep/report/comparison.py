"""The ranking of a sweep as comparison.csv, and as a table for the terminal."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.sweep.ranking import Row, Setting, rank
from orchestrator.text import aligned, clip

WIDTH = 120  # columns of the table for the terminal
TEST = "paired t-tests, 5 % for the whole ranking"
OTHER_COLUMNS = 62  # columns of that table beside the setting's name, at most
# Columns of comparison.csv that are attributes of `Row`.
OUTCOME = (
    "steps",
    "state",
    "metric",
    "final",
    "best",
    "val_bits_per_byte",
    "train_loss",
    "weights_sha256",
    "reason",
)


def csv_text(rows: Iterable[Row]) -> str:
    """Return comparison.csv: a line per trial, in the order of the ranking.

    Each field that the sweep varies has a column. A cell without a value is empty; floats have all
    of their digits.
    """
    settings = rank(rows)
    fields = _field_names(row.fields for s in settings for row in s.trials)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    of_setting = ["setting_mean", "setting_spread", "setting_seeds", "ties_with_best"]
    writer.writerow(["rank", "trial", "setting", "seed", *fields, *OUTCOME, *of_setting])
    for s in settings:
        mean = s.mean if s.values else None
        ties = None if s.rank is None else s.ties
        for row in s.trials:
            cells: list[Any] = [s.rank, row.trial, s.name, row.seed]
            cells += [_field(row, name) for name in fields]
            cells += [getattr(row, name) for name in OUTCOME]
            cells += [mean, s.spread, len(s.values), ties]
            writer.writerow([_csv_cell(cell) for cell in cells])
    return text.getvalue()


def _field_names(fields: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return every name once, in the order of its first use."""
    return list(dict.fromkeys(name for values in fields for name in values))


def _field(row: Row, name: str) -> Any:
    """Return the value of a varied field: "null" for an explicit null, None without a value."""
    if name in row.fields and row.fields[name] is None:
        return "null"
    return row.fields.get(name)


def trials_in(text: str) -> set[str]:
    """Return the names of the trials in a comparison.csv."""
    return {row["trial"] for row in csv.DictReader(io.StringIO(text))}


def _csv_cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, bool | list | dict) else value


def table(rows: Iterable[Row]) -> str:
    """Return the table for the terminal: a line per setting, at most WIDTH columns.

    The settings that have no rank follow, with the reason.
    """
    settings = rank(rows)
    ranked = [s for s in settings if s.rank is not None]
    unranked = [s for s in settings if s.rank is None]
    lines = []
    if ranked:
        lines += [_ranking(ranked), *_notes(ranked)]
    if unranked:
        lines.append("not ranked:" if ranked else "nothing to rank yet:")
        width = min(max(len(s.name) for s in unranked), WIDTH // 2)
        lines += [_unranked(s, width) for s in unranked]
    return "\n".join(lines)


def _ranking(ranked: list[Setting]) -> str:
    """Return one line per setting. comparison.csv has the fields that vary."""
    lines = [["rank", "setting", "steps", ranked[0].trials[0].metric]]
    lines[0] += ["spread", "seeds", "above best", ""]
    for s in ranked:
        name = clip(s.name, WIDTH - OTHER_COLUMNS)
        steps = f"{s.trials[0].steps:,}"
        lines.append([str(s.rank), name, steps, *_results(s, ranked[0])])
    return aligned(lines, left=(1,))


def _results(s: Setting, best: Setting) -> list[str]:
    spread = "" if s.spread is None else f"{s.spread:.4f}"
    above = "" if s is best else f"{s.mean - best.mean:+.4f}"
    return [f"{s.mean:.4f}", spread, str(len(s.values)), above, "~" if s.ties else ""]


def _notes(ranked: list[Setting]) -> list[str]:
    """Return the line below the table that says what the seeds can tell apart."""
    seeds = max(len(s.values) for s in ranked)
    ties = sum(s.ties for s in ranked)
    if seeds == 1:
        note = (
            "one seed: the spread is unknown, so small differences may be chance; try sweep.seeds=3"
        )
        return [note + (" (~: equal to the best)" if ties else "")]
    if ties:
        return [f"~ {ties} that {seeds} seeds cannot tell from the best ({TEST})"]
    if len(ranked) > 1:
        return [f"all others differ from the best over {seeds} seeds ({TEST})"]
    return []


def _unranked(s: Setting, width: int) -> str:
    reason = " ".join((s.reason or "").split())
    line = f"  {clip(s.name, width):<{width}}  {s.state:<8}  {reason}".rstrip()
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
