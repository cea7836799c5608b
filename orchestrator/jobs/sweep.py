"""The job that runs a sweep: all its trials, in a tree of stages. It writes into its folder:

sweep.yaml       the resolved configuration     stages/<id>/    steps that trials share
plan.txt         the tree of stages             trials/<name>/  one folder per trial
comparison.csv   one row per trial              figures/
summary.json     how the sweep ended            events.jsonl    events
"""

import os
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import cast

from orchestrator.cluster import connection, device, dtypes
from orchestrator.cluster import layout as cluster
from orchestrator.cluster.layout import Layout
from orchestrator.config.sections import Data
from orchestrator.cost.correct import AFTER_S
from orchestrator.cost.timing import Estimate
from orchestrator.cost.tokens import TokenCounts
from orchestrator.data.corpus import Listing
from orchestrator.data.dataset import Manifest
from orchestrator.data.order import check_tokens
from orchestrator.data.prepared import find_in, list_sources
from orchestrator.errors import UserError
from orchestrator.files import read_text
from orchestrator.jobs.job import Job
from orchestrator.runs import lock, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.facts import model_facts
from orchestrator.runs.folder import SweepFolder
from orchestrator.runs.identity import recorded_layout
from orchestrator.sweep import cost
from orchestrator.sweep.outcome import ending_of
from orchestrator.sweep.report import view
from orchestrator.sweep.report.comparison import trials_in
from orchestrator.sweep.report.files import SweepFiles
from orchestrator.sweep.report.pace import Pace
from orchestrator.sweep.report.progress_lines import ProgressLines
from orchestrator.sweep.report.summary import SweepSummary, show
from orchestrator.sweep.source import check_sources, with_absolute_paths, with_known_sizes
from orchestrator.sweep.space.expand import Sweep
from orchestrator.sweep.study import Study
from orchestrator.sweep.tree import Stage
from orchestrator.sweep.trials import data_key
from orchestrator.track.server import where_to_look
from orchestrator.track.tracker import Tracker
from orchestrator.train import init_from
from orchestrator.workers.diagnose import ending_of_tracebacks
from orchestrator.workers.watch import Watch


def run(sweep: Sweep) -> int:
    """Run a sweep. Return the exit status; see `Job.run` for the errors."""
    return SweepJob(sweep).run()


class SweepJob(Job):
    """Runs all trials of a sweep; see `Job`.

    Attributes:
        sweep: The resolved configuration.
        sources: The files of each corpus; None if only the dataset is here.
        study: The trials and their tree of stages.
        slots: Number of stages that can run at the same time.
        counts: Size of each dataset.
        report: Writes the files of the sweep.
        summary: Content of summary.json.
    """

    folder: SweepFolder
    sources: dict[str, Listing | None]
    study: Study
    slots: int
    counts: cost.Counts
    report: SweepFiles
    summary: SweepSummary

    def __init__(self, sweep: Sweep) -> None:
        super().__init__(sweep.base)
        self.folder = SweepFolder(self.folder)
        self.sweep = with_absolute_paths(sweep)

    def check(self) -> None:
        check_sources(self.sweep, self.storage)
        sections = self._data_sections().items()
        self.sources = {key: list_sources(data) for key, data in sections}
        if self.folder.experiment_file.exists():
            raise UserError(
                f"name: {self.folder.path} is the folder of a run; "
                "give the sweep another name (name=…)"
            )

    # ---- a sweep that is finished ----

    def is_finished(self) -> bool:
        """Return whether no stage is left to run. If so, `study` is set."""
        layout = recorded_layout(self.folder)
        if layout is None:
            return False
        summary = self.folder.read_summary() or {}
        if summary.get("status") != "FINISHED" or self.folder.read_record() is None:
            return False
        if "wall_s" not in summary:  # a file of another program
            return False
        datasets = {}
        for key, data in self._data_sections().items():
            dataset = find_in(data, self.storage, sources=self.sources[key])
            if dataset is None:
                return False
            datasets[key] = dataset
        self.study = Study(_fitting(self.sweep, datasets), self.folder, layout, datasets)
        self.study.progress.release_judged()
        return self.study.is_over

    def show_again(self) -> None:
        print(
            f"{self.folder.name} is finished; if you add values to its grid, only new steps are "
            "trained"
        )
        for dataset in self.study.datasets.values():
            self.mirror_dataset(dataset)  # a killed process may not have copied it
        self._restore_journals()
        SweepFiles(self.study).write_trials()
        summary = cast(SweepSummary, self.folder.read_summary())
        file = self.folder.comparison_file
        if not file.exists() or trials_in(read_text(file)) != self.study.trials.keys():
            summary = self._write_again()
        show(self.study, summary, where_to_look(self.uri))
        self.resend()

    def _write_again(self) -> SweepSummary:
        """Write the files of a sweep that has other trials than before, all of which are done."""
        report = SweepFiles(self.study)
        with lock.held(self.folder.driver_lock):
            report.begin()
            return report.finish(Ending("done"), 0.0)

    # ---- before the stages start ----

    def connect(self) -> None:
        connection.connect(meanwhile=_import_tune)

    def prepare(self) -> None:
        layout = self._layout()
        datasets = {
            key: self.prepare_dataset(data, self.sources[key])
            for key, data in self._data_sections().items()
        }
        self.sweep = _fitting(self.sweep, datasets)
        for stage in self.folder.stages():
            lock.wait_for_writer(stage)
        workers = layout
        recorded = recorded_layout(self.folder)
        if recorded is not None:
            size = recorded.micro_batch_size
            layout = replace(layout, fast_dtype=recorded.fast_dtype, micro_batch_size=size)
        self.slots = max(1, cluster.capacity(layout, self.apart))
        self.counts = {key: TokenCounts.of(dataset) for key, dataset in datasets.items()}
        layout = cost.with_micro_batch(layout, self.sweep, self.counts, self.slots)
        self.study = Study(self.sweep, self.folder, layout, datasets).restored()
        if self.study.source is not None and self.apart is None:
            self.study.source.check_nodes()
        experiments = [trial.experiment for trial in self.study.trials.values()]
        for experiment in {e.train.dtype: e for e in experiments}.values():
            dtypes.warn_if_emulated(experiment, workers, has_begun=recorded is not None)
        self._restore_journals()
        stop.clear(self.folder)
        if os.environ.get("ESPALIER_AUTOSCALING"):
            # The autoscaler adds nodes for stages that wait, so all stages request their resources.
            self.slots = max(self.slots, len(self.study.tree.to_run))
        name = self.experiment.tracking.experiment
        self.tracker = Tracker(self.folder, self.uri, name, compare_all=self.was_restored)
        self._begin_report(self._describe())

    def _restore_journals(self) -> None:
        for damage in self.study.stored.restore_journals():
            print(damage, flush=True)

    def _data_sections(self) -> dict[str, Data]:
        """Return each combination of corpus and tokenizer once."""
        return {data_key(e.data): e.data for e in self.sweep.experiments}

    def _layout(self) -> Layout:
        """Return the layout that all trials share.

        Raises:
            UserError: Trials with other slots would get another number of workers.
        """
        recorded = recorded_layout(self.folder)
        by_slots = {e.slots: e for e in with_known_sizes(self.sweep, self.storage, recorded)}
        layouts = {cluster.find_layout(e, recorded) for e in by_slots.values()}
        if len(layouts) > 1:
            numbers = sorted(layout.num_workers for layout in layouts)
            raise UserError(
                f"compute.num_workers: trials with {sorted(by_slots)} reduction slots would run on "
                f"{numbers} workers; set compute.num_workers={numbers[0]}"
            )
        return device.of_workers(layouts.pop(), self.experiment.compute.wait_for_nodes_s)

    def _describe(self) -> Estimate | None:
        """Print what will run and its cost. Return the estimate; None if there is none."""
        study = self.study
        print("\n".join([*view.summary(study.tree), *study.notes()]))
        print(
            f"{self.slots} stage(s) at a time, {study.layout.num_workers} worker(s) each, "
            f"in {self.folder.path}",
            flush=True,
        )
        if not study.tree.to_run:
            return None
        return cost.announce(study, self.slots, self.counts)

    def _begin_report(self, estimate: Estimate | None) -> None:
        """Write the files of the sweep, and start to print its progress."""
        pace = Pace(self.study, self.slots, estimate)
        lines = ProgressLines(pace, self.study.best)
        report = SweepFiles(self.study, pace)

        # Tune pickles this function, so it must not refer to the job, whose tracker has a thread.
        def stage_ended(stage: Stage) -> None:
            report.stage_ended(stage)
            lines.stage_ended(stage)

        def tick() -> None:
            report.tick()
            lines.tick()

        self.study.progress.tick = tick
        self.study.progress.on_stage_end = stage_ended
        self.report = report
        report.begin()

    # ---- while the stages run ----

    def steps_stored(self) -> int:
        return sum(max(stage.checkpoint_steps(), default=0) for stage in self.folder.stages())

    def watching(self) -> AbstractContextManager[object]:
        self.watch = Watch(self.folder, self.study.progress.running)
        return self.watch

    def work(self) -> None:
        from orchestrator.sweep import tune  # importing Ray Tune takes seconds

        tune.execute(self.study, self.slots, self.apart)

    # ---- how it ended ----

    def diagnose(self, error: Exception | None) -> Ending:
        if error is not None:
            # An error of the job itself; the error of a trial is stored in its stage.
            trace = "".join(traceback.format_exception(error))
            return ending_of_tracebacks(self.folder, [trace], self.study.layout.num_workers)
        return ending_of(self.study, self.slots)

    def summarize(self, ending: Ending, wall_s: float) -> None:
        self.summary = self.report.finish(ending, wall_s, quick=ending.kind == "again")
        if ending.kind == "done" and wall_s >= AFTER_S:
            cost.learn(self.study)

    def show(self) -> None:
        show(self.study, self.summary, self.link)


def _import_tune() -> None:
    """Import Ray Tune, which takes seconds."""
    import orchestrator.sweep.tune  # noqa: F401


def _fitting(sweep: Sweep, datasets: Mapping[str, Manifest]) -> Sweep:
    """Return the sweep, with `skip_invalid` without the trials that do not fit.

    Raises:
        UserError: A trial does not fit its dataset or first weights; names all of them.
    """
    problems = []
    fitting = []
    for spec in sweep.trials:
        experiment = spec.experiment
        dataset = datasets[data_key(experiment.data)]
        n_vocab = dataset.tokenizer["n_vocab"]
        try:
            tokens = {name: split.tokens for name, split in dataset.splits.items()}
            check_tokens(**tokens, block_size=experiment.model.block_size)
            model_facts(experiment, n_vocab)
            init_from.check_shape(experiment, n_vocab)
            fitting.append(spec)
        except (RuntimeError, OverflowError):
            problems.append(
                f"trial {spec.name}: a model with these sizes cannot be built; "
                "lower model.n_embd or model.n_layer"
            )
        except ValueError as error:
            problems.append(f"trial {spec.name}: {error}")
    if problems and not (sweep.settings.skip_invalid and fitting):
        raise UserError("\n".join(problems))
    return replace(sweep, trials=tuple(fitting), left_out=(*sweep.left_out, *problems))
