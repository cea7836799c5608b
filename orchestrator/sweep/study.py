"""One sweep, ready to run: its trials, their tree, what stands of it, and what it thinks of its trials.

Eats a resolved `Sweep`, its folder, its datasets and the layout of its workers; yields a plan, a keeper of its books, and
rows that say of every trial how it ended.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Data
from orchestrator.data.dataset import Manifest, data_identity
from orchestrator.errors import UserError
from orchestrator.files import read_json
from orchestrator.runs import summary as summary_file
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep import stage as stage_run
from orchestrator.sweep import sweep_folder, trials
from orchestrator.sweep.progress import Keeper
from orchestrator.sweep.report import ranking
from orchestrator.sweep.report.ranking import Row
from orchestrator.sweep.sampler import Sampler
from orchestrator.sweep.sampler import check as check_optuna
from orchestrator.sweep.space import Sweep, TrialSpec, sampled
from orchestrator.sweep.stage_states import DIVERGED, DONE, RUNNING, STOPPED, WAITING
from orchestrator.sweep.trials import Candidate
from orchestrator.train import init_from
from orchestrator.train.rates import Rates


@dataclass
class Study:
    """`candidates` by name; `probes`: the probe of each trial that has one; `samples`: trials of each of optuna's samples."""

    sweep: Sweep
    folder: Path
    layout: Layout
    datasets: Mapping[str, Manifest]
    candidates: dict[str, Candidate] = field(default_factory=dict)
    probes: dict[str, Candidate] = field(default_factory=dict)
    samples: dict[int, list[str]] = field(default_factory=dict)
    source: "Source | None" = None
    sampler: Sampler | None = None
    finals: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, str] = field(
        default_factory=dict
    )  # trials that the probes speak against, with the reason

    @classmethod
    def open(
        cls, sweep: Sweep, folder: Path, layout: Layout, datasets: Mapping[str, Manifest]
    ) -> "Study":
        """Read what stands in `folder` and plan; writes nothing.

        Args:
            datasets: by `data_key` of the trials' data.

        Raises:
            UserError: a trial's name stands for something else there, or the run to branch off does not fit.
        """
        s, self = sweep.settings, cls(sweep, folder, layout, datasets)
        self.source = Source.of(sweep, folder.parent) if s.from_ else None
        self._add(sweep.trials)
        if s.sampler == "optuna":
            self.sampler = Sampler(folder, s.space, sweep.base.train.seed)
            for number, values in enumerate(self.sampler.earlier[: s.num_samples]):
                self._add_sample(number, values)
        _check_names(folder, self.candidates)
        if s.stop == "anneal_probe":
            self.probes = trials.probes_of(self.candidates.values(), s.probe_step, s.probe_steps)
        everyone = [c.trial for c in self.everyone.values()]
        self.stored = sweep_folder.scan(
            folder / "stages", everyone, s.diverged_above, s.stop == "asha"
        )
        if self.source:
            self.source.check(self.candidates.values())
            sweep_folder.add_run(self.stored, self.source.folder, everyone[0], self.source.step)
        self.plan = self.stored.plan(everyone, at_plateaus=s.sampler == "optuna")
        while damaged := self.stored.damaged(self.plan):
            print("\n".join(f"not begun from: {error}" for error in damaged), flush=True)
            self.plan = self.stored.plan(everyone, at_plateaus=s.sampler == "optuna")
        return self

    @property
    def everyone(self) -> dict[str, Candidate]:
        return self.candidates | {probe.name: probe for probe in self.probes.values()}

    @cached_property
    def metric(self) -> str:
        """Losses per token of different tokenizers do not compare; bits per byte do."""
        tokenizers = {c.experiment.data.tokenizer for c in self.candidates.values()}
        return "val/bits_per_byte" if len(tokenizers) > 1 else "val/loss"

    def keeper(self, tick: Callable[[], None]) -> Keeper:
        """The books of this study; they ask it for more trials, and which ones the probes speak against."""
        s = self.sweep.settings
        self.books = Keeper(
            self.folder,
            self.plan,
            self.stored,
            self.everyone,
            tick=tick,
            verdict=self.verdict,
            more=self.more,
            # A later sample may branch off anything.
            keep_branches=s.keep_branches or self.sampler is not None,
            diverged_above=s.diverged_above,
            probe_step=s.probe_step,
        )
        return self.books

    def _add(self, specs: Iterable[TrialSpec]) -> list[Candidate]:
        found = []
        for spec in specs:
            schedule = spec.experiment.lr_schedule()
            rates = (
                Rates(schedule, self.source.experiment.lr_schedule(), self.source.step)
                if self.source
                else Rates(schedule)
            )
            dataset = self.datasets[data_key(spec.experiment.data)]
            found.append(Candidate(spec, rates, dataset, self.layout.cpus_per_worker))
        self.candidates |= {c.name: c for c in found}
        return found

    # ---- optuna's samples ----
    def _add_sample(self, number: int, values: dict[str, Any]) -> list[Candidate]:
        """The trials of a sample; none where its values contradict each other, which optuna cannot know."""
        try:
            found = self._add(
                sampled(self.sweep.settings, self.sweep.base.model_dump(), number, values)
            )
        except UserError as error:
            print(f"sample-{number} is passed over: {error}", flush=True)
            self.sampler.tell(number, None)
            return []
        self.samples[number] = [c.name for c in found]
        return found

    def more(self) -> list[Candidate]:
        """The next sample's trials, once optuna knows how the earlier ones ended; none: there are enough."""
        if self.sampler is None:
            return []
        for number, names in self.samples.items():
            states = [self.books.progress.trial(name) for name in names]
            if not {WAITING, RUNNING} & set(states):
                losses = [self.final(self.candidates[name]) for name in names]
                self.sampler.tell(number, None if None in losses else sum(losses) / len(losses))
        while len(self.sampler.earlier) < self.sweep.settings.num_samples:
            if found := self._add_sample(*self.sampler.ask()):
                return found
        return []

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to run."""
        wanted = self.sampler and len(self.sampler.earlier) < self.sweep.settings.num_samples
        return not self.books.progress.pending and not wanted

    def asha(self) -> dict[str, Any] | None:
        """Arguments of Tune's scheduler: rungs at a ninth, a third and the whole of the run, or later where it evaluates."""
        if self.sweep.settings.stop != "asha":
            return None
        longest, e = max(c.trial.steps for c in self.candidates.values()), self.sweep.base
        first = min(max(e.train.eval_interval, longest // 9), longest)
        return {
            "metric": self.metric,
            "max_t": longest,
            "grace_period": first,
            "reduction_factor": 3,
        }

    # ---- what came of it ----
    def rows(self) -> list[Row]:
        """One row a trial: how it ended, and the losses that it ended with."""
        return [self.row(c) for c in self.candidates.values()]

    def row(self, c: Candidate) -> Row:
        """How a trial ended, as a row of comparison.csv."""
        records = self.records(c)
        state = self.books.progress.trial(c.name)
        bits_per_byte = None
        if state == DONE:
            bits_per_byte = summary_file.last_value(records, "val/bits_per_byte")
        return Row(
            trial=c.name,
            setting=c.spec.setting,
            seed=c.spec.seed,
            fields=c.spec.fields,
            steps=c.trial.steps,
            state=state,
            metric=self.metric,
            final=self.final(c),
            best=min((r[self.metric] for r in records if self.metric in r), default=None),
            val_bits_per_byte=bits_per_byte,
            train_loss=summary_file.last_value(records, "train/loss"),
            weights_sha256=self.books.result(c.name).get("weights_sha256"),
            reason=self.reason(c.name),
        )

    def records(self, c: Candidate) -> list[dict[str, Any]]:
        """The trial's lines so far, from step 0."""
        return trials.curve(self.books.last_stage(c.name), c)

    def final(self, c: Candidate) -> float | None:
        """The loss that a trial which is done ended with."""
        if c.name not in self.finals and self.books.progress.trial(c.name) == DONE:
            self.finals[c.name] = summary_file.last_value(self.records(c), self.metric)
        return self.finals.get(c.name)

    def reason(self, trial: str) -> str | None:
        """Why it has no result."""
        stopped = self.books.progress.trial(trial) == STOPPED
        return (
            self.dropped.get(trial)
            if stopped and trial in self.dropped
            else self.books.reason(trial)
        )

    def winner(self, rows: list[Row]) -> tuple[str, float] | None:
        """Return the best trial of the best setting and its loss; None if no trial is done.

        The lowest loss of all trials may be a lucky seed of another setting.
        """
        best = ranking.rank(rows)[:1]
        if not best or best[0].rank is None:
            return self.best()
        loss, trial = min((row.final, row.trial) for row in best[0].trials if row.final is not None)
        return trial, loss

    def best(self) -> tuple[str, float] | None:
        """The lowest loss of a trial that is done, and whose it is."""
        done = [
            (final, name)
            for name, c in self.candidates.items()
            if (final := self.final(c)) is not None
        ]
        return min(done)[::-1] if done else None

    # ---- probes ----
    def verdict(self) -> list[str]:
        """The trials not worth going on with: their probes, averaged over seeds, end above the best by more than the margin."""
        losses: dict[str, list[float]] = defaultdict(list)
        for name, probe in self.probes.items():
            final = self.final(probe)
            diverged = self.books.progress.trial(probe.name) == DIVERGED
            # A probe that failed says nothing about its trunk, one that diverged says all.
            losses[self.candidates[name].spec.setting] += (
                [final] if final is not None else [float("inf")] if diverged else []
            )
        means = {setting: sum(values) / len(values) for setting, values in losses.items() if values}
        least, margin = min(means.values(), default=0.0), self.sweep.settings.probe_margin
        for name in self.probes:
            mean = means.get(self.candidates[name].spec.setting)
            if mean is not None and mean > least + margin:
                self.dropped[name] = (
                    f"its probe ended at {mean:.4f}, more than sweep.probe_margin={margin:g} above the best "
                    f"probe's {least:.4f}"
                )
        return list(self.dropped)


def data_key(data: Data) -> str:
    """Equal for experiments that are trained on the same prepared tokens."""
    return data.model_dump_json()


def with_absolute_paths(sweep: Sweep) -> Sweep:
    """Workers run in another folder."""
    trials = tuple(
        replace(s, experiment=init_from.with_absolute_path(s.experiment)) for s in sweep.trials
    )
    return replace(sweep, base=init_from.with_absolute_path(sweep.base), trials=trials)


def check_sources(sweep: Sweep, storage: Path) -> None:
    """All trials whose first weights cannot be had, at once, and the run to branch off."""
    problems = []
    if sweep.settings.sampler == "optuna":
        check_optuna()
        init_from.check(sweep.base)
    for spec in sweep.trials:
        try:
            init_from.check(spec.experiment)
        except UserError as error:
            problems.append(f"trial {spec.name}: {error}")
    if problems:
        raise UserError("\n".join(problems))
    if sweep.settings.from_:
        Source.of(sweep, storage)


def _check_names(folder: Path, candidates: Mapping[str, Candidate]) -> None:
    """A name stands for one trial for ever: its curve is in the tracking server under it."""
    changed = [
        name
        for name, c in candidates.items()
        if (read_json(folder / "trials" / name / "run.json") or {}).get(
            "trial", c.trial.key(c.trial.steps)
        )
        != c.trial.key(c.trial.steps)
    ]
    if changed:
        name = changed[0]
        there, here = (
            e.flat()
            for e in (
                RunFolder(folder / "trials" / name).read_experiment(),
                candidates[name].experiment,
            )
        )
        lines = [
            f"  {name}: {k}: {there.get(k)!r} there, {here[k]!r} here"
            for k in here
            if there.get(k) != here[k]
            and k not in ("name", "storage")
            and not k.startswith(("tracking.", "train.keep"))
        ]
        lines = lines or [
            f"  {name}: the same fields with another version of torch, other tokens or CPUs per worker"
        ]
        raise UserError(
            f"{folder} was begun with other experiments: {', '.join(changed[:3])}"
            f"{f' and {len(changed) - 3} more trials' if len(changed) > 3 else ''} would not be what they were "
            f"there; give the sweep a new name (name=…), or change back:\n" + "\n".join(lines)
        )


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
        found = cls(folder.absolute(), int(step), RunFolder(folder).read_experiment())
        order = stage_run.read_order((folder / "checkpoints").resolve().parent)
        if order and order.rates["before"]:
            raise UserError(
                f"sweep.from: '{word}' is a trial that branched off {order.rates['splice']:,} steps of another run "
                f"itself; branch off that one, or train it alone"
            )
        late = [s.name for s in sweep.trials if s.experiment.train.max_steps <= found.step]
        if found.step > found.experiment.train.max_steps:
            raise UserError(
                f"sweep.from: '{word}' has {found.experiment.train.max_steps} steps, and none {found.step}"
            )
        if late:
            raise UserError(
                f"sweep.from: {late[0]} ends at or before step {found.step}, where it would branch off; "
                f"raise train.max_steps"
            )
        return found

    def check(self, candidates) -> None:
        """Before the branch the trials are the run: all that a step depends on must be its own."""
        for c in candidates:
            theirs, ours = (
                {k: v for k, v in e.flat().items() if not k.startswith(trials.OUTSIDE)}
                for e in (self.experiment, c.experiment)
            )
            lines = [
                f"{k}: {theirs[k]!r} there, {ours[k]!r} here" for k in ours if theirs[k] != ours[k]
            ]
            if self.experiment.slots != c.experiment.slots:
                lines.append(
                    f"train.reduction_slots: {self.experiment.slots} there, {c.experiment.slots} here"
                )
            found = init_from.checkpoint_of(self.folder)
            if sweep_folder.data_of(found) != data_identity(c.dataset):
                lines.append("data: the tokens are not those that the run was trained on")
            if lines:
                raise UserError(
                    "\n".join(
                        [
                            f"sweep.from: {self.folder} was another experiment:",
                            *(f"  {x}" for x in lines),
                        ]
                    )
                )
