"""One sweep, ready to run: its trials, their tree, what stands of it, and what it thinks of its trials.

Eats a resolved `Sweep`, its folder, its datasets and the layout of its workers; yields a plan, a keeper of its books, and
rows that say of every trial how it ended.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator import init_from, runs, sweep_folder, trials
from orchestrator.config import Data
from orchestrator.errors import UserError
from orchestrator.keeper import Keeper
from orchestrator.launch import Layout
from orchestrator.manifest import Manifest
from orchestrator.rates import Rates
from orchestrator.space import Sweep
from orchestrator.stages import DIVERGED, DONE, Plan
from orchestrator.state import data_identity
from orchestrator.sweep_folder import Stored
from orchestrator.trials import Candidate


@dataclass
class Study:
    """`candidates` by name; `probes`: the probe of each trial that has one; `metric`: what trials are compared by."""

    sweep: Sweep
    folder: Path
    layout: Layout
    candidates: dict[str, Candidate]
    probes: dict[str, Candidate]
    stored: Stored
    plan: Plan

    @classmethod
    def open(cls, sweep: Sweep, folder: Path, layout: Layout, datasets: Mapping[str, Manifest]) -> "Study":
        """Read what stands in `folder` and plan.

        Args:
            datasets: by `data_key` of the trials' data.

        Raises:
            UserError: a trial's name stands for something else there, or the run to branch off does not fit.
        """
        source = Source.of(sweep, folder.parent) if sweep.settings.from_ else None
        candidates = {}
        for spec in sweep.trials:
            schedule = spec.experiment.lr_schedule()
            rates = Rates(schedule, source.experiment.lr_schedule(), source.step) if source else Rates(schedule)
            candidates[spec.name] = Candidate(spec, rates, datasets[data_key(spec.experiment.data)], layout.cpus_per_worker)
        s, probes = sweep.settings, {}
        if s.stop == "anneal_probe":
            probes = trials.probes_of(candidates.values(), s.probe_step, s.probe_steps)
        everyone = [c.trial for c in {**candidates, **{p.name: p for p in probes.values()}}.values()]
        _check_names(folder, candidates)
        stored = sweep_folder.scan(folder / "stages", everyone, s.diverged_above)
        if source:
            source.check(candidates.values())
            sweep_folder.add_run(stored, source.folder, next(iter(candidates.values())).trial, source.step)
        return cls(sweep, folder, layout, candidates, probes, stored, stored.plan(everyone))

    @cached_property
    def metric(self) -> str:
        """Losses per token of different tokenizers do not compare; bits per byte do."""
        tokenizers = {c.experiment.data.tokenizer for c in self.candidates.values()}
        return "val/loss" if len(tokenizers) == 1 else "val/bits_per_byte"

    def keeper(self, tick) -> Keeper:
        """The books of this study; they ask it which trunks the probes speak against."""
        s = self.sweep.settings
        everyone = self.candidates | {p.name: p for p in self.probes.values()}
        self.books = Keeper(self.folder, self.plan, self.stored, everyone, keep_branches=s.keep_branches,
                            diverged_above=s.diverged_above, probe_step=s.probe_step, tick=tick, verdict=self.verdict)
        return self.books

    def asha(self) -> dict[str, int] | None:
        """Arguments of Tune's scheduler: rungs at a ninth, a third and the whole of the run, or later where it evaluates."""
        if self.sweep.settings.stop != "asha":
            return None
        longest = max(c.trial.steps for c in self.candidates.values())
        first = max(c.experiment.train.eval_interval for c in self.candidates.values())
        return {"max_t": longest, "grace_period": min(max(first, longest // 9), longest), "reduction_factor": 3}

    # ---- what came of it ----
    def rows(self) -> list[dict[str, Any]]:
        """One row a trial: how it ended, and the losses that it ended with."""
        return [self.row(c) for c in self.candidates.values()]

    def row(self, c: Candidate) -> dict[str, Any]:
        records, result, state = self.records(c), self.books.result(c.name), self.books.progress.trial(c.name)
        best = [r[self.metric] for r in records if self.metric in r]
        return {"trial": c.name, "setting": c.spec.setting, "seed": c.spec.seed, "fields": c.spec.fields,
                "steps": c.trial.steps, "state": state, "metric": self.metric,
                "final": best[-1] if best and state == DONE else None, "best": min(best, default=None),
                "val_bits_per_byte": runs.last(records, "val/bits_per_byte") if state == DONE else None,
                "train_loss": runs.last(records, "train/loss"), "weights_sha256": result.get("weights_sha256"),
                "reason": self.dropped.get(c.name) or self.books.reason(c.name)}

    def records(self, c: Candidate) -> list[dict[str, Any]]:
        """The trial's lines so far, from step 0."""
        return trials.curve(self.books.last_stage(c.name), c)

    def best(self) -> tuple[str, float] | None:
        """The best trial that is done, and its loss."""
        done = [(row["final"], row["trial"]) for row in self.rows() if row["final"] is not None]
        return min(done)[::-1] if done else None

    # ---- probes ----
    @cached_property
    def dropped(self) -> dict[str, str]:
        """Trials that the probes speak against, with the reason; settled once, by `verdict`."""
        return {}

    def verdict(self) -> list[str]:
        """The trials not worth going on with: their probes, averaged over seeds, end above the best by more than the margin."""
        losses: dict[str, list[float]] = defaultdict(list)
        for name, probe in self.probes.items():
            final = runs.last(self.records(probe), self.metric) if self.books.progress.trial(probe.name) == DONE else None
            diverged = self.books.progress.trial(probe.name) == DIVERGED
            # A probe that failed says nothing about its trunk, one that diverged says all.
            losses[self.candidates[name].spec.setting] += [final] if final is not None else [float("inf")] if diverged else []
        means = {setting: sum(values) / len(values) for setting, values in losses.items() if values}
        least, margin = min(means.values(), default=0.0), self.sweep.settings.probe_margin
        for name in self.probes:
            mean = means.get(self.candidates[name].spec.setting)
            if mean is not None and mean > least + margin:
                self.dropped[name] = (f"its probe ended at {mean:.4f}, more than sweep.probe_margin={margin:g} above the best "
                                      f"probe's {least:.4f}")
        return list(self.dropped)


def data_key(data: Data) -> str:
    """Equal for experiments that are trained on the same prepared tokens."""
    return data.model_dump_json()


def _check_names(folder: Path, candidates: Mapping[str, Candidate]) -> None:
    """A name stands for one trial for ever: its curve is in the tracking server under it."""
    changed = [name for name, c in candidates.items()
               if (runs.read_json(folder / "trials" / name / "run.json") or {}).get("trial", c.trial.key(c.trial.steps))
               != c.trial.key(c.trial.steps)]
    if changed:
        raise UserError(f"{folder} was begun with other experiments: {', '.join(changed[:3])}"
                        f"{f' and {len(changed) - 3} more trials' if len(changed) > 3 else ''} would not be what they were "
                        f"there; give the sweep a new name (name=…), or change the fields back")


@dataclass(frozen=True)
class Source:
    """The run that a sweep branches off, and the step at which it does."""

    folder: Path
    step: int
    experiment: Any

    @classmethod
    def of(cls, sweep: Sweep, storage: Path) -> "Source":
        word, _, step = sweep.settings.from_.rpartition("@")
        folder = next((p for p in (storage / word, Path(word).expanduser()) if p.is_dir()), None)
        if folder is None:
            raise UserError(f"sweep.from: no run '{word}' in {storage}, nor a folder of that name")
        found = cls(folder.absolute(), int(step), runs.stored_experiment(folder))
        late = [s.name for s in sweep.trials if s.experiment.train.max_steps <= found.step]
        if found.step > found.experiment.train.max_steps:
            raise UserError(f"sweep.from: '{word}' has {found.experiment.train.max_steps} steps, and none {found.step}")
        if late:
            raise UserError(f"sweep.from: {late[0]} ends at or before step {found.step}, where it would branch off; "
                            f"raise train.max_steps")
        return found

    def check(self, candidates) -> None:
        """Before the branch the trials are the run: all that a step depends on must be its own."""
        for c in candidates:
            theirs, ours = ({k: v for k, v in e.flat().items() if not k.startswith(trials.OUTSIDE)}
                            for e in (self.experiment, c.experiment))
            lines = [f"{k}: {theirs[k]!r} there, {ours[k]!r} here" for k in ours if theirs[k] != ours[k]]
            if self.experiment.slots != c.experiment.slots:
                lines.append(f"train.reduction_slots: {self.experiment.slots} there, {c.experiment.slots} here")
            found = init_from.checkpoint_of(self.folder)
            if sweep_folder.data_of(found) != data_identity(c.dataset):
                lines.append("data: the tokens are not those that the run was trained on")
            if lines:
                raise UserError("\n".join([f"sweep.from: {self.folder} was another experiment:", *(f"  {x}" for x in lines)]))
