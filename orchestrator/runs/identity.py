"""Decides whether an experiment may continue in a run folder: whether it is still the same run.

A field is either free or a part of the identity. A free field may change between two attempts of
the same run. A changed identity field would give other weights, so it is refused under the same
name.
"""

import contextlib
import os
import uuid
from collections.abc import Callable
from typing import Any

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cluster import dtypes
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, fields_with
from orchestrator.config.fields import AUTO, FREE, Effect
from orchestrator.config.meanings import with_null
from orchestrator.config.sections import Train
from orchestrator.config.steps import IN_WORDS, NAMES
from orchestrator.data.dataset import Manifest, data_identity
from orchestrator.errors import UserError
from orchestrator.files import having, read_derived
from orchestrator.own_code import plain
from orchestrator.own_files import store
from orchestrator.runs import stop
from orchestrator.runs.folder import RunFacts, RunFolder, RunRecord, SweepFolder
from orchestrator.text import differences

ENDS = [f"schedule.{part}decay_steps" for part in ("", "weight_decay.", "momentum.")]


def check_resumable(
    folder: RunFolder,
    experiment: Experiment,
    dataset: Manifest,
    warn: Callable[[str], None] = print,
) -> int:
    """Return the step from which `experiment` would resume in this folder; 0 for a new run.

    Args:
        folder: Folder of the run.
        experiment: The experiment that should continue.
        dataset: The dataset that it should be trained on.
        warn: Called with a message for each damaged checkpoint that is skipped.

    Raises:
        UnreadableError: A checkpoint cannot be read at the moment.
        UserError: The run was trained with another identity, or its checkpoints are gone. The
            message says what the user can do.
    """
    found = checkpoint.latest_valid(folder.checkpoints, warn)
    if found is None:
        if not experiment.train.restart:
            require_no_checkpoints(folder)
        return 0
    manifest = checkpoint.read_manifest(found)
    lines = identity_differences(RunFolder(found).read_experiment(), experiment, manifest["step"])
    if manifest["fingerprints"]["data"] != data_identity(dataset):
        lines.append(
            f"data: the tokens in {dataset.directory} are not those that the run was trained on"
        )
    # `train.allow_drift` permits another order of additions.
    drift = fields_with(Effect.ADDITIONS)
    only_drift = all(line.startswith(drift) for line in lines)
    if lines and not (only_drift and experiment.train.allow_drift):
        raise UserError(_refusal(folder, lines, only_drift))
    return manifest["step"]


def had_checkpoints(folder: RunFolder) -> bool:
    """Return whether a run has written a checkpoint, also if all of them are gone."""
    if folder.checkpointed_file.exists():
        return True
    # Earlier versions of this program did not write that file.
    attempts = (folder.read_record() or {}).get("attempts") or []
    if any(attempt.get("from_step") for attempt in attempts):
        return True
    return any(folder.checkpoints.glob("damaged-*")) or bool(folder.checkpoint_steps())


def require_no_checkpoints(folder: RunFolder) -> None:
    """Refuse to begin at step 0 in the folder of a run that had checkpoints.

    A stage of a sweep may begin again: its checkpoints are removed once no stage needs them.

    Raises:
        UserError: The run had checkpoints.
    """
    if had_checkpoints(folder) and not folder.stage_file.exists():
        raise UserError(
            f"{folder.checkpoints}: no valid checkpoint is left of this run, which had some; "
            "restore one, use a new name (name=…), or set train.restart=true to begin again at "
            "step 0"
        )


def _refusal(folder: RunFolder, differences: list[str], only_drift: bool) -> str:
    ways_out = "give it a new name (name=…), or change these back"
    if only_drift:
        ways_out += ", or set train.allow_drift=true: the results then differ in their last bits"
    lines = [
        f"{folder.path} was begun with another experiment:",
        *(f"  {line}" for line in differences),
        f"  {ways_out}",
    ]
    return "\n".join(lines)


def identity_differences(stored: Experiment, wanted: Experiment, step: int) -> list[str]:
    """Return one line per identity field that differs, and a line if `max_steps` may not change.

    Args:
        stored: Experiment that trained the first `step` updates.
        wanted: Experiment that should continue.
        step: Number of updates that are done.
    """
    if wanted.train.micro_batch_size == AUTO:  # the number of slots depends on it
        wanted = wanted.replace(train__micro_batch_size=stored.train.micro_batch_size)
    stored, wanted = stored.effective(), wanted.effective()
    before = _identity_fields(stored)
    now = _identity_fields(wanted)
    if wanted.train.dtype == AUTO:
        now["train.dtype"] = stored.train.dtype
    for key in ENDS:
        if stored.flat()[key] == wanted.flat()[key]:
            # `null` in both means max_steps, which is compared below.
            before[key] = now[key] = None
    if before["model.kind"] != now["model.kind"]:  # it has other fields
        now = {key: now[key] for key in now if key == "model.kind" or key[:6] != "model."}
    lines = differences(before, now)
    lines += _max_steps_differences(stored, wanted, step, has_others=bool(lines))
    return lines


def _identity_fields(experiment: Experiment) -> dict[str, Any]:
    """Return the fields that decide the weights, with their defaults filled in."""
    free = fields_with(*FREE)
    fields = {key: value for key, value in with_null(experiment).items() if key not in free}
    # The files of a corpus may move, so its tokens are compared instead.
    del fields["data.corpus"]
    del fields["data.text_field"]
    del fields["data.on_null"]
    # `null` is the same as the number that it stands for.
    fields["train.reduction_slots"] = experiment.slots
    # The folder of a user's file may differ, and its code is compared by the bits that it computes.
    fields |= {key: plain(fields[key]) for key in ("model.kind", "optim.kind")}
    sizes = experiment.batch_sizes.stretches
    changes = dict(now for now, last in zip(sizes[1:], sizes, strict=False) if now[1] != last[1])
    fields["train.global_batch_size"] = sizes[0][1]
    fields["train.batch_schedule"] = dict(sizes[:1]) | changes if changes else None
    end = experiment.schedule.decay_steps or experiment.train.max_steps
    return fields | {key: fields[key] or end for key in ENDS}


def _max_steps_differences(
    stored: Experiment, wanted: Experiment, step: int, has_others: bool
) -> list[str]:
    before = stored.train.max_steps
    now = wanted.train.max_steps
    if now < step:
        return [f"train.max_steps: now {now}, but {step} steps are done"]
    if has_others or before == now:
        return []
    changed = _first_change(stored, wanted, step)
    if changed is None:
        return []
    name, update = changed
    return [
        f"train.max_steps: before {before}, now {now}, which changes the {name} of step "
        f"{update + 1}, already made; set schedule.decay_steps={before} or use a new name"
    ]


def _first_change(stored: Experiment, wanted: Experiment, step: int) -> tuple[str, int] | None:
    """Return the first update below `step` with another setting, and its name; None if none has."""
    old = stored.steps()
    new = wanted.steps()
    names = [name for name in NAMES if old.constant(name) is None or new.constant(name) is None]
    for update in range(step):
        for name in names:
            if old.value(name, update) != new.value(name, update):
                return IN_WORDS[name], update
    return None


def begin_attempt(
    folder: RunFolder, experiment: Experiment, facts: RunFacts, attempt: dict[str, Any]
) -> None:
    """Store the experiment of an attempt in the run folder.

    Another experiment that starts from step 0, or one that starts again there, becomes a new MLflow
    run. What the earlier one wrote is moved aside.

    Args:
        folder: Folder of the run.
        experiment: The experiment to train.
        facts: Facts for MLflow.
        attempt: Layout, first step and free fields of this start of the command. During it, Ray
            may start the workers several times: `attempts.start_workers_attempt`.
    """
    record = folder.read_record()
    if attempt.get("from_step"):
        record = record or new_record(folder)
    elif record is None or _starts_over(folder, experiment, facts, record):
        record = RunRecord(key=uuid.uuid4().hex, attempts=[])
        _move_history(folder)
    attempts = [*record.get("attempts", []), attempt]
    store(folder.code, experiment.own_kinds)
    folder.begin_attempt(
        experiment, {"name": experiment.name, "key": record["key"], **facts, "attempts": attempts}
    )
    stop.clear(folder)


def _move_history(folder: RunFolder) -> None:
    """Move what an earlier run wrote into a folder of its own."""
    existing = [path for path in folder.history() if os.path.lexists(path)]
    if not existing:
        return
    target = folder.new_history_folder()
    target.mkdir()
    for path in existing:
        os.rename(path, target / path.name)
    print(f"what an earlier run wrote is now in {target}", flush=True)


def _starts_over(
    folder: RunFolder, experiment: Experiment, facts: RunFacts, record: RunRecord
) -> bool:
    """Return whether a run begins at step 0 in the folder of another one, or with `restart`."""
    if experiment.train.restart and had_checkpoints(folder):
        return True
    try:
        changed = identity_differences(folder.read_experiment(), experiment, 0)
    except UserError:  # damaged, or written by another version
        print(f"{folder.experiment_file}: not readable; the run starts over as a new one")
        return True
    return bool(changed) or record.get("dataset") != facts.get("dataset")


def resolve_auto(experiment: Experiment, layout: Layout, folder: RunFolder | None) -> Experiment:
    """Return the experiment with what `auto` stands for in this folder.

    It is the value of the newest checkpoint; in a new run (None), the one that suits the workers.

    Raises:
        UserError: `train.micro_batch_size` is `auto`, and was not measured.
    """
    train = experiment.train
    if AUTO not in (train.dtype, train.micro_batch_size):
        return experiment
    recorded = None if folder is None else recorded_train(folder)
    dtype: str = train.dtype
    size: int | None = train.micro_batch_size
    if dtype == AUTO:
        dtype = recorded.dtype if recorded else dtypes.suitable(experiment, layout)
    if size == AUTO:
        size = recorded.micro_batch_size if recorded else layout.micro_batch_size
    if size is None:
        raise UserError("train.micro_batch_size: auto is only known to a run; give a number")
    return experiment.replace(train__dtype=dtype, train__micro_batch_size=size)


def recorded_train(folder: RunFolder) -> Train | None:
    """Return the section `train` of the newest checkpoint; None if there is none."""
    for step in reversed(folder.checkpoint_steps()):
        with contextlib.suppress(UserError):
            return RunFolder(folder.checkpoint(step)).read_experiment().train
    return None


# ---- what is still known if run.json is missing or damaged ----


def new_record(folder: RunFolder) -> RunRecord:
    """Return a run.json without attempts, with the key by which MLflow may know the run."""
    sent = read_derived(folder.tracking_file, having("key")) or {}
    return RunRecord(key=sent.get("key") or uuid.uuid4().hex, attempts=[])


def recorded_layout(folder: RunFolder) -> Layout | None:
    """Return workers and devices of the last attempt; None before the first one.

    The CPUs per worker, which affect the last bits, are also in the last checkpoint, and in the
    trials of a sweep.
    """
    for place in [folder, *SweepFolder(folder).trials()]:
        attempts = (place.read_record() or {}).get("attempts") or []
        stored = attempts[-1].get("layout") if attempts else None
        if stored is not None:
            return Layout(**stored)
    for step in folder.checkpoint_steps()[-1:]:
        with contextlib.suppress(UserError, LookupError):
            manifest = checkpoint.read_manifest(folder.checkpoint(step))
            return Layout(1, manifest["fingerprints"]["numerics"]["cpus_per_worker"], False)
    return None
