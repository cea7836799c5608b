"""The MLflow run of a run folder: how it is found or created, and what it has accepted so far."""

import contextlib
import functools
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator import files
from orchestrator.errors import UserError
from orchestrator.redact import hide_passwords
from orchestrator.runs.folder import RunFolder, RunRecord
from orchestrator.track import contents, server
from orchestrator.track.outbox import Sent
from orchestrator.track.sender import GivenUpError, RefusedError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KEY_TAG = "espalier.run_key"
LOST = "RESOURCE_DOES_NOT_EXIST"  # code of an error
TAKEN = "RESOURCE_ALREADY_EXISTS"
# Device and inode of each file that was at the path of a local database; None: it did not exist.
_databases: dict[Path, list[tuple[int, int] | None]] = {}
log = logging.getLogger(__name__)


class MlflowRun:
    """The MLflow run of a run folder. Creating the object reads no file.

    Args:
        folder: Folder of the run.
        uri: Tracking URI.
        experiment_name: Name of the MLflow experiment.
        given_up: Set when nothing more should be sent; see `Sender`.

    Attributes:
        record: Content of run.json.
        sent: Content of tracking.json: what MLflow has accepted.
        run: MLflow's run; None before `attach`.
        first_tags: Tags that a new run gets besides its key.
        doubted: True if the server may have lost what it had accepted.
    """

    def __init__(
        self, folder: RunFolder, uri: str, experiment_name: str, given_up: threading.Event
    ) -> None:
        self.folder = folder
        self.uri = uri
        self.experiment_name = experiment_name
        self.given_up = given_up
        self.record = RunRecord()
        self.sent = self._nothing_sent()
        self.run: Run | None = None
        self.first_tags: dict[str, str] = {}
        self.doubted = False
        self._connected_to = 0  # number of files that were at the path of a local database

    def _nothing_sent(self) -> Sent:
        return Sent(hide_passwords(self.uri), self.record.get("key"), self.experiment_name)

    def load(self) -> None:
        """Read run.json and tracking.json.

        Raises:
            UserError: There is no valid run.json.
        """
        record = self.folder.read_record()
        if record is None:
            raise UserError(
                f"{self.folder.run_file}: missing or damaged; run the command of this run again, "
                "which makes it again"
            )
        self.record = record
        blank = self._nothing_sent()
        stored = Sent.read(self.folder) or blank
        # Otherwise tracking.json is about another server, or about another run of this name.
        is_same = (stored.uri, stored.key) == (blank.uri, blank.key)
        self.sent = stored if is_same else blank

    def save(self) -> None:
        """Write tracking.json.

        Raises:
            GivenUpError: The driver no longer waits, so another process may send this folder now.
        """
        if self.given_up.is_set():
            raise GivenUpError
        self.sent.write(self.folder)

    @functools.cached_property
    def client(self) -> "MlflowClient":
        """MLflow's client. Created on first use, because importing mlflow takes a second."""
        from mlflow import MlflowClient

        database = server.local_path(self.uri)
        if database is None:
            return MlflowClient(tracking_uri=self.uri)
        try:
            database.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RefusedError(f"{database.parent} cannot be created: {error.strerror}") from None
        if database.is_dir():
            raise RefusedError(f"{database} is a folder")
        # MLflow keeps the connections to a database by its URI, and each `/.` makes another one.
        replaced = len(_databases.get(database, [])) - 1
        prefix = "sqlite:///"
        return MlflowClient(tracking_uri=self.uri.replace(prefix, prefix + "/." * replaced, 1))

    def notice_replaced_store(self) -> None:
        """Connect again if the file of a local database was removed or replaced.

        An open connection would still write to the old file, which has no name any more.
        """
        database = server.local_path(self.uri)
        if database is None:
            return
        seen = _databases.setdefault(database, [])
        identity = None
        with contextlib.suppress(OSError):
            stat = database.stat()
            identity = (stat.st_dev, stat.st_ino)
        if seen and seen[-1] is None:
            seen[-1] = identity  # it was created meanwhile
        elif not seen or seen[-1] != identity:
            seen.append(identity)
        if self._connected_to not in (0, len(seen)):
            self.__dict__.pop("client", None)
            self.run = None
            self.doubted = True
        self._connected_to = len(seen)

    def attach(self) -> None:
        """Find the run by its id or by its key, or create it."""
        before = self.sent.run_id
        run = self._find_by_id() or self._find_by_key() or self._create()
        self.sent.run_id = run.info.run_id
        self.sent.experiment_id = run.info.experiment_id
        self.save()
        self.run = run
        if before is not None and before != run.info.run_id:
            self.note_new_run(before)

    def note_new_run(self, before: str) -> None:
        """Report that the run `before` was lost. Write the id of the new one into run.json."""
        log.warning(
            "tracking: MLflow no longer has the run %s of %s; everything is sent to a new one, %s",
            before,
            self.folder.path,
            self.sent.run_id,
        )
        record = self.folder.read_record()
        if record is not None and record.get("attempts"):
            record["attempts"][-1]["mlflow_run_id"] = self.sent.run_id
            files.write_json(self.folder.run_file, record)

    def fetch(self) -> "Run":
        """Return the run as MLflow has it now.

        Raises:
            MlflowException: With code `LOST`: MLflow has no such run, or a user deleted it.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.protos import databricks_pb2

        run = self.client.get_run(self.sent.run_id)
        server.check_complete(run.info.run_id)
        if run.info.lifecycle_stage == "deleted":
            message = f"the run {run.info.run_id} was deleted in MLflow"
            raise MlflowException(message, databricks_pb2.RESOURCE_DOES_NOT_EXIST)
        return run

    def _find_by_id(self) -> "Run | None":
        if self.sent.run_id is None:
            return None
        try:
            return self.fetch()
        except Exception as error:
            if getattr(error, "error_code", "") != LOST:
                raise
            # The server has lost its data, or a user deleted the run: send everything again.
            self.sent = self._nothing_sent()
            return None

    def _find_by_key(self) -> "Run | None":
        """Find a run whose creator was killed before it could store the id."""
        experiment = self.client.get_experiment_by_name(self.experiment_name)
        if experiment is None:
            self.sent.experiment_id = self._create_experiment()
            return None
        server.check_complete(experiment.experiment_id)
        self.sent.experiment_id = experiment.experiment_id
        query = f"tags.`{KEY_TAG}` = '{self.record['key']}'"
        return server.search_one(self.client.search_runs, [experiment.experiment_id], query)

    def _create_experiment(self) -> str:
        artifacts = None
        database = server.local_path(self.uri)
        if database is not None:
            artifacts = (database.parent / "artifacts").as_uri()
        try:
            experiment_id = self.client.create_experiment(self.experiment_name, artifacts)
        except Exception as error:
            if getattr(error, "error_code", "") != TAKEN:
                raise
            # Another run has created it meanwhile.
            experiment_id = self.client.get_experiment_by_name(self.experiment_name).experiment_id
        server.check_complete(experiment_id)
        return experiment_id

    def _create(self) -> "Run":
        started_ms = contents.started_ms(self.record)
        tags = {KEY_TAG: self.record["key"], **self.first_tags}
        name = self.record.get("name")
        run = self.client.create_run(self.sent.experiment_id, started_ms, tags, name)
        server.check_complete(run.info.run_id)
        return run
