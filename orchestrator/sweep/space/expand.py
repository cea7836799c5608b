"""A sweep's file becomes its trials: an experiment and its `sweep:` section in, one named, checked experiment per trial out.

Trials are the product of `sweep.grid`, the named ones of `sweep.trials`, and what `sweep.sampler` draws from `sweep.space`,
beside each other and each once per seed. A trial's name follows from its values alone, so that a sweep that grows finds
the trials that it already has. What optuna draws depends on results: `sampled` makes the trials of one such sample.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.config.experiment import Experiment, field_value, parse_experiment
from orchestrator.config.load import read_tree, write_yaml
from orchestrator.config.sweep import SweepSection, parse_sweep
from orchestrator.errors import UserError
from orchestrator.redact import redact_addresses
from orchestrator.sweep.space.checks import LONGEST_NAME, problems, together, varied
from orchestrator.sweep.space.dimensions import dimension, draw

Tree = Mapping[str, Any]  # Experiment.model_dump()


@dataclass(frozen=True)
class Trial:
    """`setting`: the name without the seed. `fields`: the trial's value of every field that the sweep speaks of."""

    name: str
    setting: str
    seed: int
    fields: dict[str, Any]
    experiment: Experiment


@dataclass(frozen=True)
class Sweep:
    """`trials`: all but those that optuna will ask for."""

    base: Experiment
    settings: SweepSection
    trials: tuple[Trial, ...]

    def to_yaml(self) -> str:
        """A file that `load_sweep` reads back as an equal sweep, but for passwords in addresses."""
        return write_yaml(
            redact_addresses(
                self.base.model_dump() | {"sweep": self.settings.model_dump(by_alias=True)}
            )
        )


def load_sweep(
    path: str | os.PathLike | None, overrides: list[str] | tuple[str, ...] = ()
) -> Sweep:
    """Read a sweep's file, apply `section.field=value` words on top, and expand it.

    Raises:
        UserError: one line per mistake: of the file, else of the section, else of all the trials.
    """
    tree, where = read_tree(path, overrides)
    base, settings = parse_sweep(tree, where)
    try:
        return Sweep(base, settings, expand(base.model_dump(), settings))
    except UserError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in str(error).split("\n"))) from None


def expand(base_tree: Tree, settings: SweepSection) -> tuple[Trial, ...]:
    """The trials, those of the grid first, then the named ones, then the random ones."""
    base = parse_experiment(dict(base_tree), "")
    if lines := problems(base, settings):
        raise UserError("\n".join(lines))
    trials, invalid, count = [], [], 0
    for setting, fields in _settings(base, settings):
        count += 1
        try:
            trials += _per_seed(settings, base_tree, setting, fields)
        except UserError as error:
            invalid.append(f"trial {setting}: {'; '.join(str(error).split(chr(10)))}")
    lines = [f"{len(invalid)} of {count} trials cannot be run", *invalid] if invalid else []
    if lines := lines + together(settings, trials):
        raise UserError("\n".join(lines))
    return tuple(trials)


def sampled(
    settings: SweepSection, base_tree: Tree, number: int, values: Mapping[str, Any]
) -> list[Trial]:
    """The trials, one per seed, of sample `number`, 0-based, which somebody drew from `sweep.space`.

    Raises UserError where `values` contradict each other or the experiment.
    """
    fields = {key: field_value(key, value) for key, value in values.items()}
    return _per_seed(settings, base_tree, _sample_name(number, fields), fields)


def _settings(base: Experiment, settings: SweepSection) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, fields that it sets) of every trial, whatever its seed."""
    if settings.grid:
        values = [
            [field_value(key, value) for value in listed] for key, listed in settings.grid.items()
        ]
        for combination in itertools.product(*values):
            fields = dict(zip(settings.grid, combination, strict=True))
            yield trial_name(fields), fields
    yield from settings.trials.items()
    if settings.sampler == "random":
        dimensions = {key: dimension(key, words) for key, words in settings.space.items()}
        for number in range(settings.num_samples):
            fields = draw(base.train.seed, number, dimensions)
            yield _sample_name(number, fields), fields


def _per_seed(
    settings: SweepSection, base_tree: Tree, setting: str, fields: Mapping[str, Any]
) -> list[Trial]:
    tree = _with(base_tree, fields)
    first, found = tree["train"]["seed"], []
    for seed in range(first, first + settings.seeds):
        name = setting if settings.seeds == 1 else f"{setting}_seed-{seed}"
        experiment = parse_experiment(_with(tree, {"train.seed": seed}) | {"name": name}, "")
        flat = experiment.flat()
        found.append(
            Trial(name, setting, seed, {key: flat[key] for key in varied(settings)}, experiment)
        )
    return found


def _with(tree: Tree, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree in which `section.field`s have other values."""
    changed = dict(tree)
    for key, value in fields.items():
        section, _, field = key.partition(".")
        changed[section] = {**changed[section], field: value}
    return changed


# ---- names ----
def trial_name(fields: Mapping[str, Any]) -> str:
    """A folder's name that says the fields' values; other values of the same fields have another name.

    >>> trial_name({"schedule.max_lr": 1e-3, "schedule.kind": "wsd", "train.max_steps": 80})
    'kind-wsd_max_lr-0.001_max_steps-80'
    """
    return _short("_".join(_parts(fields)))


def _sample_name(number: int, fields: Mapping[str, Any]) -> str:
    """Two samples may have the same values: the number tells them apart, and numbers need no more than a few digits."""
    rounded = {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in fields.items()
    }
    return _short("_".join([f"sample-{number}", *_parts(rounded)]))


def _parts(fields: Mapping[str, Any]) -> Iterator[str]:
    """`field-value` of each, in alphabetical order: the order in a file does not rename a trial."""
    leaves = [key.partition(".")[2] for key in fields]
    for key in sorted(fields):
        leaf = key.partition(".")[2]
        yield f"{leaf if leaves.count(leaf) == 1 else key.replace('.', '-')}-{_word(fields[key])}"


def _word(value: Any) -> str:
    """A value as letters, digits, '.', '_' and '-'; what does not fit into these is told apart by a hash.

    No word has '-' after '_', so that one can never be read as a value and the field that follows it.
    """
    if isinstance(value, float):
        return repr(value).removesuffix(".0").replace("e+", "e")
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch(r"[A-Za-z0-9.]+(-[A-Za-z0-9.]+)*(_[A-Za-z0-9.]+)*", text):
        return text
    return f"{re.sub('[^A-Za-z0-9.]+', '-', text).strip('-')[:40]}-{_digest(text)}"


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
