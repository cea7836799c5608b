"""Checks before a sweep starts: first weights, the run that it branches off, names of trials."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cluster import nodes
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, fields_with
from orchestrator.config.fields import Effect
from orchestrator.data.dataset import data_identity
from orchestrator.errors import UnreadableError, UserError
from orchestrator.mirror import remote
from orchestrator.objects import cache
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.runs.storage import find_run
from orchestrator.sweep.records import read_spec
from orchestrator.sweep.space import sampler
from orchestrator.sweep.space.checks import origin
from orchestrator.sweep.space.expand import Sweep
from orchestrator.sweep.trials import PlannedTrial, fields_of_root
from orchestrator.text import differences
from orchestrator.train import find, init_from
from orchestrator.workers.fitting import with_known_size


@dataclass(frozen=True)
class BaseRun:
    """The run that a sweep branches off, and the step at which it does."""

    folder: Path
    step: int
    experiment: Experiment

    @classmethod
    def of(cls, sweep: Sweep, storage: Path) -> "BaseRun":
        """Find the run that `sweep.from` names.

        Raises:
            UserError: There is no such run, or it has too few steps.
        """
        name, step = origin(sweep.settings.from_ or "")
        try:
            place = remote.here(name, "RUN@STEP", sweep.base, checkpoints="all")
            folder = find_run(place, _is_run, storage)
        except UnreadableError:
            raise
        except UserError as error:
            raise UserError(f"sweep.from: {error}") from None
        found = cls(folder.path, step, folder.read_experiment())
        found._check_steps(name)
        return found

    def check_nodes(self) -> None:
        """Raise UserError if a node does not have the copy of a run in a mirror."""
        if self.folder.is_relative_to(cache.root()):
            nodes.check_has(RunFolder(self.folder).experiment_file)

    def _check_steps(self, name: str) -> None:
        # If the run is a trial of another sweep, `checkpoints` is a link into its last stage.
        last_stage = RunFolder(self.folder).checkpoints.resolve().parent
        spec = read_spec(RunFolder(last_stage))
        if spec is not None and spec.settings.before:
            raise UserError(
                f"sweep.from: '{name}' is a trial that branched off {spec.settings.splice:,} steps "
                "of another run itself; branch off that run, or train this trial alone"
            )
        steps = self.experiment.train.max_steps
        if self.step > steps:
            raise UserError(f"sweep.from: '{name}' has only {steps} steps, not {self.step}")

    def refuse_other_experiments(self, trials: Iterable[PlannedTrial]) -> None:
        """Refuse trials that the run does not begin like: other fields or other tokens.

        Raises:
            UserError: With one line for each difference.
        """
        manifest = checkpoint.read_manifest(find.checkpoint_of(self.folder))
        data = manifest["fingerprints"]["data"]
        before = _steps_of(self.experiment)
        for trial in trials:
            now = _steps_of(trial.experiment)
            lines = differences(before, dict.fromkeys(before) | now)
            if data != data_identity(trial.dataset):
                lines.append("data: the tokens are not those that the run was trained on")
            if lines:
                first = f"sweep.from: {self.folder} was another experiment:"
                raise UserError("\n  ".join([first, *lines]))


def _is_run(folder: RunFolder) -> bool:
    return find.has_checkpoint(folder) and folder.experiment_file.is_file()


def _steps_of(experiment: Experiment) -> dict[str, Any]:
    """Return the fields that change what a step computes, also those with their defaults."""
    fields = fields_of_root(experiment, experiment.steps()(0), with_later=True)
    return fields | {"train.reduction_slots": experiment.slots}


def with_absolute_paths(sweep: Sweep) -> Sweep:
    """Return the sweep with absolute paths: workers run in another folder."""
    absolute = tuple(
        replace(trial, experiment=init_from.with_absolute_path(trial.experiment))
        for trial in sweep.trials
    )
    return replace(sweep, base=init_from.with_absolute_path(sweep.base), trials=absolute)


def with_known_sizes(sweep: Sweep, storage: Path, recorded: Layout | None) -> list[Experiment]:
    """Return `sweep.experiments` with the micro-batch of what has begun, which decides the slots.

    Raises:
        UserError: A trial does not fit it.
    """
    size: int | None = recorded.micro_batch_size if recorded else None
    if sweep.settings.from_ is not None:
        size = BaseRun.of(sweep, storage).experiment.train.micro_batch_size
    known = [with_known_size(t.experiment, size, f"trial {t.name}: ") for t in sweep.trials]
    return known or [with_known_size(sweep.base, size)]


def check_sources(sweep: Sweep, storage: Path) -> None:
    """Check that first weights, and the run to branch off, exist.

    Raises:
        UserError: One line for each trial whose first weights do not exist.
    """
    problems = []
    if sweep.settings.sampler == "optuna":
        sampler.require_optuna()
        init_from.require_init_from_exists(sweep.base)
    for trial in sweep.trials:
        try:
            init_from.require_init_from_exists(trial.experiment)
        except UserError as error:
            problems.append(f"trial {trial.name}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    if sweep.settings.from_ is not None:
        BaseRun.of(sweep, storage)


def check_names(folder: SweepFolder, planned: Mapping[str, PlannedTrial]) -> None:
    """Refuse names that meant other experiments before: the tracking server has their curves."""
    changed = []
    for name, trial in planned.items():
        record = folder.trial(name).read_record()
        if record is None:
            continue
        # Records of earlier versions have only "trial", which had this value then.
        meant = record.get("settings", record.get("trial", trial.settings_key))
        if meant != trial.settings_key:
            changed.append(name)
    if not changed:
        return
    name = changed[0]
    others = f" and {len(changed) - 3} more trials" if len(changed) > 3 else ""
    before = folder.trial(name).read_experiment().flat()
    now = planned[name].experiment.flat()
    without_effect = fields_with(Effect.NOTHING)
    lines = differences(before, {key: now[key] for key in now if key not in without_effect})
    raise UserError(
        "\n  ".join(
            [
                f"{folder.path}: trials {', '.join(changed[:3])}{others} had other settings under "
                "these names before; give the sweep a new name (name=…), or change these back:",
                *(lines or ["the version of torch, the tokens or the CPUs per worker"]),
            ]
        )
    )
