"""Shows a run or a sweep in MLflow while it goes on, and sends later what was not received."""

from orchestrator.redact import redact_text
from orchestrator.runs import lock, signals
from orchestrator.runs.ending import MlflowStatus
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.track import contents, server
from orchestrator.track.mlflow import Projection, Status, refusals
from orchestrator.track.sender import Sender
from orchestrator.track.sweep import SweepProjection


class Tracker:
    """Sends the folder of a run, or of a sweep with all its trials, to MLflow from a thread.

    Only `finish` waits for the server, and no method raises an error of the server.

    Args:
        folder: A `SweepFolder` for a sweep.
        uri: Tracking URI.
        experiment_name: Name of the MLflow experiment.
        status: Status of the MLflow run until `finish`; None leaves it as it is.
        compare_all: Compare every value with MLflow's, not only the last one of each metric.
    """

    def __init__(
        self,
        folder: RunFolder,
        uri: str,
        experiment_name: str,
        status: Status | None = "RUNNING",
        compare_all: bool = False,
    ) -> None:
        self._status = status
        self._sender = Sender(self._attempt, f"tracking to {redact_text(uri)}")
        kind = SweepProjection if isinstance(folder, SweepFolder) else Projection
        self._projection = kind(folder, uri, experiment_name, self._sender.given_up)
        self._projection.doubted = compare_all

    def start(self) -> None:
        """Start to send the folder, which must have a run.json."""
        self._projection.load()
        self._sender.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has answered."""
        return self._projection.sent.run_id

    @property
    def url(self) -> str | None:
        """Page of the run; None until the server has answered."""
        return self._projection.url

    def finish(self, status: MlflowStatus | None, deadline_s: float = 60) -> bool:
        """Send the rest and set the status.

        Args:
            status: Status of the MLflow run; None leaves it as it is.
            deadline_s: Seconds to wait for the server.

        Returns:
            Whether the server has accepted everything.
        """
        self._status = status
        return self._sender.finish(deadline_s)

    def _attempt(self) -> None:
        server.set_client_options()
        # MLflow cannot create a run "if it does not exist": without the lock, two processes that
        # send a new run at the same time would create two.
        with lock.held(self._projection.folder.sender_lock), refusals(self._projection.uri):
            self._projection.send(self._status)


def resend_metrics(
    folder: RunFolder,
    uri: str,
    experiment_name: str,
    deadline_s: float = 60,
    compare_all: bool = False,
) -> bool:
    """Send what MLflow does not have of a run or a sweep. Ctrl-C ends the wait.

    If the server does not accept everything, print which command sends the rest.

    The MLflow run gets the status in summary.json.

    Args:
        folder: A `SweepFolder` for a sweep.
        uri: Tracking URI.
        experiment_name: Name of the MLflow experiment.
        deadline_s: Seconds to wait for the server.
        compare_all: See `Tracker`.

    Returns:
        Whether the server has accepted everything.
    """
    status = contents.recorded_status(folder)
    tracker = Tracker(folder, uri, experiment_name, status, compare_all)
    tracker.start()
    is_sent = False
    try:
        is_sent = tracker.finish(status, deadline_s)
    except KeyboardInterrupt:
        if signals.was_stopped():
            raise
    if not is_sent:
        print_unsent(folder, uri)
    return is_sent


def print_unsent(folder: RunFolder, uri: str) -> None:
    """Print that the server did not accept everything, and which command sends the rest."""
    print(
        f"{redact_text(uri)} did not accept everything; nothing is lost, send the rest with\n"
        f"  pipelines/replay_metrics.py {folder.path}",
        flush=True,
    )
