"""A sweep that is ready to run: its trials, their tree of stages, and their results."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from orchestrator.cluster.layout import Layout
from orchestrator.data.dataset import Manifest
from orchestrator.errors import UserError
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.runs.journal import Line
from orchestrator.runs.summary import last_value
from orchestrator.sweep import ranking, stored, trials
from orchestrator.sweep.probes import probes_of, worse_trials
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.ranking import Row
from orchestrator.sweep.report.advice import left_out, of_other_code
from orchestrator.sweep.source import BaseRun, check_names
from orchestrator.sweep.space.auto import AutoValues
from orchestrator.sweep.space.checks import varied_fields
from orchestrator.sweep.space.expand import Sweep, Trial, sampled
from orchestrator.sweep.space.sampler import Sampler
from orchestrator.sweep.states import DIVERGED, DONE, RUNNING, STOPPED, WAITING
from orchestrator.sweep.tree import StageTree
from orchestrator.sweep.trials import PlannedTrial, data_key, present_code, restore_specs


class Study:
    """A sweep that is ready to run. Creating the object reads its folder and writes nothing.

    Args:
        sweep: The resolved sweep.
        folder: Its folder.
        layout: Workers of each stage.
        datasets: The prepared tokens, by `data_key`.

    Attributes:
        trials: By name; optuna's are added while the sweep runs.
        probes: The probe of each trial that has one, by the trial's name.
        samples: Names of the trials of each of optuna's samples.
        dropped: Why trials were stopped after their probes, by name.
        left_out: A line for each trial or sample that cannot be run.
        not_used: A line for each damaged checkpoint.
        tree: The stages as planned when the object was created; `progress.tree` is the newest.

    Raises:
        UserError: The folder has another trial of the same name, or the run that the sweep branches
            off does not fit.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: SweepFolder,
        layout: Layout,
        datasets: Mapping[str, Manifest],
    ) -> None:
        settings = sweep.settings
        self.sweep = sweep
        self.folder = folder
        self.layout = layout
        self.datasets = datasets
        self.trials: dict[str, PlannedTrial] = {}
        self.probes: dict[str, PlannedTrial] = {}
        self.samples: dict[int, list[str]] = {}
        self.dropped: dict[str, str] = {}
        self.left_out = list(sweep.left_out)
        self.not_used: list[str] = []
        self.sampler: Sampler | None = None
        self.source: BaseRun | None = None
        self._final_losses: dict[str, float | None] = {}

        if settings.from_ is not None:
            self.source = BaseRun.of(sweep, folder.path.parent)
        source = RunFolder(self.source.folder) if self.source is not None else None
        self._auto = AutoValues(folder, layout, source)
        self._add(sweep.trials)
        if settings.sampler == "optuna":
            self.sampler = Sampler(
                folder, settings.space, sweep.base.train.seed, sweep.base.model.kind
            )
            for number, values in enumerate(self.sampler.earlier[: settings.num_samples]):
                self._add_sample(number, values)
        check_names(folder, self.trials)
        if settings.stop == "anneal_probe":
            assert settings.probe_step is not None and settings.probe_steps is not None
            self.probes = probes_of(self.trials.values(), settings.probe_step, settings.probe_steps)
        branches = [trial.branch for trial in self.trials_and_probes.values()]
        self.stored = stored.scan(
            folder,
            branches,
            settings.diverged_above,
            keeps_stopped=settings.stop == "asha",
            made_by=partial(present_code, layout.device_name),
            base=self.source,
        )
        if self.source is not None:
            self.source.refuse_other_experiments(self.trials.values())
            self.stored.add_run(RunFolder(self.source.folder), branches[0], self.source.step)
        self.tree = self._build_tree()

    def restored(self) -> "Study":
        """Write stage.json again where it is lost. Return a study that uses these stages."""
        limit = self.sweep.settings.diverged_above
        if restore_specs(self.folder, self.trials_and_probes.values(), limit):
            return Study(self.sweep, self.folder, self.layout, self.datasets)
        return self

    def _build_tree(self) -> StageTree:
        """Return the tree of the trials; it uses no damaged checkpoint."""
        branches = [trial.branch for trial in self.trials_and_probes.values()]
        while True:
            # Later samples of optuna may branch off where the learning rate begins to fall.
            tree = self.stored.tree(branches, at_decays=self.sampler is not None)
            problems = self.stored.forget_damaged(tree)
            if not problems:
                return tree
            self.not_used += [f"not used: {problem}" for problem in problems]

    def notes(self) -> list[str]:
        """Return lines about trials that cannot be run, and stored stages that cannot be used."""
        others = of_other_code(self.stored.made_by_others) if self.tree.to_run else []
        return [*left_out(self.left_out), *others, *self.not_used, *self._other_dtypes()]

    def _other_dtypes(self) -> list[str]:
        """Return a line if trials have several types, and the sweep does not compare those."""
        counts = Counter(trial.experiment.train.dtype for trial in self.trials.values())
        if len(counts) < 2 or "train.dtype" in varied_fields(self.sweep.settings):
            return []
        found = ", ".join(f"{count:,} trial(s) in {dtype}" for dtype, count in counts.items())
        return [f"train.dtype: {found} are compared; for one type, set it under a new name"]

    @property
    def trials_and_probes(self) -> dict[str, PlannedTrial]:
        return self.trials | {probe.name: probe for probe in self.probes.values()}

    @cached_property
    def metric(self) -> str:
        """The loss that is compared: per byte if the trials have different tokenizers."""
        tokenizers = {trial.experiment.data.tokenizer for trial in self.trials.values()}
        return "val/bits_per_byte" if len(tokenizers) > 1 else "val/loss"

    @cached_property
    def progress(self) -> Progress:
        """The state of this sweep while it runs."""
        return Progress(
            self.folder,
            self.tree,
            self.stored,
            self.trials_and_probes,
            self.sweep.settings,
            self.layout.num_workers,
            self.judge_probes,
            self.next_sample,
        )

    def _add(self, new: Iterable[Trial]) -> list[PlannedTrial]:
        planned = []
        for trial in self._auto.put_into(list(new)):
            steps = trial.experiment.steps()
            if self.source is not None:
                before = self.source.experiment.steps().plan
                steps = replace(steps, before=before, splice=self.source.step)
            dataset = self.datasets[data_key(trial.experiment.data)]
            planned.append(
                PlannedTrial(
                    **vars(trial),
                    steps=steps,
                    dataset=dataset,
                    cpus=self.layout.cpus_per_worker,
                    device=self.layout.device_name,
                    base=self.source,
                )
            )
        self.trials |= {trial.name: trial for trial in planned}
        return planned

    # ---- samples of optuna ----

    def _add_sample(self, number: int, values: dict[str, Any]) -> list[PlannedTrial]:
        """Add the trials of a sample; none if its values contradict each other."""
        assert self.sampler is not None
        try:
            new = sampled(self.sweep.settings, self.sweep.base.model_dump(), number, values)
            added = self._add(new)
        except UserError as error:
            self.left_out.append(f"sample-{number}: {error}")
            print(f"sample-{number} is left out: {error}", flush=True)
            self.sampler.tell(number, None)
            return []
        self.samples[number] = [trial.name for trial in added]
        return added

    def next_sample(self) -> list[PlannedTrial]:
        """Tell optuna how its samples ended. Return the trials of a new one, if one is wanted."""
        if self.sampler is None:
            return []
        for number, names in self.samples.items():
            self._tell(self.sampler, number, names)
        while self._wants_samples():
            added = self._add_sample(*self.sampler.ask())
            if added:
                return added
        return []

    def _tell(self, told: Sampler, number: int, names: list[str]) -> None:
        """Tell optuna the mean loss of a sample over its seeds, if all of them have ended."""
        if any(self.progress.states.of_trial(name) in (WAITING, RUNNING) for name in names):
            return
        losses = [self.final_loss(self.trials[name]) for name in names]
        known = [loss for loss in losses if loss is not None]
        told.tell(number, sum(known) / len(known) if len(known) == len(losses) else None)

    def _wants_samples(self) -> bool:
        if self.sampler is None:
            return False
        return len(self.sampler.earlier) < (self.sweep.settings.num_samples or 0)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to run."""
        return not self.progress.states.pending and not self._wants_samples()

    # ---- results ----

    def results(self) -> list[Row]:
        """Return how every trial ended."""
        return [self.result_of(trial) for trial in self.trials.values()]

    def result_of(self, trial: PlannedTrial) -> Row:
        """Return how a trial ended, with its losses."""
        lines = self.curve(trial)
        end = self.progress.result(trial.name)
        state = self.progress.states.of_trial(trial.name)
        losses = [line[self.metric] for line in lines if self.metric in line]
        bits_per_byte = last_value(lines, "val/bits_per_byte") if state == DONE else None
        return Row(
            trial=trial.name,
            setting=trial.setting,
            seed=trial.seed,
            fields=trial.fields,
            steps=trial.branch.steps,
            state=state,
            metric=self.metric,
            final=self.final_loss(trial),
            best=min(losses, default=None),
            val_bits_per_byte=bits_per_byte,
            train_loss=last_value(lines, "train/loss"),
            weights_sha256=end.weights_sha256 if end is not None else None,
            reason=self.reason(trial.name),
        )

    def curve(self, trial: PlannedTrial) -> list[Line]:
        """Return the journal lines of a trial so far, from step 0."""
        return trials.curve(self.progress.last_stage(trial.name), trial)

    def final_loss(self, trial: PlannedTrial) -> float | None:
        """Return the last loss of a trial that is done."""
        if self.progress.states.of_trial(trial.name) != DONE:
            return None
        if trial.name not in self._final_losses:
            self._final_losses[trial.name] = last_value(self.curve(trial), self.metric)
        return self._final_losses[trial.name]

    def reason(self, trial: str) -> str | None:
        """Return why a trial has no result."""
        if trial in self.dropped and self.progress.states.of_trial(trial) == STOPPED:
            return self.dropped[trial]
        return self.progress.reason(trial)

    def winner(self, rows: list[Row]) -> ranking.Best | None:
        """Return the best seed of the best setting; None if nothing is done.

        The trial with the lowest loss may be a lucky seed of another setting.
        """
        settings = ranking.rank(rows)
        if not settings or settings[0].rank is None:
            return self.best()
        return ranking.lowest({row.trial: row.final for row in settings[0].trials})

    def best(self) -> ranking.Best | None:
        """Return the trial with the lowest final loss."""
        return ranking.lowest({name: self.final_loss(trial) for name, trial in self.trials.items()})

    def judge_probes(self) -> list[str]:
        """Return the trials to stop after their probes. Losses are averaged over seeds."""
        losses: dict[str, list[float]] = defaultdict(list)
        for name, probe in self.probes.items():
            setting = self.trials[name].setting
            final = self.final_loss(probe)
            if final is not None:
                losses[setting].append(final)
            elif self.progress.states.of_trial(probe.name) == DIVERGED:
                losses[setting].append(float("inf"))
            # A probe that failed decides nothing.
        settings = {name: self.trials[name].setting for name in self.probes}
        self.dropped |= worse_trials(losses, settings, self.sweep.settings.probe_margin)
        return list(self.dropped)
