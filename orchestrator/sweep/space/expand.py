"""The trials of a sweep: read a sweep's file and make one checked experiment for each trial.

Trials are the product of `sweep.grid`, the named ones of `sweep.trials`, and the samples that
`sweep.sampler` draws from `sweep.space`; each once per seed. Samples of optuna depend on results:
`sampled` makes their trials while the sweep runs.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.config.experiment import Experiment, field_value, parse_experiment
from orchestrator.config.load import read_tree
from orchestrator.config.sweep import SweepSection, parse_sweep, sweep_docs
from orchestrator.config.yaml_text import write_yaml
from orchestrator.errors import UserError
from orchestrator.sweep.space.checks import section_problems, varied_fields
from orchestrator.sweep.space.dimensions import dimension, draw
from orchestrator.sweep.space.names import sample_name, trial_name
from orchestrator.sweep.space.trial_checks import branch_problems, trial_problems

BATCH_FIELDS = ("train.global_batch_size", "train.batch_schedule")
Tree = Mapping[str, Any]  # Experiment.model_dump()


@dataclass(frozen=True)
class Trial:
    """One configured experiment of a sweep.

    Attributes:
        name: Name of the trial.
        setting: The name without the seed; trials that differ only in their seed share it.
        seed: `train.seed`.
        fields: Value of every field that the sweep varies.
        experiment: The whole configuration.
    """

    name: str
    setting: str
    seed: int
    fields: dict[str, Any]
    experiment: Experiment


@dataclass(frozen=True)
class Sweep:
    """A sweep's file.

    Attributes:
        base: The experiment that every trial starts from.
        settings: The `sweep:` section.
        trials: All trials except those of optuna.
        left_out: With `skip_invalid`: a line for each trial that cannot be run.
    """

    base: Experiment
    settings: SweepSection
    trials: tuple[Trial, ...]
    left_out: tuple[str, ...] = ()

    @property
    def experiments(self) -> list[Experiment]:
        """Experiments of all trials; the base if only optuna proposes trials."""
        return [trial.experiment for trial in self.trials] or [self.base]

    def to_yaml(self) -> str:
        """Return a file that `load_sweep` reads as an equal sweep."""
        section = self.settings.model_dump(by_alias=True)
        return write_yaml(self.base.model_dump() | {"sweep": section})


def load_sweep(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep's file, apply `section.field=value` overrides, and make its trials.

    Raises:
        UserError: One line for each mistake: those of the file, else those of the section, else
            those of the trials.
    """
    tree, where = read_tree(path, overrides, sweep_docs)
    base, settings = parse_sweep(tree, where)
    try:
        sweep = expand(base.model_dump(), settings)
    except UserError as error:
        lines = [f"{where}: {line}" for line in str(error).split("\n")]
        raise UserError("\n".join(lines)) from None
    for experiment in {tuple(e.own_kinds): e for e in sweep.experiments}.values():
        experiment.check_own_code()
    return sweep


def expand(base_tree: Tree, settings: SweepSection) -> Sweep:
    """Return the sweep with its trials: those of the grid, the named ones, then the random ones.

    Raises:
        UserError: One line for each mistake.
    """
    base = parse_experiment(dict(base_tree), "")
    problems = section_problems(base, settings)
    if problems:
        raise UserError("\n".join(problems))
    trials: list[Trial] = []
    invalid = []
    count = 0
    for name, fields in _named_fields(base, settings):
        count += 1
        try:
            trials += _trials_of(settings, base_tree, name, fields)
        except UserError as error:
            invalid.append(f"trial {name}: {'; '.join(str(error).splitlines())}")
    if settings.skip_invalid:
        invalid += branch_problems(settings, trials)
        trials = [trial for trial in trials if not branch_problems(settings, [trial])]
    if invalid and not (settings.skip_invalid and trials):
        problems = [f"{len(invalid)} of {count} trials cannot be run", *invalid]
    problems += trial_problems(settings, trials)
    if problems:
        raise UserError("\n".join(problems))
    return Sweep(base, settings, _seeds_together(base, settings, trials), tuple(invalid))


def sampled(
    settings: SweepSection, base_tree: Tree, number: int, values: Mapping[str, Any]
) -> list[Trial]:
    """Return the trials of a sample, one for each seed.

    Args:
        settings: The `sweep:` section.
        base_tree: The experiment that every trial starts from.
        number: Number of the sample, 0-based.
        values: By field.

    Raises:
        UserError: The values contradict each other or the experiment.
    """
    kind = base_tree["model"]["kind"]
    fields = {key: field_value(key, value, kind) for key, value in values.items()}
    trials = _trials_of(settings, base_tree, sample_name(number, fields), fields)
    problems = branch_problems(settings, trials)
    if problems:
        raise UserError("; ".join(problems))
    return trials


def _named_fields(base: Experiment, settings: SweepSection) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the fields of every trial, without its seed."""
    if settings.grid:
        values = []
        for key, listed in settings.grid.items():
            values.append([field_value(key, value, base.model.kind) for value in listed])
        for combination in itertools.product(*values):
            fields = dict(zip(settings.grid, combination, strict=True))
            yield trial_name(fields), fields
    yield from settings.trials.items()
    if settings.sampler == "random":
        kind = base.model.kind
        dimensions = {key: dimension(key, words, kind) for key, words in settings.space.items()}
        for number in range(settings.num_samples or 0):
            fields = draw(base.train.seed, number, dimensions)
            yield sample_name(number, fields), fields


def _trials_of(
    settings: SweepSection, base_tree: Tree, setting: str, fields: Mapping[str, Any]
) -> list[Trial]:
    """Return the trials of one setting, one for each seed."""
    tree = _with_fields(base_tree, fields)
    first_seed = tree["train"]["seed"]
    varied = varied_fields(settings)
    trials = []
    for seed in range(first_seed, first_seed + settings.seeds):
        name = setting if settings.seeds == 1 else f"{setting}_seed-{seed}"
        seeded = _with_fields(tree, {"train.seed": seed})
        experiment = parse_experiment(seeded | {"name": name}, "")
        flat = experiment.flat()
        trials.append(Trial(name, setting, seed, {key: flat[key] for key in varied}, experiment))
    return trials


def _seeds_together(
    base: Experiment, settings: SweepSection, trials: Iterable[Trial]
) -> tuple[Trial, ...]:
    """Give trials that differ only in `train.seed` one setting, as `sweep.seeds` does."""
    found = []
    names: dict[str, str] = {}  # of each setting, by its experiment without the seed
    taken = set()
    for trial in trials:
        if "train.seed" in trial.fields:
            grid = {key: trial.fields[key] for key in settings.grid}
            name = trial.setting
            if name == trial_name(grid):
                grid.pop("train.seed", None)
                name = trial_name(grid) or base.name
            alike = trial.experiment.replace(name="", train__seed=0).model_dump_json()
            name = names.setdefault(alike, name)
            if (name, trial.seed) not in taken:
                taken.add((name, trial.seed))
                trial = replace(trial, setting=name)
        found.append(trial)
    return tuple(found)


def _with_fields(tree: Tree, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of an experiment's tree with other values of some fields."""
    changed = dict(tree)
    for one, other in (BATCH_FIELDS, BATCH_FIELDS[::-1]):
        if fields.get(one) is not None and other not in fields:
            fields = {**fields, other: None}  # a trial's replaces that of the base
    for key, value in fields.items():
        *sections, field = key.split(".")
        place = changed
        for section in sections:
            place[section] = dict(place.get(section) or {})
            place = place[section]
        place[field] = value
    return changed
