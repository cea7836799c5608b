"""The verdict on a run made again: what differs, where first, and why as far as it can be told. Pure but for torch.

Eats pairs of journal lines and of tensors, then and now; yields `Difference`s to the last bit, and the sentences and the
JSON of a `Verdict`.
"""

import math
import struct
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from orchestrator.runs import metrics

KINDS = ("data", "seed", "experiment", "numerics", "code")  # of causes, the likeliest first


@dataclass(frozen=True)
class Difference:
    """`key` at `step`, as logged or stored then and as made now; None where it is not there. `note`: what no value says."""

    step: int
    key: str
    then: float | None = None
    now: float | None = None
    ulps: int | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.note:
            return f"step {self.step:,}, {self.key}: {self.note}"
        if self.then is None or self.now is None:
            return f"step {self.step:,}, {self.key}: {'not there then, but now' if self.then is None else 'there then, not now'}"
        apart = f", {self.ulps:,} ulp apart" if self.ulps is not None else ""
        return f"step {self.step:,}, {self.key}: {_shown(self.then)} then, {_shown(self.now)} now{apart}"

    def to_json(self) -> dict[str, Any]:
        """Values in decimals and as hex floats: both read back to the same bits, and inf is JSON in neither.

        No name in it is one under which `provenance` would expect a secret.
        """
        values = {
            name: {"decimal": repr(v), "hex": float(v).hex()}
            for name, v in (("then", self.then), ("now", self.now))
            if v is not None
        }
        return {
            "step": self.step,
            "what": self.key,
            **values,
            "ulps": self.ulps,
            "note": self.note,
            "text": str(self),
        }


@dataclass(frozen=True)
class Cause:
    """Something that is not what it was when the run was made. `kind`: one of `KINDS`, or journal, or unknown."""

    kind: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclass
class Verdict:
    """What came of steps `first_step` … `last_step`, made again from the checkpoint of step `begin` (None: from nothing)."""

    first_step: int
    last_step: int
    begin: int | None
    lines: int = 0  # that were compared
    differences: list[Difference] = field(
        default_factory=list
    )  # by rising step; a line's before its checkpoint's
    weights: dict[int, bool] = field(
        default_factory=dict
    )  # {step: equal} of the checkpoints that were compared
    changed: list[Cause] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differences and all(self.weights.values()) and not self.impossible

    @property
    def impossible(self) -> bool:
        """Whether nothing could be made again."""
        return not self.lines and not self.weights

    @property
    def first(self) -> Difference | None:
        return self.differences[0] if self.differences else None

    def causes(self) -> list[Cause]:
        """Why it differs, the likeliest first; never empty where it does."""
        if self.equal:
            return []
        after = [
            step
            for step, equal in self.weights.items()
            if equal and self.first and step >= self.first.step
        ]
        found = sorted(self.changed, key=lambda cause: KINDS.index(cause.kind))
        if after and metrics.of(self.first.key).interval == "log":
            found.insert(
                0,
                Cause(
                    "journal",
                    f"weights and moments of step {after[0]:,} are the same bits, so the training was "
                    f"the same: the line was changed after it was written",
                ),
            )
        return found or [
            Cause(
                "unknown",
                "data, experiment, numerics and code are what they were. Left are hardware that does "
                "not give the same bits twice (attention and atomic additions on some GPUs, faulty "
                "memory) and a journal that was changed",
            )
        ]

    def sentence(self) -> str:
        """`9 logged lines of steps 4..12 equal, weights equal`, or what is different first."""
        stretch = f"steps {self.first_step:,}..{self.last_step:,}"
        if self.impossible:
            return f"{stretch} cannot be made again"
        if self.first:
            return f"{stretch} differ, first at {self.first}"
        compared = [f"{step:,}" for step in self.weights]
        weights = (
            f"weights equal (step {', '.join(compared)})"
            if compared
            else "no checkpoint to compare weights with"
        )
        return f"{self.lines:,} logged line{'s' * (self.lines != 1)} of {stretch} equal, {weights}"

    def rows(self) -> dict[str, Any]:
        """The table that a person sees."""
        wrong = {d.step for d in self.differences if metrics.of(d.key).exact}
        start = f"the checkpoint of step {self.begin:,}" if self.begin is not None else "step 0"
        rows = {
            "steps": f"{self.first_step:,}..{self.last_step:,}, made again from {start}",
            "logged lines": f"{len(wrong):,} of {self.lines:,} differ"
            if wrong
            else f"{self.lines:,}, equal",
            "weights": ", ".join(
                f"step {step:,} {'equal' if equal else 'differ'}"
                for step, equal in self.weights.items()
            )
            or "not compared: no valid checkpoint stands in these steps",
        }
        rows |= {f"passed over{_number(i)}": text for i, text in enumerate(self.passed_over)}
        if self.equal:
            return rows | {
                f"changed since{_number(i)}": f"{cause} (without effect)"
                for i, cause in enumerate(self.changed)
            }
        rows["first difference"] = self.first
        return rows | {f"cause{_number(i)}": cause for i, cause in enumerate(self.causes())}

    def to_json(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "verdict": self.sentence(),
            "steps": [self.first_step, self.last_step],
            "begin": self.begin,
            "lines": self.lines,
            "weights": {str(step): equal for step, equal in self.weights.items()},
            "differing": len(self.differences),
            "first": self.first.to_json() if self.first else None,
            "causes": [asdict(cause) for cause in self.causes()],
            "changed": [asdict(cause) for cause in self.changed],
            "passed_over": self.passed_over,
        }


def of_lines(step: int, then: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """The keys of a journal's line that differ in a bit or are missing; an absent line is an empty one."""
    keys = [key for key in {**then, **now} if metrics.of(key).exact]
    return [
        Difference(step, key, then.get(key), now.get(key), ulps(then.get(key), now.get(key)))
        for key in keys
        if key not in then or key not in now or _bits(then[key]) != _bits(now[key])
    ]


def of_tensors(
    step: int, part: str, then: dict[str, Tensor], now: dict[str, Tensor]
) -> list[Difference]:
    """The tensors of a checkpoint's part that differ, each with its first element that does."""
    found = []
    for name in sorted({*then, *now}):
        before, after, key = then.get(name), now.get(name), f"{part} {name}"
        if before is None or after is None:
            found.append(
                Difference(
                    step,
                    key,
                    note="not there then, but now" if before is None else "there then, not now",
                )
            )
        elif before.shape != after.shape or before.dtype != after.dtype:
            words = [
                f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in (before, after)
            ]
            found.append(Difference(step, key, note=f"{words[0]} then, {words[1]} now"))
        else:
            found += _of_elements(step, key, before.reshape(-1), after.reshape(-1))
    return found


def _of_elements(step: int, key: str, then: Tensor, now: Tensor) -> list[Difference]:
    size = then.element_size()
    wrong = (
        (then.view(torch.uint8) != now.view(torch.uint8)).view(-1, size).any(1)
    )  # as bytes: a NaN equals itself
    if not wrong.any():
        return []
    i = int(wrong.nonzero()[0])
    a, b = then[i].item(), now[i].item()
    apart = ulps(a, b, "fi") if then.dtype == torch.float32 else None
    return [
        Difference(step, f"{key}[{i}] ({int(wrong.sum()):,} of {len(wrong):,} differ)", a, b, apart)
    ]


def ulps(a: float | None, b: float | None, formats: str = "dq") -> int | None:
    """How many floats lie from one to the other: of float64 (`dq`) or float32 (`fi`). None where one is no number."""
    if a is None or b is None or math.isnan(a) or math.isnan(b):
        return None
    return abs(_ordinal(a, formats) - _ordinal(b, formats))


def _ordinal(value: float, formats: str) -> int:
    """Floats in their order as integers: their bits, mirrored below zero."""
    bits = struct.unpack(f"<{formats[1]}", struct.pack(f"<{formats[0]}", value))[0]
    return bits if bits >= 0 else -(bits & (1 << 8 * struct.calcsize(formats[1]) - 1) - 1)


def _bits(value: float) -> bytes:
    return struct.pack("<d", value)


def _shown(value: float) -> str:
    return f"{float(value).hex()} ({value!r})"


def _number(i: int) -> str:
    return f" {i + 1}" if i else ""
