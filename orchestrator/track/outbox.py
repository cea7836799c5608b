"""Records what MLflow has accepted, and queues the metrics to be sent. Imports no mlflow."""

import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator import files
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Line

BATCH = 1000  # rows of one request; MLflow's limit


# ---- what was accepted ----


@dataclass
class SentCheckpoint:
    """MLflow's record of a checkpoint.

    Attributes:
        model_id: MLflow's id of the logged model.
        sha256: SHA-256 of the checkpoint's manifest; None after the checkpoint was removed.
    """

    model_id: str
    sha256: str | None


@dataclass
class Sent:
    """Content of tracking.json: what the server has accepted.

    Attributes:
        uri: Tracking URI without secrets.
        key: Key of the run in run.json.
        experiment: Name of the MLflow experiment.
        experiment_id: MLflow's id of the experiment.
        run_id: MLflow's id of the run.
        sent_step: Last step that was sent from the journal. Step 0 is the evaluation before
            training, so -1 means none.
        asides: Number of asides that were sent; see `runs.journal`. `sent_step` refers to the
            journal after that many resumes.
        checkpoints: Logged models, by name of the checkpoint's folder.
        samples: Mark (see `file_mark`) of each file of generated text, by file name.
        documents: Mark of each other file, by its path in the run folder.
        view: Value of the tag that stores the view of a sweep.
        best: Model id of a sweep's best checkpoint, to which the alias in the registry points.
        mark: State of a trial's files when they were last sent.
    """

    uri: str
    key: str | None
    experiment: str = ""
    experiment_id: str | None = None
    run_id: str | None = None
    sent_step: int = -1
    asides: int = 0
    checkpoints: dict[str, SentCheckpoint] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    view: str | None = None
    best: str | None = None
    mark: str | None = None

    @classmethod
    def read(cls, folder: RunFolder) -> "Sent | None":
        """Read tracking.json; None if it is missing or damaged."""
        return files.read_derived(folder.tracking_file, cls._parse)

    @classmethod
    def _parse(cls, stored: dict[str, Any]) -> "Sent":
        sent = cls(**stored)
        for name, known in stored.get("checkpoints", {}).items():
            sent.checkpoints[name] = SentCheckpoint(**known)
        return sent

    def without_values(self) -> "Sent":
        """Return a record of the same run that has accepted nothing."""
        return Sent(self.uri, self.key, self.experiment, self.experiment_id, self.run_id)

    def write(self, folder: RunFolder) -> None:
        """Replace tracking.json.

        Not forced to disk: after a power failure, values are sent again, which changes nothing.
        """
        files.write_json(folder.tracking_file, asdict(self))


def file_mark(path: Path) -> str | None:
    """Return size and time of a file or folder, which change if it is written again.

    Returns None if it does not exist.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return f"{stat.st_size} {stat.st_mtime_ns}"


# ---- metrics ----


class Row(NamedTuple):
    """One value of a metric. The order is that of `mlflow.entities.Metric`."""

    key: str
    value: float
    timestamp: int  # milliseconds
    step: int


@dataclass(frozen=True)
class Batch:
    """Rows that are sent together.

    Attributes:
        rows: At most `BATCH` rows, unless one journal line has more. All rows of a line are in the
            same batch.
        sent_step: `Sent.sent_step` after the server has accepted the rows.
        asides: `Sent.asides` after the server has accepted the rows.
    """

    rows: list[Row]
    sent_step: int
    asides: int


class MetricQueue:
    """Rows of a run that are still to be sent.

    Each (metric, step) is sent once. After a resume, the first value written wins: it may have been
    sent already, and MLflow would show the value of the repeated step as a second point, because
    its timestamp is later. So the lines of asides are sent first. Then the lines of the journal
    after the step of the resume are sent, without the values that an aside has.

    Args:
        folder: Folder of the run.
        known: (metric, step) of values that the server has and that are not sent again.
    """

    def __init__(self, folder: RunFolder, known: Collection[tuple[str, int]] = ()) -> None:
        self.folder = folder
        self.known = known
        self._tail = journal.Tail(folder)
        self._waiting: list[Batch] = []  # one for each line
        self._last_step = -1  # last step that was read from the journal
        self._asides = -1  # number of asides that were read; -1 before the first read
        self._aside_values: set[tuple[str, int]] = set()  # (metric, step)
        self._aside_lines: set[tuple[int, int]] = set()  # (step, timestamp)

    def refresh(self, sent: Sent) -> None:
        """Read the lines that are new, or all lines after a resume."""
        inode = self._tail.inode
        lines = self._tail.poll()
        is_replaced = inode != self._tail.inode
        if is_replaced or self._asides != journal.generation(self.folder):
            lines = self._read_all(sent)
        for line in lines:
            self._add_line(line)
        if self._waiting:
            # A power failure must not remove lines that MLflow has received.
            journal.sync(self.folder)

    def batches(self) -> Iterator[Batch]:
        """Yield the rows in order. A batch leaves the queue when the next one is requested."""
        while self._waiting:
            count = self._batch_size()
            lines = self._waiting[:count]
            rows = [row for line in lines for row in line.rows]
            yield Batch(rows, lines[-1].sent_step, lines[-1].asides)
            del self._waiting[:count]

    def _batch_size(self) -> int:
        """Return how many lines fit into one request; at least one."""
        rows = 0
        for count, line in enumerate(self._waiting):
            rows += len(line.rows)
            if count and rows > BATCH:
                return count
        return len(self._waiting)

    def _read_all(self, sent: Sent) -> list[Line]:
        """Queue the asides that were not sent yet. Return all lines of the journal."""
        # The journal is read first: if a resume moves a line now, it is read twice. In the other
        # order, it would be missed.
        lines = journal.read(self.folder)
        self._waiting = []
        self._aside_values = set()
        self._aside_lines = set()
        self._last_step = sent.sent_step
        self._asides = 0
        for aside in journal.asides(self.folder):
            self._asides = aside.number + 1
            is_new = self._asides > sent.asides
            if is_new:
                self._last_step = min(self._last_step, aside.first_step - 1)
            for line in aside.read():
                rows = self._without_aside_values(line)
                self._aside_lines.add((line["step"], line["timestamp"]))
                self._aside_values.update((row.key, row.step) for row in rows)
                if is_new:
                    self._waiting.append(Batch(rows, sent.sent_step, sent.asides))
        if self._asides != sent.asides:
            self._waiting.append(Batch([], self._last_step, self._asides))
        return lines

    def _add_line(self, line: Line) -> None:
        # A line is in both files if it was just moved, or if the resume was killed before it cut
        # the journal. It is skipped: its step may be repeated and then log more metrics.
        is_moved = (line["step"], line["timestamp"]) in self._aside_lines
        if line["step"] <= self._last_step or is_moved:
            return
        self._last_step = line["step"]
        rows = self._without_aside_values(line)
        self._waiting.append(Batch(rows, self._last_step, self._asides))

    def _without_aside_values(self, line: Line) -> list[Row]:
        return [
            row
            for row in rows_of(line)
            if (row.key, row.step) not in self._aside_values
            and (row.key, row.step) not in self.known
        ]


def rows_of(line: Line) -> list[Row]:
    """Return the finite numbers of a journal line.

    MLflow would draw infinity as 1.8e308, which spoils the chart. The journal keeps these values.
    """
    rows = []
    for key, value in line.items():
        is_number = key not in ("step", "timestamp") and isinstance(value, (int, float))
        if is_number and math.isfinite(value):
            rows.append(Row(key, float(value), line["timestamp"], line["step"]))
    return rows


def accepted_rows(folder: RunFolder, sent: Sent) -> list[Row]:
    """Return the rows that the server has accepted, one per metric and step, rising by step.

    Empty if a resume has moved lines since: then it is not known which of them were sent.
    """
    if journal.generation(folder) != sent.asides:
        return []
    moved = [line for aside in journal.asides(folder) for line in aside.read()]
    lines = [line for line in journal.read(folder) if line["step"] <= sent.sent_step]
    first: dict[tuple[str, int], Row] = {}
    for line in moved + lines:
        for row in rows_of(line):
            first.setdefault((row.key, row.step), row)
    return sorted(first.values(), key=lambda row: row.step)
