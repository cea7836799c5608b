"""Numbers, durations and tables as text for people."""

import json
from collections.abc import Iterable
from typing import Any


def duration(seconds: float) -> str:
    """`58s`, `4m10s`, `3h05m`, `2d04h`."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def table(rows: dict[str, Any]) -> str:
    """Two aligned columns; None is left out."""
    rows = {k: v for k, v in rows.items() if v is not None}
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {key:<{width}}  {value}" for key, value in rows.items())


def number(value: Any) -> str:
    """Integers and floats with separators, floats below 1,000 with four decimals, the rest as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return json.dumps(value) if isinstance(value, (dict, list)) else str(value)
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.4f}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )


def clip(text: str, width: int) -> str:
    """The text, or both its ends with … between them: names differ at the end as often as at the start."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def short_names(names: Iterable[str]) -> dict[str, str]:
    """{name: the name without the parts, between underscores, that all names of as many parts have in common}.

    >>> short_names(["kind-wsd_max_lr-0.1_seed-1", "kind-wsd_max_lr-0.2_seed-1"])
    {'kind-wsd_max_lr-0.1_seed-1': 'lr-0.1', 'kind-wsd_max_lr-0.2_seed-1': 'lr-0.2'}
    """
    groups: dict[int, list[list[str]]] = {}
    for name in dict.fromkeys(names):
        groups.setdefault(name.count("_"), []).append(name.split("_"))
    short = {}
    for group in groups.values():
        kept = [i for i in range(len(group[0])) if len({parts[i] for parts in group}) > 1]
        short |= {
            "_".join(parts): "_".join(parts[i] for i in kept) or "_".join(parts) for parts in group
        }
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


def aligned(lines: list[list[str]], left: Iterable[int]) -> str:
    """Columns two spaces apart; those in `left` to the left, the rest, numbers, to the right."""
    left, widths = set(left), [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
