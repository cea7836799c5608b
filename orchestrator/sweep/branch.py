"""A trial as the tree of stages sees it: a root, and the settings of every step (`StepSettings`).

The root is a hash of everything that is the same at every step (data, model, optimizer, seed), and
of the settings of step 0 but the learning rate.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from orchestrator.config.steps import NAMES, Steps

Column = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Branch:
    """A trial as the tree sees it.

    Attributes:
        name: Name of the trial.
        root: Hash of everything that is the same at every step, and of the settings of step 0.
        rates: Learning rate of every update, float64, (max_steps,).
        is_probe: True for a probe, which is not one of the user's trials.
        others: The other settings of every update by name, (max_steps,) each. A setting that no
            step changes may be left out, because its value is in the root.
    """

    name: str
    root: str
    rates: Column
    is_probe: bool = False
    others: Mapping[str, Column] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return len(self.rates)

    @cached_property
    def changes(self) -> dict[str, int]:
        """First step at which a setting, not the learning rate, is not that of step 0, by name."""
        found = {}
        for name, column in sorted(self.others.items()):
            bits = column.view(np.int64)
            different = np.flatnonzero(bits != bits[0])
            if len(different) > 0:
                found[name] = int(different[0])
        return found

    def update(self, step: int) -> tuple[bytes, ...]:
        """Return the learning rate of the update made at `step`, and the settings that changed."""
        changed = [name for name, first in self.changes.items() if first <= step]
        others = [name.encode() + self.others[name][step].tobytes() for name in changed]
        return (self.rates[step].tobytes(), *others)

    def first_difference(self, other: "Branch", start: int, stop: int) -> int:
        """Return the first step in [start, stop) that is not that of `other`; `stop` if none is.

        Both branches have the same root and the same steps before `start`.
        """
        found = [_first_difference(self.rates, other.rates, start, stop)]
        for name in {*self.changes, *other.changes}:
            if name in self.others and name in other.others:
                column, others = self.others[name], other.others[name]
                found.append(_first_difference(column, others, start, stop))
            else:  # the same until one of them changes
                found += [one.changes[name] for one in (self, other) if name in one.changes]
        return min(stop, *found)

    def first(self, steps: int) -> "Branch":
        """Return the branch without its later steps."""
        others = {name: column[:steps] for name, column in self.others.items()}
        return replace(self, rates=self.rates[:steps], others=others)

    def decay_start(self) -> int | None:
        """Return the end of the last stretch of equal rates; None if no other rate follows it."""
        equal = np.flatnonzero(np.diff(self.rates) == 0)
        if len(equal) == 0:
            return None
        end = int(equal[-1]) + 2
        return end if end < self.steps else None

    def key(self, step: int) -> str:
        """Return the key of the state after `step` updates, which is the same in all sweeps."""
        return self.keys([step])[step]

    def keys(self, steps: Iterable[int]) -> dict[int, str]:
        """Return `key` of each of some rising steps, in one pass over the settings.

        A setting is a part of the key once it has changed: the root has its value at step 0.
        """
        columns = {"": self.rates, **{name: self.others[name] for name in self.changes}}
        digests = {name: hashlib.sha256() for name in columns}
        digests[""].update(f"{self.root}/".encode())
        before = 0
        found = {}
        for step in steps:
            assert before <= step <= self.steps
            for name, column in columns.items():
                digests[name].update(column[before:step].astype("<f8").data)
            key = digests[""].copy()
            for name, first in self.changes.items():
                if first < step:
                    key.update(f"/{name}/".encode() + digests[name].digest())
            found[step] = key.hexdigest()[:20]
            before = step
        return found


def _first_difference(one: Column, other: Column, start: int, stop: int) -> int:
    # Compare bits, not values: 0.0 and -0.0 are two rates.
    pair = (column[start:stop].view(np.int64) for column in (one, other))
    different = np.flatnonzero(np.not_equal(*pair))
    return start + int(different[0]) if len(different) > 0 else stop


def settings_of_steps(steps: Steps, count: int) -> tuple[Column, dict[str, Column]]:
    """Return the learning rates of the first `count` steps, and the other settings that change."""
    columns = {
        name: np.array([steps.value(name, step) for step in range(count)], np.float64)
        for name in NAMES
        if name == "lr" or steps.constant(name) is None
    }
    return columns.pop("lr"), columns
