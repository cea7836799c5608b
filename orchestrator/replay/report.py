"""The result of a replay: all differences, the first of them, and the likely causes."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from orchestrator.files import write_json
from orchestrator.replay.compare import Difference
from orchestrator.replay.recorded import Stretch
from orchestrator.runs import events, metrics
from orchestrator.runs.folder import RunFolder

# The most likely cause first.
ChangeKind = Literal["data", "seed", "experiment", "numerics", "code"]
CauseKind = ChangeKind | Literal["unknown"]


@dataclass(frozen=True)
class Cause:
    """Why a replay may differ.

    Attributes:
        kind: What has changed.
        what: A description of the change.
    """

    kind: CauseKind
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclass
class ReplayResult:
    """The result of a replay.

    Attributes:
        stretch: Steps that were trained again.
        lines: Number of journal lines that were compared.
        differences: Sorted by step; the journal line of a step comes before its checkpoint.
        weights: Whether each compared checkpoint is equal, by step.
        changes: What has changed since the run was trained.
        damaged: Messages about checkpoints that were skipped.
    """

    stretch: Stretch
    lines: int = 0
    differences: list[Difference] = field(default_factory=list)
    weights: dict[int, bool] = field(default_factory=dict)
    changes: list[Cause] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether nothing could be trained again."""
        return not self.lines and not self.weights

    @property
    def equal(self) -> bool:
        """Whether everything was compared and has the same bits."""
        return not self.differences and not self.is_empty

    def causes(self) -> list[Cause]:
        """Return why the replay differs, the most likely cause first; empty if it is equal."""
        if self.equal:
            return []
        kinds = get_args(ChangeKind)
        causes = sorted(self.changes, key=lambda change: kinds.index(change.kind))
        if not causes:
            causes.append(
                Cause(
                    "unknown",
                    "data, experiment, numerics and code have not changed. What remains is "
                    "hardware that does not give the same bits twice (attention and atomic "
                    "additions on some GPUs, faulty memory), and a journal that was edited",
                )
            )
        return causes

    def sentence(self) -> str:
        """Return the result in one sentence.

        For example `9 logged lines of steps 4..12 equal, weights equal (step 12)`.
        """
        steps = f"steps {self.stretch.first:,}..{self.stretch.last:,}"
        if self.is_empty:
            return f"{steps} cannot be trained again"
        if self.differences:
            return f"{steps} differ, first at {self.differences[0]}"
        weights = "no checkpoint to compare weights with"
        if self.weights:
            weights = f"weights equal (step {', '.join(f'{step:,}' for step in self.weights)})"
        plural = "" if self.lines == 1 else "s"
        return f"{self.lines:,} logged line{plural} of {steps} equal, {weights}"

    def rows(self) -> dict[str, Any]:
        """Return the rows of the printed table."""
        stretch = self.stretch
        wrong_lines = {d.step for d in self.differences if metrics.of(d.key).exact}
        lines = f"{self.lines:,}, equal"
        if wrong_lines:
            lines = f"{len(wrong_lines):,} of {self.lines:,} differ"
        rows: dict[str, Any] = {
            "steps": f"{stretch.first:,}..{stretch.last:,}, trained again from {stretch.origin}",
            "logged lines": lines,
            "weights": self._weights_row(),
        }
        rows |= _numbered("skipped", self.damaged)
        if self.equal:
            changes = [f"{change} (without effect)" for change in self.changes]
            return rows | _numbered("changed since", changes)
        return rows | _numbered("cause", self.causes())

    def _weights_row(self) -> str:
        words = {True: "equal", False: "differ"}
        rows = [f"step {step:,} {words[equal]}" for step, equal in self.weights.items()]
        return ", ".join(rows) or "not compared: these steps have no valid checkpoint"

    def to_json(self) -> dict[str, Any]:
        """Return the content of replays/<time>.json without the time."""
        return {
            "equal": self.equal,
            "verdict": self.sentence(),
            "steps": [self.stretch.first, self.stretch.last],
            "begin": self.stretch.begin,
            "lines": self.lines,
            "weights": {str(step): equal for step, equal in self.weights.items()},
            "differing": len(self.differences),
            "first": self.differences[0].to_json() if self.differences else None,
            "causes": [asdict(cause) for cause in self.causes()],
            "changed": [asdict(change) for change in self.changes],
            "passed_over": self.damaged,
        }


def new_scratch(folder: RunFolder) -> RunFolder:
    """Create a folder for a replay, named by the time.

    It is in the run folder, because that disk has room for checkpoints.
    """
    scratch = folder.replays / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    scratch.mkdir(parents=True)
    return RunFolder(scratch)


def store_report(report: ReplayResult, folder: RunFolder, scratch: RunFolder) -> Path:
    """Write the report beside `scratch` and add an event to the run. Return the file."""
    file = folder.replay_file(scratch.name)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(file, {"time": now, **report.to_json()})
    events.note(
        folder,
        "replay",
        report.sentence(),
        equal=report.equal,
        steps=[report.stretch.first, report.stretch.last],
        verdict=file.relative_to(folder.path).as_posix(),
        causes=[str(cause) for cause in report.causes()],
    )
    return file


def _numbered(name: str, values: Iterable[object]) -> dict[str, Any]:
    """Return one row per value. The second row is named `<name> 2`, and so on."""
    rows: dict[str, Any] = {}
    for number, value in enumerate(values, 1):
        rows[name if number == 1 else f"{name} {number}"] = value
    return rows
