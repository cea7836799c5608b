"""Numbers, durations and tables as text."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def duration(seconds: float) -> str:
    """Return a duration as `58s`, `4m10s`, `3h05m` or `2d04h`."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def table(rows: Mapping[str, Any]) -> str:
    """Return names and values as two aligned columns. Rows with the value None are left out."""
    shown = {name: value for name, value in rows.items() if value is not None}
    width = max((len(name) for name in shown), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in shown.items())


def number(value: Any) -> str:
    """Return a number with separators; a float below 1,000 has four decimals.

    Dicts and lists become JSON, other values `str(value)`.
    """
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if abs(value) < 1000:
        return f"{value:,.4f}"
    return f"{value:,.0f}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each key of `now` with another value before.

    >>> differences({"train.seed": 1, "name": "a"}, {"train.seed": 2, "name": "a"})
    ['train.seed: before 1, now 2']
    """
    return [
        f"{key}: before {before.get(key)!r}, now {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]


def clip(text: str, width: int) -> str:
    """Return the text; if it is longer than `width`, its start and its end with … between them.

    The end is kept because names of trials often differ there.
    """
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> str:
    """Return lines of cells as columns, two spaces apart.

    Args:
        lines: Cells of each line. All lines have the same number of cells.
        left: Indices of columns that are aligned to the left; the others hold numbers.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    rows = []
    for line in lines:
        cells = []
        for i, cell in enumerate(line):
            cells.append(cell.ljust(widths[i]) if i in left else cell.rjust(widths[i]))
        rows.append("  ".join(cells).rstrip())
    return "\n".join(rows)
