"""The job that trains one run."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, cast

from orchestrator.checkpoint import store as checkpoint
from orchestrator.cluster import connection, device, dtypes, gauges
from orchestrator.cluster import layout as cluster
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, fields_with
from orchestrator.config.fields import FREE
from orchestrator.cost import cache
from orchestrator.cost.correct import AFTER_S
from orchestrator.cost.forecast import RunForecast, forecast_of
from orchestrator.cost.timing import Estimate
from orchestrator.data.corpus import Listing
from orchestrator.data.dataset import Manifest
from orchestrator.data.order import check_tokens
from orchestrator.data.prepared import find_in, list_sources
from orchestrator.errors import UserError
from orchestrator.folders import folder_bytes
from orchestrator.jobs.job import Job
from orchestrator.jobs.show import show_run
from orchestrator.runs import identity, journal, journal_copy, lock, metrics
from orchestrator.runs.console import Console, left_s
from orchestrator.runs.ending import Ending
from orchestrator.runs.facts import facts_of
from orchestrator.runs.folder import SweepFolder
from orchestrator.runs.summary import Summary, summarize
from orchestrator.text import differences
from orchestrator.track.server import where_to_look
from orchestrator.track.tracker import Tracker
from orchestrator.train import init_from
from orchestrator.workers import ray_train
from orchestrator.workers.diagnose import advise, diagnose
from orchestrator.workers.fitting import with_auto_size, with_known_size
from orchestrator.workers.watch import RunWatch


def run(experiment: Experiment, profile: int = 0) -> int:
    """Train one run. Return the exit status; see `Job.run` for the errors.

    Args:
        experiment: The configuration.
        profile: Number of steps to profile.
    """
    job = TrainJob(experiment)
    job.profile = profile
    return job.run()


class TrainJob(Job):
    """Trains one run; see `Job`.

    Attributes:
        layout: Workers and devices.
        sources: The files of the corpus; None if only the dataset is here.
        dataset: The prepared dataset.
        step: Step of the checkpoint from which the run resumes; 0 for a new run.
        forecast: Expected time, memory and disk of a new run; None for one that is resumed.
        summary: Content of summary.json.
        profile: Number of steps to profile.
    """

    profile = 0
    needs_worker_here = True
    layout: Layout
    sources: Listing | None
    dataset: Manifest
    step: int
    forecast: RunForecast | None
    summary: Summary

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(init_from.with_absolute_path(experiment))

    def check(self) -> None:
        init_from.require_init_from_exists(self.experiment)
        self.sources = list_sources(self.experiment.data)
        if SweepFolder(self.folder).sweep_file.exists():
            raise UserError(
                f"name: {self.folder.path} is the folder of a sweep; "
                "give the run another name (name=…)"
            )

    # ---- a run that is finished ----

    def is_finished(self) -> bool:
        max_steps = self.experiment.train.max_steps
        summary = self.folder.read_summary() or {}
        if summary.get("status") != "FINISHED" or summary.get("step") != max_steps:
            return False
        if "wall_s" not in summary or self.folder.read_record() is None:
            return False
        dataset = find_in(self.experiment.data, self.storage, sources=self.sources)
        if dataset is None or self._resume_step(dataset) != max_steps:
            return False
        self.dataset = dataset
        return True

    def show_again(self) -> None:
        self.mirror_dataset(self.dataset)  # a killed process may not have copied it
        damage = journal_copy.restore(self.folder, self.experiment.train.max_steps)
        if damage is not None:
            print(damage)
        name = self.experiment.name
        print(
            f"{name} is finished. To train longer, set a larger train.max_steps; to start again, "
            "use a new name"
        )
        if self.profile:
            print("--profile: there is nothing to profile, because no step is left")
        summary = cast(Summary, self.folder.read_summary())
        show_run(self.folder, summary, where_to_look(self.uri))
        self.resend()

    # ---- before the workers start ----

    def connect(self) -> None:
        connection.connect(meanwhile=ray_train.import_modules)

    def prepare(self) -> None:
        experiment = self.experiment
        recorded = None if experiment.train.restart else identity.recorded_train(self.folder)
        experiment = with_known_size(experiment, recorded.micro_batch_size if recorded else None)
        self.layout = cluster.find_layout(experiment, identity.recorded_layout(self.folder))
        self.dataset = self.prepare_dataset(experiment.data, self.sources)
        # Both calls raise UserError: the corpus is too small, or the first weights do not fit.
        tokens = {name: split.tokens for name, split in self.dataset.splits.items()}
        check_tokens(**tokens, block_size=experiment.model.block_size)
        init_from.check_shape(experiment, self.dataset.tokenizer["n_vocab"])

        lock.wait_for_writer(self.folder)
        self.step = self._resume_step(self.dataset)
        self.layout = device.of_workers(self.layout, experiment.compute.wait_for_nodes_s)
        begun = self.folder if self.step else None  # with `train.restart`, no checkpoint is valid
        if begun is None:
            trial = (experiment, self.dataset.tokenizer["n_vocab"])
            self.layout = with_auto_size(self.layout, [trial])
        experiment = identity.resolve_auto(experiment, self.layout, begun)
        dtypes.warn_if_emulated(experiment, self.layout, has_begun=self.step > 0)
        self.experiment = experiment
        changes = self._changes()
        facts = facts_of(experiment, self.dataset)
        self.forecast = None
        if self.step == 0:
            self.forecast = forecast_of(experiment, self.dataset, self.layout)
        identity.begin_attempt(self.folder, experiment, facts, self._attempt(changes))
        name = experiment.tracking.experiment
        self.tracker = Tracker(self.folder, self.uri, name, compare_all=self.was_restored)
        self._print_start()

    def _resume_step(self, dataset: Manifest) -> int:
        """Return the step of the newest valid checkpoint; 0 if there is none."""
        return identity.check_resumable(
            self.folder, self.experiment, dataset, _ignore_damaged_checkpoint
        )

    def _changes(self) -> list[str]:
        """Return what has changed since the checkpoint that may change the bits.

        Raises:
            UserError: The checkpoint has no proof, something has changed, and `train.allow_drift`
                is false. With a proof, the workers find out whether the bits are the same.
        """
        if self.step == 0:
            return []
        from orchestrator.train import numerics

        fingerprints = checkpoint.read_manifest(self.folder.checkpoint(self.step))["fingerprints"]
        before = fingerprints["numerics"]
        worker = numerics.Worker(cpus=self.layout.cpus_per_worker)
        now = numerics.fingerprint(self.experiment, worker)
        if self.layout.use_gpu or cluster.has_several_nodes():
            # The workers may run on another kind of machine than the driver. They check these two.
            now |= {key: before.get(key) for key in ("device", "torch")}
        lines = differences(before, now)
        if "proof" not in fingerprints:
            numerics.refuse_drift(lines, self.experiment, self.folder.path)
        return lines

    def _attempt(self, changes: list[str]) -> dict[str, Any]:
        """Return the entry of this start in run.json."""
        attempt: dict[str, Any] = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "from_step": self.step,
            "layout": asdict(self.layout),
        }
        if changes:
            attempt["changed"] = "; ".join(changes)
        fields = self.experiment.flat()
        return attempt | {name: fields[name] for name in fields_with(*FREE)}

    def _print_start(self) -> None:
        verb = "resuming" if self.step else "training"
        device = "GPU" if self.layout.use_gpu else f"{self.layout.cpus_per_worker} CPU(s)"
        print(
            f"{verb} {self.experiment.name} from step {self.step:,} of "
            f"{self.experiment.train.max_steps:,} in {self.folder.path} on "
            f"{self.layout.num_workers} worker(s) with {device} each",
            flush=True,
        )

    # ---- while the workers train ----

    def steps_stored(self) -> int:
        return max(self.folder.checkpoint_steps(), default=0)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        experiment = self.experiment
        console = Console(
            self.folder,
            experiment.train.max_steps,
            experiment.tokens,
            self._on_line,
        )
        self.watch = watch = RunWatch(self.folder, experiment.compute.hang_after_s)
        with console, watch:
            yield

    def _on_line(self, line: journal.Line) -> str | None:
        """Show a journal line in the gauges. Return a line for the user, if one is due."""
        last = self.experiment.train.max_steps
        gauges.show(
            self.folder.name,
            step=line["step"],
            steps=last,
            train_loss=line.get("train/loss"),
            val_loss=line.get("val/loss"),
            tokens_per_second=line.get("perf/tokens_per_sec"),
            left_seconds=left_s(line, last, self.experiment.tokens),
        )
        return None if self.forecast is None else self.forecast.comment(line)

    def work(self) -> None:
        folder = self.dataset.directory
        ray_train.fit(self.experiment, self.folder, folder, self.layout, self.profile, self.apart)

    # ---- how it ended ----

    def diagnose(self, error: Exception | None) -> Ending:
        ending = diagnose(self.folder, error, self.layout.num_workers)
        if ending.cause != "out_of_memory":
            return ending
        ending = advise(ending, self.folder, self.experiment, self.dataset, self.layout)
        # On a full disk, stopped.json keeps the reason without advice.
        with contextlib.suppress(OSError):
            self.folder.write_ending(ending)
        return ending

    def summarize(self, ending: Ending, wall_s: float) -> None:
        tokens = self.experiment.tokens
        self.summary = summarize(self.folder, ending, tokens, self.tracker.run_id, wall_s)
        if self.forecast is None or ending.kind != "done":
            return
        if wall_s >= AFTER_S:
            self._learn_speed()
        estimate: Estimate = {**(self.forecast.estimate or {})}
        if self.forecast.corrected_s is not None:
            estimate["corrected_s"] = self.forecast.corrected_s
        if estimate:
            self.summary["estimated"] = estimate
            self.summary["measured"] = {
                "time_s": self.summary["wall_s"],
                "memory_gib": metrics.peak_memory_gib(journal.read(self.folder)),
                "final_disk_bytes": folder_bytes(self.folder.checkpoints),
            }
            self.folder.write_summary(self.summary)

    def _learn_speed(self) -> None:
        n_vocab = self.dataset.tokenizer["n_vocab"]
        cache.learn(self.experiment, n_vocab, self.layout, journal.read(self.folder))

    def show(self) -> None:
        if self.summary["mlflow_run_id"] != self.tracker.run_id:
            # The server answered only now.
            self.summary["mlflow_run_id"] = self.tracker.run_id
            self.folder.write_summary(self.summary)
        show_run(self.folder, self.summary, self.link)


def _ignore_damaged_checkpoint(message: str) -> None:
    """Do nothing: rank 0 finds the same damaged checkpoint and records the event."""
