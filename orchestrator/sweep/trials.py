"""Trials of a sweep: from what was asked for to what the tree is made of, and back to folders that look like lone runs.

Eats the specifications of trials (`space.py`), their datasets and the folders of their stages; yields `Candidate`s for
the plan, and `trials/<name>/`: the whole curve from step 0, the checkpoints of the last stage, a summary.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from orchestrator.config.experiment import Experiment
from orchestrator.data.dataset import Manifest, data_identity
from orchestrator.files import write_atomically
from orchestrator.runs import summary as summary_file
from orchestrator.sweep import stage as stage_run
from orchestrator.sweep.space import TrialSpec
from orchestrator.sweep.tree import Trial
from orchestrator.train.rates import Rates

# Not of what a step does: where things are, how wide it runs, when a checkpoint is written, and what `Rates` says.
OUTSIDE = (
    "name",
    "storage",
    "data.",
    "compute.",
    "tracking.",
    "schedule.",
    "train.max_steps",
    "train.keep",
    "train.checkpoint_interval",
    "train.reduction_slots",
    "train.allow_drift",
)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A trial and all that running it takes. `probe`: it only tells whether others are worth going on with."""

    spec: TrialSpec
    rates: Rates
    dataset: Manifest
    cpus: int
    probe: bool = False

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def experiment(self) -> Experiment:
        return self.spec.experiment

    @cached_property
    def trial(self) -> Trial:
        return Trial(
            self.name,
            root_of(self.experiment, data_identity(self.dataset), self.cpus),
            self.rates.first(self.experiment.train.max_steps),
            asked=not self.probe,
        )


def root_of(experiment: Experiment, data: str, cpus: int) -> str:
    """Names all that is the same at every step: equal roots and equal rates make equal bits (on one kind of machine)."""
    fields = {k: v for k, v in experiment.flat().items() if not k.startswith(OUTSIDE)}
    facts = [fields, experiment.slots, data, cpus, torch.__version__]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def probes_of(candidates: Iterable[Candidate], step: int, steps: int) -> dict[str, Candidate]:
    """One probe for each trunk that goes on beyond `step`: `{trial: its trunk's probe}`.

    A trunk is what trials agree on until `step`; the probe leaves it there and goes to zero in `steps` steps.
    """
    probes: dict[str, Candidate] = {}
    found: dict[str, Candidate] = {}
    for c in candidates:
        if c.trial.steps <= step:
            continue
        trunk = c.trial.key(step)
        if trunk not in probes:
            name = f"probe~{len(probes) + 1}"  # no trial can have it
            # `rates` say what it does: the fields only have to agree with its length.
            experiment = c.experiment.replace(
                name=name.replace("~", "-"),
                train__max_steps=step + steps,
                schedule__kind="constant",
                schedule__warmup_steps=0,
                schedule__decay_steps=None,
            )
            spec = replace(c.spec, name=name, setting=name, experiment=experiment)
            probes[trunk] = replace(
                c, spec=spec, rates=replace(c.rates, anneal_at=step, anneal_steps=steps), probe=True
            )
        found[c.name] = probes[trunk]
    return found


# ---- folders ----
def assemble(
    folder: Path,
    last: tuple[Path, int] | None,
    candidate: Candidate,
    run: dict[str, Any],
    summary: dict[str, Any] | None,
) -> None:
    """Make `folder` what a lone run's is as far as its stages are done; `last`: the folder and end of the last of them.

    Args:
        run: run.json, for the tracking server. summary: None while the trial is not over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = curve(last, candidate)
    _write_if_new(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    _write_if_new(folder / "experiment.yaml", candidate.experiment.to_yaml())
    _write_if_new(folder / "run.json", json.dumps(run, indent=1))
    for name in ("checkpoints", "samples") if last else ():
        _link(folder / name, Path(os.path.relpath(last[0] / name, folder)))
    if summary:
        _write_if_new(folder / "summary.json", json.dumps(summary, indent=1))
    else:
        (folder / "summary.json").unlink(missing_ok=True)


def curve(last: tuple[Path, int] | None, candidate: Candidate) -> list[dict[str, Any]]:
    """The trial's lines from step 0 to the end of its last stage; an end that is another trial's leaves no trace in it."""
    if last is None:
        return []
    folder, stop = last
    ends_here = stop == candidate.experiment.train.max_steps == stage_run.read_order(folder).stop
    return stage_run.lines(folder, None if ends_here else stop)


def summary_of(
    status: str,
    records: list[dict[str, Any]],
    candidate: Candidate,
    folder: Path,
    result: dict[str, Any],
    more: dict[str, Any],
) -> dict[str, Any]:
    """summary.json of a trial, with the fields of a lone run's."""
    step = records[-1]["step"] if records else 0
    return {
        "status": status,
        "step": step,
        "tokens": step * candidate.experiment.tokens_per_step,
        **{
            key: summary_file.last_value(records, metric)
            for key, metric in (
                ("train_loss", "train/loss"),
                ("val_loss", "val/loss"),
                ("val_bits_per_byte", "val/bits_per_byte"),
                ("best_val_loss", "val/best_loss"),
            )
        },
        "checkpoint": str(folder / "checkpoints" / f"step-{step:08d}")
        if status == "FINISHED"
        else None,
        "weights_sha256": result.get("weights_sha256"),
        **more,
    }


def _write_if_new(path: Path, text: str) -> None:
    """Unchanged files keep their time: a tracker sends what is newer."""
    try:
        if path.read_text("utf-8") == text:
            return
    except FileNotFoundError:
        pass
    write_atomically(path, text)


def _link(path: Path, target: Path) -> None:
    """Point `path` at `target`, in one step where it pointed elsewhere."""
    if path.is_symlink() and path.readlink() == target:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)
