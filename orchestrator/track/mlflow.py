"""Sends a run folder to its MLflow run.

The run folder is the only source. Everything may be sent twice, because MLflow then stores the
same. So no value is lost or repeated after a crash, or if two processes send the same folder.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from orchestrator.runs.ending import MlflowStatus
from orchestrator.track import attachments, checkpoints, contents, server
from orchestrator.track.mlflow_run import MlflowRun
from orchestrator.track.outbox import MetricQueue, file_mark
from orchestrator.track.sender import RefusedError

Status = MlflowStatus | Literal["RUNNING"]
# Error codes of 4xx responses that may be transient: from a server that has no free connection, and
# from a proxy whose server has not started yet.
TRANSIENT = ("BAD_REQUEST", "ENDPOINT_NOT_FOUND")


class Projection(MlflowRun):
    """Sends a run folder to its MLflow run."""

    queue: MetricQueue
    _sent_marks: list[str | None] | None = None

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

        Raises:
            RefusedError: The run was deleted in MLflow.
        """
        if self.run is None:
            self.attach()
        # Metrics and status first, because users watch them.
        self.send_metrics()
        self._send_record()
        self._send_status(status)
        if self._has_own_checkpoints():
            checkpoints.send(self)
        attachments.send_changed(self, self._samples(), self.sent.samples)
        attachments.send_changed(self, self._documents(), self.sent.documents)

    def _has_own_checkpoints(self) -> bool:
        return True

    def _samples(self) -> list[Path]:
        """Files of generated text, oldest first."""
        return self.folder.sample_files()

    def _documents(self) -> list[Path]:
        """Texts and figures that are sent whenever they change; some may not exist."""
        folder = self.folder
        files = [folder.experiment_file, folder.summary_file, folder.events_file]
        return files + contents.replay_reports(folder)

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
def refusals() -> Iterator[None]:
    """Raise `RefusedError` if the server rejects a request and the reason is not transient."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        # Codes from 408 on are timeouts and overload, which may be transient.
        is_refusal = 400 <= error.get_http_status_code() < 408
        if is_refusal and error.error_code not in TRANSIENT:
            raise RefusedError(str(error)) from error
        raise
