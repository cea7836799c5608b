"""Trials that are ready to be planned, and their folders.

A `PlannedTrial` is a trial of the sweep with the settings of its steps and its dataset. `assemble`
makes `trials/<name>/` look like the folder of a lone run: the whole curve from step 0, the
checkpoints of the last stage, a summary.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.models import DEFAULT, MODELS
from model.optim import OPTIMIZERS
from orchestrator.code_hashes import module_hashes
from orchestrator.config.experiment import Experiment, field_docs
from orchestrator.config.fields import Effect
from orchestrator.config.meanings import with_null
from orchestrator.config.sections import Data
from orchestrator.config.steps import Steps, StepSettings
from orchestrator.data.dataset import Manifest, data_identity
from orchestrator.files import write_atomically
from orchestrator.folders import make_folder
from orchestrator.machine import torch_version
from orchestrator.own_code import is_own, plain
from orchestrator.own_files import present
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.runs.journal import Line
from orchestrator.sweep import records
from orchestrator.sweep.branch import Branch, settings_of_steps
from orchestrator.sweep.records import StageSpec
from orchestrator.sweep.space.expand import Trial
from orchestrator.sweep.stored import StoredState

if TYPE_CHECKING:
    from orchestrator.sweep.source import BaseRun


@dataclass(frozen=True, eq=False)
class PlannedTrial(Trial):
    """A trial with all that running it needs.

    Attributes:
        steps: Settings of every step.
        dataset: The prepared tokens.
        cpus: CPUs per worker, which are part of the numerics.
        device: Model of the GPU or processor.
        is_probe: True for a short anneal that shows whether other trials are stopped.
        base: The run that the sweep branches off, if there is one.
    """

    steps: Steps
    dataset: Manifest
    cpus: int
    device: str = ""
    is_probe: bool = False
    base: "BaseRun | None" = None

    @cached_property
    def branch(self) -> Branch:
        """The trial as the tree of stages sees it.

        Trials with equal roots and equal settings of all steps have equal weights.
        """
        root = _hash([self._settings, self.made_by])
        return replace(self._branch_of_settings, root=root)

    @cached_property
    def _settings(self) -> str:
        first = self.steps(0)
        return settings_of(self.experiment, first, data_identity(self.dataset), self.cpus)

    @cached_property
    def _branch_of_settings(self) -> Branch:
        rates, others = settings_of_steps(self.steps, self.experiment.train.max_steps)
        return Branch(self.name, self._settings, rates, self.is_probe, others)

    @property
    def key(self) -> str:
        """Key of the state at the end of the trial."""
        return self.branch.key(self.branch.steps)

    @property
    def made_by(self) -> dict[str, str]:
        """The device and the code, as `StageSpec` stores them."""
        return {
            "device": self.device,
            **module_hashes(self.experiment.model.kind, self.experiment.optim.kind),
        }

    @property
    def settings_key(self) -> str:
        """What the name of the trial stands for: `key` for any code and device."""
        return self._branch_of_settings.key(self.branch.steps)


def settings_of(experiment: Experiment, first: StepSettings, data: str, cpus: int) -> str:
    """Return a hash of what is the same at every step, and of step 0, except code and device.

    Args:
        experiment: The trial.
        first: Settings of step 0. The learning rate is no part of the hash.
        data: Identity of the tokens.
        cpus: CPUs per worker.
    """
    return _hash([fields_of_root(experiment, first), experiment.slots, data, cpus, torch_version()])


def present_code(device: str, spec: StageSpec) -> dict[str, str]:
    """Return the device and the code that would train a stage now; see `StageSpec.made_by`."""
    model = present("model", spec.experiment["model"].get("kind", DEFAULT))
    optimizer = present("optim", spec.experiment["optim"]["kind"])
    if model not in MODELS or optimizer not in OPTIMIZERS:  # of a later version
        return {"model": model, "optimizer": optimizer}
    return {"device": device, **module_hashes(model, optimizer)}


def _hash(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def fields_of_root(
    experiment: Experiment, first: StepSettings, with_later: bool = False
) -> dict[str, Any]:
    """Return the fields that change what a step computes, without data and learning rate.

    Fields of settings that may change from step to step have their values at step 0. A field that
    earlier versions did not have is left out while it has its default, unless `with_later`.
    """
    fields = with_null(experiment)
    del fields["train.reduction_slots"]  # `Experiment.slots` is compared instead
    # `StageSpec.made_by` has the hash of a user's file.
    fields |= {key: plain(fields[key]) for key in ("model.kind", "optim.kind")}
    fields["optim.momentum"] = first.momentum
    fields["train.global_batch_size"] = first.batch_size
    added = {} if first.weight_decay == 1.0 else {"weight_decay_factor": first.weight_decay}
    if is_own(experiment.optim.kind):  # the user's function sees them, whatever the steps are
        added["schedule.max_lr"] = experiment.schedule.max_lr
        added["optim.momentum after its warmup"] = experiment.optim.momentum
    return added | {
        key: fields[key]
        for key, doc in field_docs(experiment.model.kind).items()
        if key in fields
        and doc.effect in (Effect.STEPS, Effect.ADDITIONS, Effect.ATTEMPT)
        and (with_later or not (doc.is_later and fields[key] == doc.default))
    }


def spec_of(trial: PlannedTrial, start: int, stop: int, diverged_above: float | None) -> StageSpec:
    """Return the stage of a trial that makes the updates [start, stop), without its parent."""
    return StageSpec(
        id=trial.branch.key(stop),
        root=trial.branch.root,
        start=start,
        stop=stop,
        experiment=trial.experiment.model_dump(),
        steps=asdict(trial.steps),
        data_dir=str(trial.dataset.directory),
        diverged_above=diverged_above,
        made_by=trial.made_by,
    )


def restore_specs(
    sweep: SweepFolder, trials: Collection[PlannedTrial], diverged_above: float | None
) -> list[StageSpec]:
    """Write and return stage.json of each stage that has a result but no valid stage.json.

    Args:
        sweep: Folder of the sweep.
        trials: Trials and probes, one of which may have the stage.
        diverged_above: `sweep.diverged_above`.
    """
    restored = []
    for folder in sweep.stages():
        result = records.read_result(folder)
        if result is None or records.read_spec(folder) is not None:
            continue
        longer = [trial for trial in trials if trial.branch.steps >= result.stop]
        found = [trial for trial in longer if trial.branch.key(result.stop) == result.id]
        if not found:
            continue
        trial = min(found, key=lambda trial: trial.branch.steps)  # one that ends here, if any
        spec = spec_of(trial, result.start, result.stop, diverged_above)
        if result.start > 0:
            parent = sweep.stage(trial.branch.key(result.start))
            if trial.base is not None and not parent.path.exists():
                parent = RunFolder(trial.base.folder)
            begin = parent.checkpoint(result.start)
            spec = replace(spec, parent=str(parent.path), begin=str(begin))
        spec.write(folder)
        restored.append(spec)
    return restored


# ---- the folder of a trial ----


def assemble(
    folder: RunFolder,
    last: StoredState | None,
    trial: PlannedTrial,
    record: Mapping[str, Any],
    summary: Mapping[str, Any] | None,
) -> None:
    """Write the folder of a trial, as far as its stages are done, like that of a lone run.

    Args:
        folder: Folder of the trial.
        last: Folder and end of its last stage that has lines; None if no stage has any.
        trial: The trial.
        record: Content of run.json.
        summary: Content of summary.json; None while the trial is not over.
    """
    make_folder(folder.path)
    lines = [json.dumps(line) + "\n" for line in curve(last, trial)]
    _write_if_changed(folder.journal_file, "".join(lines))
    _write_if_changed(folder.experiment_file, trial.experiment.to_yaml())
    _write_if_changed(folder.run_file, json.dumps(record, indent=1))
    if last is not None:
        folder.link_to_stage(last.folder)
    if summary is not None:
        _write_if_changed(folder.summary_file, json.dumps(summary, indent=1))
    else:
        folder.summary_file.unlink(missing_ok=True)


def curve(last: StoredState | None, trial: PlannedTrial) -> list[Line]:
    """Return the journal lines of a trial from step 0 to the end of its last stage.

    If another trial ends earlier, the lines do not have the metrics of its end.
    """
    if last is None:
        return []
    base = trial.base
    spec = records.read_spec(last.folder, base)
    if spec is None or not records.has_whole_curve(spec, base):  # a stage is lost, and runs again
        return []
    if last.step == trial.experiment.train.max_steps == spec.stop:
        return records.curve(last.folder, base=base)
    return records.curve(last.folder, last.step, base)


def _write_if_changed(path: Path, text: str) -> None:
    """Write a file unless it has this content: the tracker sends files that are newer."""
    if path.is_file() and path.read_bytes() == text.encode():
        return
    write_atomically(path, text)


def data_key(data: Data) -> str:
    """Return a text that is equal for experiments trained on the same prepared tokens."""
    return data.model_dump_json()


def tracking_key(sweep: str, trial: PlannedTrial, known: Mapping[str, Any]) -> str:
    """Return the key by which MLflow knows a trial.

    Other code or another device gets another run of MLflow, because its values may differ.

    Args:
        sweep: Key of the sweep.
        trial: The trial.
        known: Its run.json as it is; empty if there is none.
    """
    if known.get("trial") == trial.key:
        return known["key"]
    words = [sweep, trial.name]
    if known:
        words.append(trial.key)
    return hashlib.sha256("/".join(words).encode()).hexdigest()[:32]
