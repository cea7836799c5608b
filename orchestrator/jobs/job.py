"""The steps that a run and a sweep share, from the lock to the exit status.

Everything that a later attempt needs is written to the folder first. After a crash, the same
command therefore continues.
"""

import abc
import os
import sys
import time
from contextlib import AbstractContextManager

from orchestrator import folders
from orchestrator.cluster import connection, nodes
from orchestrator.cluster.layout import has_several_nodes
from orchestrator.config.experiment import Experiment
from orchestrator.config.sections import Data
from orchestrator.data.corpus import Listing
from orchestrator.data.dataset import FILE as DATASET_MANIFEST
from orchestrator.data.dataset import Manifest
from orchestrator.errors import EXIT_AGAIN, EXIT_DONE, RayDiedError
from orchestrator.jobs import restart
from orchestrator.jobs.alerts import Alerts
from orchestrator.mirror.dataset import upload_dataset
from orchestrator.mirror.session import mirrored, prepare
from orchestrator.mirror.upload import Uploader
from orchestrator.objects.address import Address, is_address
from orchestrator.runs import events, lock, signals, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import mirror_of, storage_root, storage_setting
from orchestrator.track.server import resolve_uri, share_warning, where_to_look
from orchestrator.track.tracker import Tracker, print_unsent, resend_metrics
from orchestrator.workers.watch import Watch


class Job(abc.ABC):
    """A run or a sweep. Read `run` first; the abstract methods are its steps.

    Args:
        experiment: The experiment, or the one that the trials of a sweep vary.

    Attributes:
        storage: Folder of all runs and datasets.
        folder: Folder of this run or sweep.
        uri: Tracking server.
        mirror: Address that gets a copy; None: none does.
        apart: The mirror, if it is all that the nodes share.
        uploader: Copies the folder to the mirror; None without one.
        tracker: Sends the folder to the tracking server; set by `prepare`.
        watch: Watches the workers; None before they start.
        has_lost_ray: Whether Ray has died while it worked.
    """

    tracker: Tracker
    uploader: Uploader | None = None
    watch: Watch | None = None
    has_lost_ray = False
    apart: Address | None = None
    needs_worker_here = False  # on nodes that share nothing

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.storage = storage_root(experiment)
        self.mirror = mirror_of(experiment)
        self.folder = RunFolder(self.storage / experiment.name)
        self.uri = resolve_uri(experiment, self.storage)

    def run(self) -> int:
        """Do the job and print its result. Return the exit status of the driver.

        Raises:
            UserError: The job cannot be done as it is configured.
            HeldError: Another driver works in the folder.
            MovedError: The folder was removed or moved meanwhile.
            RayDiedError: Ray has died before the workers started, or another start may help.
        """
        signals.notice_s()  # a wrong value would be found only after SIGTERM
        self.check()
        folders.check_writable(self.storage, "storage")
        if self.mirror is None:
            status = self._run()
        else:
            with mirrored(self.folder, self.mirror, self.storage) as self.uploader:
                if self.was_restored:
                    self.check()  # the folder exists only now
                status = self._run()
                if not self._finish_mirror() and status == EXIT_DONE:
                    status = EXIT_AGAIN
        if self.has_lost_ray:
            restart.leave(status)
        return status

    def _run(self) -> int:
        if self.is_finished():
            self.show_again()
            return EXIT_DONE
        alerts = Alerts(self.folder, self.experiment.tracking.alert)
        with (
            lock.held(self.folder.driver_lock) as killed_holder,
            folders.holding(self.folder.path),
            alerts,
        ):
            if killed_holder is not None and self.folder.run_file.exists():
                message = f"{killed_holder} was killed; this process takes over"
                print(events.note(self.folder, "taken_over", message)["message"], flush=True)
            self._start_ray()
            with restart.watching():
                self.prepare()
            ending = self._work_and_track()
            alerts.ended(ending)
        return ending.exit_status

    def _finish_mirror(self) -> bool:
        """Wait until the mirror has everything. Return whether it does."""
        assert self.uploader is not None
        is_short = signals.was_stopped()
        wait_s = signals.tracking_wait_s(Ending("again" if is_short else "done"))
        is_whole = False
        print(f"copying the rest to {self.mirror}", flush=True)
        with signals.ending_on_signal():
            is_whole = self.uploader.finish(wait_s, is_limit=is_short)
        if not is_whole:
            problem = self.uploader.problem or "the wait was interrupted"
            text = f"does not have everything ({problem}), but {self.folder.path} has"
            print(f"{self.mirror}: {text}; run the same command again", file=sys.stderr)
        return is_whole

    @property
    def was_restored(self) -> bool:
        """The folder was made from its mirror, so MLflow may have values that it has not."""
        return self.uploader is not None and self.uploader.state.was_restored

    def prepare_dataset(self, data: Data, sources: Listing | None) -> Manifest:
        """Return the dataset of a `data` section: from the storage, the mirror, or the corpus."""
        wait_s = self.experiment.compute.wait_for_nodes_s
        dataset = prepare(data, self.storage, self.mirror, sources, wait_s)
        if not dataset.directory.is_relative_to(self.storage):
            nodes.check_has(dataset.directory / DATASET_MANIFEST)
        self.mirror_dataset(dataset)
        return dataset

    def mirror_dataset(self, dataset: Manifest) -> None:
        """Copy a dataset of the storage to the mirror, unless the mirror has it."""
        folder = dataset.directory
        if self.uploader is not None and folder.parent == self.storage / "data":
            if self.apart is not None:
                print(f"copying the tokens to {self.mirror}, for the other nodes", flush=True)
                places = self.uploader.address.parent / "data"
                upload_dataset(self.uploader.store, places / folder.name, folder)
            self.uploader.datasets.append(folder)

    def _start_ray(self) -> None:
        print("starting Ray …", flush=True)
        with signals.while_ray_starts():
            self.connect()
        setting = storage_setting(self.experiment)
        nodes.check_nodes(setting, self.storage, self.needs_worker_here)
        if is_address(setting) and has_several_nodes():
            self.apart = self.mirror

    def _work_and_track(self) -> Ending:
        """Do the work. Write and print how it ended, also after an error or a signal."""
        started = time.monotonic()
        error: Exception | None = None
        ending: Ending | None = None
        try:
            self.tracker.start()
            print(f"MLflow: {where_to_look(self.uri)}", flush=True)
            if (warning := share_warning(self.uri)) is not None:
                print(warning, file=sys.stderr, flush=True)
            with self.watching(), signals.asking_to_stop(self._request_stop):
                self.work()
        except KeyboardInterrupt:
            ending = self.interrupted()
        except Exception as raised:
            error = raised
        if ending is None:
            ending = self._ray_died(error)
        # The following steps take a limited time and must not be interrupted.
        signals.let_end()
        try:
            folders.check_held(self.folder.path)
        except folders.MovedError:
            # Ray would print the errors of workers that could not write.
            os.environ["RAY_IGNORE_UNHANDLED_ERRORS"] = "1"
            raise
        if ending is None:
            ending = self.diagnose(error)
        self.summarize(ending, time.monotonic() - started)
        all_sent = False
        with signals.ending_on_signal():
            wait_s = signals.tracking_wait_s(ending)
            all_sent = self.tracker.finish(ending.mlflow_status, deadline_s=wait_s)
        _print_reason(ending)
        self.show()
        if not all_sent:
            print_unsent(self.folder, self.uri)
        return ending

    @property
    def link(self) -> str | None:
        """Where the tracking server shows the job; None until it has answered."""
        url = self.tracker.url
        return None if url is None else where_to_look(self.uri, url)

    def _ray_died(self, error: Exception | None) -> Ending | None:
        """Return None if Ray works.

        Raises:
            RayDiedError: Another start may help.
        """
        died = None if self.folder.ending_file.exists() else connection.failure(error)
        if died is None:
            return None
        self.has_lost_ray = True
        steps = self.steps_stored()
        ending = restart.ending_after(died, steps)
        if ending is None:
            events.note(self.folder, "ray_died", f"{died}; starting Ray again")
            raise RayDiedError(died, steps)
        return ending

    def _request_stop(self, reason: str) -> None:
        stop.request(self.folder, reason)

    def resend(self) -> None:
        """Send what the tracking server does not have of a finished job."""
        name = self.experiment.tracking.experiment
        resend_metrics(self.folder, self.uri, name, signals.EXIT_WAIT_S)

    # ---- steps that differ ----

    @abc.abstractmethod
    def check(self) -> None:
        """Raise UserError for a mistake that can be found without Ray. Write nothing."""

    @abc.abstractmethod
    def is_finished(self) -> bool:
        """Return whether an earlier job did all of the work. Ray is not connected yet."""

    @abc.abstractmethod
    def show_again(self) -> None:
        """Print the result of a finished job, and call `resend`."""

    @abc.abstractmethod
    def connect(self) -> None:
        """Connect to the Ray cluster, or start a local one."""

    @abc.abstractmethod
    def prepare(self) -> None:
        """Prepare datasets and folder, set `tracker`, and print the plan."""

    @abc.abstractmethod
    def steps_stored(self) -> int:
        """Return the steps that the checkpoints contain."""

    @abc.abstractmethod
    def watching(self) -> AbstractContextManager[object]:
        """Return a context that prints the progress while `work` runs. `watch` is part of it."""

    @abc.abstractmethod
    def work(self) -> None:
        """Train until everything is done or the job is asked to stop."""

    @abc.abstractmethod
    def diagnose(self, error: Exception | None) -> Ending:
        """Return how the work ended.

        Args:
            error: The exception of `work`; None if it returned.
        """

    def interrupted(self) -> Ending | None:
        """Return how the work ended after a signal; None: `diagnose` decides."""
        if self.watch is not None and self.watch.over:
            return None
        return Ending("again" if signals.was_stopped() else "interrupted")

    @abc.abstractmethod
    def summarize(self, ending: Ending, wall_s: float) -> None:
        """Write summary.json. After SIGTERM there may be only seconds left for it.

        Args:
            ending: How the job ended.
            wall_s: Seconds that the work took.
        """

    @abc.abstractmethod
    def show(self) -> None:
        """Print the summary and the next commands."""


def _print_reason(ending: Ending) -> None:
    if ending.reason is None:
        return
    if ending.kind == "user":
        print(f"error: {ending.reason}", file=sys.stderr)
    else:
        print(ending.facts.get("traceback", ending.reason), file=sys.stderr)
