"""Compares journal lines and tensors bit by bit."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestrator.runs import metrics
from orchestrator.runs.journal import Line


@dataclass(frozen=True)
class Difference:
    """A value that differs between the run and its replay.

    Attributes:
        step: Step of the journal line or checkpoint.
        key: Metric, or part of the checkpoint and name of the tensor.
        then: Value that the run stored; None if it stored none.
        now: Value of the replay; None if there is none.
        note: The difference in words, if it is not one between two numbers.
    """

    step: int
    key: str
    then: float | None = None
    now: float | None = None
    note: str = ""

    def __str__(self) -> str:
        return f"step {self.step:,}, {self.key}: {self.note or self._values()}"

    def _values(self) -> str:
        if self.then is None or self.now is None:
            return _missing(self.then is None)
        return f"{_shown(self.then)} then, {_shown(self.now)} now"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values. Floats are stored as text, because JSON has no infinity."""
        stored: dict[str, Any] = {"step": self.step, "what": self.key}
        for name, value in (("then", self.then), ("now", self.now)):
            if value is not None:
                stored[name] = {"decimal": repr(value), "hex": float(value).hex()}
        return stored | {"note": self.note, "text": str(self)}


def compare_lines(step: int, then: Line, now: Line) -> list[Difference]:
    """Return the exact metrics that differ. Pass an empty line for a missing one."""
    differences = []
    for key in {**then, **now}:
        if not metrics.of(key).exact:
            continue
        before = then.get(key)
        after = now.get(key)
        # Compared as text: NaN then equals itself, and 0.0 differs from -0.0.
        if repr(before) != repr(after):
            differences.append(Difference(step, key, before, after))
    return differences


def compare_tensors(
    step: int, part: str, then: dict[str, Tensor], now: dict[str, Tensor]
) -> list[Difference]:
    """Return the tensors that differ in a part of a checkpoint, each with its first difference."""
    differences = []
    for name in sorted({*then, *now}):
        key = f"{part} {name}"
        before = then.get(name)
        after = now.get(name)
        if before is None or after is None:
            differences.append(Difference(step, key, note=_missing(before is None)))
        elif before.shape != after.shape or before.dtype != after.dtype:
            note = f"{_kind(before)} then, {_kind(after)} now"
            differences.append(Difference(step, key, note=note))
        else:
            differences += _compare_elements(step, key, before.reshape(-1), after.reshape(-1))
    return differences


def _compare_elements(step: int, key: str, then: Tensor, now: Tensor) -> list[Difference]:
    # Compared as bytes, so that a NaN equals itself.
    differs = then.view(torch.uint8) != now.view(torch.uint8)
    differs = differs.view(-1, then.element_size()).any(1)
    if not differs.any():
        return []
    index = int(differs.nonzero()[0])
    before = then[index].item()
    after = now[index].item()
    counts = f"({int(differs.sum()):,} of {len(differs):,} differ)"
    return [Difference(step, f"{key}[{index}] {counts}", before, after)]


def _missing(was_missing: bool) -> str:
    return "missing in the run" if was_missing else "missing in the replay"


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _shown(value: float) -> str:
    return f"{float(value).hex()} ({value!r})"
