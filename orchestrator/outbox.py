"""The outbox: which lines of a run's journal a tracking server still has to be told, each exactly once.

Eats the journal and the lines that resumes moved aside; yields rows (key, value, timestamp in ms, step) in batches. It
knows no server: the caller keeps `sent_step`, the step up to which everything was accepted.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator import journal

BATCH = 1000  # rows in one request: MLflow's limit


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The journal as MLflow has to see it: of each step the first line ever written, by rising step.

    A step made again after a resume has the same losses and a later timestamp; its first line may have been sent.
    """
    first: dict[int, dict[str, Any]] = {}
    current = journal.read(run_dir)  # before the asides: what moves meanwhile is then seen twice, not never
    moved = [json.loads(line) for file in journal.aside_files(run_dir) for line in file.read_text("utf-8").splitlines()]
    for record in [*moved, *current]:
        first.setdefault(record["step"], record)
    return [first[step] for step in sorted(first)]


class Outbox:
    """Lines above `sent_step`, read once each; a resume (new file, new aside) makes it read everything again."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.tail, self.asides, self.waiting = run_dir, journal.Tail(run_dir), None, []

    def refresh(self, sent_step: int) -> None:
        inode, new, asides = self.tail.inode, self.tail.poll(), len(journal.aside_files(self.run_dir))
        if (inode, self.asides) != (self.tail.inode, asides):
            self.waiting, new, self.asides = [], history(self.run_dir), asides
        for record in new:
            if record["step"] > (self.waiting[-1]["step"] if self.waiting else sent_step):
                self.waiting.append(record)

    def batches(self) -> Iterator[tuple[int, list[tuple[str, float, int, int]]]]:
        """(last step, rows up to it as (key, value, timestamp, step)); a batch leaves once the caller comes back."""
        while self.waiting:
            rows, count = [], 0
            for record in self.waiting:
                more = rows_of(record)
                if rows and len(rows) + len(more) > BATCH:
                    break
                rows, count = rows + more, count + 1
            yield self.waiting[count - 1]["step"], rows
            del self.waiting[:count]


def rows_of(record: dict[str, Any]) -> list[tuple[str, float, int, int]]:
    """A line's numbers. MLflow draws inf as 1.8e308, which ruins a chart: what is not finite stays in the journal."""
    return [(key, float(value), record["timestamp"], record["step"]) for key, value in record.items()
            if key not in ("step", "timestamp") and isinstance(value, (int, float)) and math.isfinite(value)]
