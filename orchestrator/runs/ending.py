"""How a run, a stage or a sweep ended."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator import files
from orchestrator.errors import (
    EXIT_AGAIN,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER,
    NO_ROOM,
)

Kind = Literal["done", "failed", "user", "again", "interrupted", "diverged", "stopped"]
Cause = Literal[
    "out_of_memory", "disk_full", "disk_error", "store_away", "hang", "held", "kill", "exception"
]
MlflowStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class _Report:
    """Exit status and MLflow status for one kind of ending."""

    exit_status: int
    mlflow_status: MlflowStatus


_REPORTS: dict[Kind, _Report] = {
    "done": _Report(EXIT_DONE, "FINISHED"),
    "failed": _Report(EXIT_FAILED, "FAILED"),
    "user": _Report(EXIT_USER, "FAILED"),
    "again": _Report(EXIT_AGAIN, "KILLED"),
    "interrupted": _Report(EXIT_INTERRUPTED, "KILLED"),
    "diverged": _Report(EXIT_FAILED, "FAILED"),
    "stopped": _Report(EXIT_DONE, "KILLED"),
}


@dataclass(frozen=True)
class Ending:
    """How a run, a stage or a sweep ended.

    Attributes:
        kind: done: all steps were trained.
            failed: a fault that the user cannot fix.
            user: the user has to change something first, such as a micro-batch that is too large.
            again: stopped on request with a checkpoint; the same command continues.
            interrupted: Ctrl-C.
            diverged: the loss is not finite or above `sweep.diverged_above`.
            stopped: a scheduler stopped the trial because others were better.
        reason: One or more lines for the user; None if there is nothing to explain.
        facts: JSON values about this ending, such as `step` or `traceback`.
        cause: Kind of fault, where `workers.diagnose` found one.
    """

    kind: Kind
    reason: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    cause: Cause | None = None

    @property
    def exit_status(self) -> int:
        """Exit status of the driver."""
        return _REPORTS[self.kind].exit_status

    @property
    def mlflow_status(self) -> MlflowStatus:
        """Status of the MLflow run."""
        return _REPORTS[self.kind].mlflow_status

    @property
    def may_be_transient(self) -> bool:
        """True for faults that often do not happen again; a stage is then tried again."""
        return self.cause in ("hang", "held", "kill", "disk_error", "store_away")

    def to_json(self) -> dict[str, Any]:
        """Return the content of stopped.json.

        The facts are fields of their own, so that stopped.json has `step` at the top level.
        """
        stored: dict[str, Any] = {"kind": self.kind, "reason": self.reason}
        if self.cause is not None:
            stored["cause"] = self.cause
        if self.kind in ("again", "user"):
            stored[self.kind] = True  # documented: scripts test for `"again": true`
        return stored | dict(self.facts)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "Ending":
        """Read what `to_json` or an earlier version of this program wrote.

        Raises:
            LookupError: It is something else.
        """
        kind: Kind = stored.get("kind") or _kind_before_endings(stored)
        _REPORTS[kind]
        own = ("kind", "reason", "cause", "again", "user")
        facts = {key: value for key, value in stored.items() if key not in own}
        return cls(kind, stored["reason"], facts, stored.get("cause"))


def _kind_before_endings(stored: Mapping[str, Any]) -> Kind:
    """Return the kind in a file of an earlier version, which has flags or `outcome` instead."""
    if "outcome" in stored:
        return stored["outcome"]
    if stored.get("again"):
        return "again"
    if stored.get("user"):
        return "user"
    if "windows" in stored:
        return "diverged"
    return "failed"


def write_with_reserve(path: Path, text: str, reserve: Path) -> None:
    """Write a file atomically; on a full disk, into the space that the file `reserve` has."""
    try:
        files.write_atomically(path, text)
    except OSError as error:
        if error.errno not in NO_ROOM or not reserve.exists():
            raise
        # Overwrite the reserved file: other processes could take space that we free first.
        with open(reserve, "r+b", buffering=0, opener=files.opener) as file:
            file.write(text.encode())
            file.truncate()
        os.replace(reserve, path)
