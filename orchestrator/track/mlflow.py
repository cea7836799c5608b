"""Sends a run folder to its MLflow run.

The run folder is the only source. Everything may be sent twice, because MLflow then stores the
same. So no value is lost or repeated after a crash, or if two processes send the same folder.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from orchestrator.runs.ending import MlflowStatus
from orchestrator.track import answers, attachments, checkpoints, contents, outbox, server
from orchestrator.track.mlflow_run import LOST, MlflowRun
from orchestrator.track.outbox import MetricQueue, Row, file_mark
from orchestrator.track.sender import DoubtfulError, RefusedError

if TYPE_CHECKING:
    from mlflow.entities import Metric

log = logging.getLogger(__name__)
Status = MlflowStatus | Literal["RUNNING"]


class Projection(MlflowRun):
    """Sends a run folder to its MLflow run."""

    queue: MetricQueue
    _sent_marks: list[str | None] | None = None
    _checked_status: Status | None = None  # when MLflow's values were checked last

    def load(self) -> None:
        """Read run.json and tracking.json."""
        super().load()
        self.queue = MetricQueue(self.folder)

    @property
    def url(self) -> str | None:
        """Page with the metrics of the run; None until the server has answered."""
        if self.sent.experiment_id is None or self.sent.run_id is None:
            return None
        return server.run_url(self.uri, self.sent.experiment_id, self.sent.run_id)

    def send(self, status: Status | None) -> None:
        """Send everything that MLflow does not have.

        Args:
            status: Status of the MLflow run; None leaves it as it is.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._send(status)
        except MlflowException as error:
            if error.error_code != LOST:
                raise
            # The run, or a checkpoint that was registered, is no longer there.
            self.run = None
            self.sent = self.sent.without_values()
            self.save()
            raise DoubtfulError(str(error)) from error

    def _send(self, status: Status | None) -> None:
        self.notice_replaced_store()
        if self.run is None:
            self.attach()
            self.queue = MetricQueue(self.folder)
            self._sent_marks = None
            self.check_store()
        elif status != self._checked_status:  # at the end of the run
            self.run = self.fetch()
            self.check_store()
        self._checked_status = status
        # Metrics and status first, because users watch them.
        self.send_metrics()
        self._send_record()
        self._send_status(status)
        if self._has_own_checkpoints():
            checkpoints.send(self)
        attachments.send_changed(self, self._samples(), self.sent.samples)
        attachments.send_changed(self, self._documents(), self.sent.documents)

    def check_store(self) -> None:
        """Find out whether MLflow has lost values that it had accepted; if so, send them again.

        A database may have been restored from a backup.
        """
        accepted = outbox.accepted_rows(self.folder, self.sent)
        if not (self.doubted or self.lacks_values(accepted)):
            return
        known = self._stored_values()
        lost = [row for row in accepted if (row.key, row.step) not in known]
        if lost or not accepted:
            self.queue = MetricQueue(self.folder, known)
            self.sent.sent_step = -1
            self.sent.asides = 0
        if lost:
            log.warning(
                "tracking: MLflow has lost %d values of %s, the first of step %d; what is missing "
                "is sent again",
                len(lost),
                self.folder.path,
                lost[0].step,
            )
            self.sent = self.sent.without_values()
            self._sent_marks = None
        self.doubted = False

    def lacks_values(self, accepted: list[Row]) -> bool:
        """Compare the last value of each metric, and the number of values of one."""
        assert self.run is not None
        last = {row.key: row.value for row in accepted}
        if not last.items() <= self.run.data.metrics.items():
            return True
        counts = Counter(row.key for row in accepted).most_common(1)
        return any(len(self._history(key)) < count for key, count in counts)

    def _stored_values(self) -> set[tuple[str, int]]:
        """Return (metric, step) of all values that MLflow has."""
        assert self.run is not None
        return {(key, m.step) for key in self.run.data.metrics for m in self._history(key)}

    def _history(self, key: str) -> "list[Metric]":
        return self.client.get_metric_history(self.sent.run_id, key)

    def _has_own_checkpoints(self) -> bool:
        return True

    def _samples(self) -> list[Path]:
        """Files of generated text, oldest first."""
        return self.folder.sample_files()

    def _documents(self) -> list[Path]:
        """Files that are sent whenever they change; some may not exist."""
        folder = self.folder
        files = [folder.experiment_file, folder.summary_file, folder.events_file, folder.trace_file]
        return files + folder.code_files() + contents.replay_reports(folder)

    def send_metrics(self) -> None:
        """Send the new lines of the journal."""
        from mlflow.entities import Metric

        self.queue.refresh(self.sent)
        for batch in self.queue.batches():
            if batch.rows:
                metrics = [Metric(*row) for row in batch.rows]
                self.client.log_batch(self.sent.run_id, metrics=metrics)
            self.sent.sent_step = batch.sent_step
            self.sent.asides = batch.asides
            self.save()

    def _send_record(self) -> None:
        """Send parameters, tags and dataset that are new or have changed."""
        from mlflow.entities import Param, RunTag

        # Only after a change, because removing secrets from all texts takes tens of milliseconds.
        sources = (self.folder.run_file, self.folder.events_file, self.folder.replays)
        marks = [file_mark(path) for path in sources]
        if marks == self._sent_marks:
            return
        self.record = self.folder.read_record() or self.record
        assert self.run is not None
        known = self.run.data
        params = contents.params(self.record)
        tags = contents.tags(self.folder, self.record, params | known.params) | self.first_tags
        new_params = {name: text for name, text in params.items() if name not in known.params}
        new_tags = {name: text for name, text in tags.items() if known.tags.get(name) != text}
        if new_params or new_tags:
            self.client.log_batch(
                self.sent.run_id,
                params=[Param(*param) for param in new_params.items()],
                tags=[RunTag(*tag) for tag in new_tags.items()],
            )
            known.params.update(new_params)
            known.tags.update(new_tags)
        self._send_dataset()
        self._sent_marks = marks

    def _send_dataset(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        fields = contents.dataset(self.record)
        assert self.run is not None
        known = [entry.dataset.digest for entry in self.run.inputs.dataset_inputs]
        if fields is None or fields["digest"] in known:
            return
        entry = DatasetInput(Dataset(**fields), [InputTag("mlflow.data.context", "train")])
        self.client.log_inputs(self.sent.run_id, [entry])

    def _send_status(self, status: Status | None) -> None:
        """Set the status, also of a run that had ended and now continues."""
        assert self.run is not None
        info = self.run.info
        ended_ms = None if status == "RUNNING" else contents.ended_ms(self.folder)
        if status is None or (info.status == status and ended_ms in (None, info.end_time)):
            return
        if status == "RUNNING":
            self.client.update_run(info.run_id, status=status)
        else:
            self.client.set_terminated(info.run_id, status, ended_ms)
        self.run = self.fetch()


@contextlib.contextmanager
def refusals(uri: str) -> Iterator[None]:
    """Raise `RefusedError` or `DoubtfulError` if the server rejects a request; see `answers`."""
    try:
        yield
    except (RefusedError, DoubtfulError):
        raise
    except Exception as error:
        rejection = answers.rejection(error, uri)
        if rejection is None:
            raise
        raise rejection from error
