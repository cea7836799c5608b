"""Shows a sweep in MLflow: one parent run, and a child run for each trial.

The checkpoint of the best trial is in the model registry. A trial needs no request if its folder
has not changed since it was sent, also after a restart.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UserError
from orchestrator.own_code import is_own
from orchestrator.own_files import copy_name
from orchestrator.redact import redact_text
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.track import contents, outbox, server
from orchestrator.track.mlflow import Projection, Status, refusals
from orchestrator.track.outbox import Row, Sent, file_mark
from orchestrator.track.sender import RefusedError

if TYPE_CHECKING:
    from mlflow.entities import Run

ALIAS = "best"  # of the best trial's checkpoint in the model registry
VERSIONS_TAG = "mlflow.modelVersions"  # lists the versions that a logged model's page shows
log = logging.getLogger(__name__)


class SweepProjection(Projection):
    """Sends the folder of a sweep to its MLflow run, and each trial to a child run."""

    folder: SweepFolder

    def load(self) -> None:
        """Read run.json and tracking.json."""
        super().load()
        # State of each trial when it was sent or rejected, by name.
        self._seen: dict[str, tuple[str, Status | None]] = {}
        # Runs of the trials as MLflow had them at the last check, by id.
        self.children: dict[str, Run] = {}
        self.unchecked: set[str] = set()  # trials that were not sent since that check
        self.doubts_trials = False
        self._rejected: set[str] = set()

    @property
    def url(self) -> str | None:
        """Page with the ranked trials and their curves; None until MLflow has its view."""
        sent = self.sent
        if sent.experiment_id is None or sent.run_id is None or sent.view is None:
            return None
        return server.sweep_url(self.uri, sent.experiment_id, sent.run_id)

    def send(self, status: Status | None) -> None:
        """Send everything that MLflow does not have; see `Projection.send`.

        Raises:
            RefusedError: The sweep has ended and MLflow has rejected a trial; the rest was sent.
        """
        super().send(status)
        self._send_view()
        # A trial without a summary is running if its sweep is running.
        unfinished: Status | None = status if status in (None, "RUNNING") else "KILLED"
        for trial in self.folder.trials():
            if trial.run_file.exists():
                self._send_trial(trial, unfinished)
        self._register_best()
        if self._rejected and status != "RUNNING":
            raise RefusedError(f"trials {', '.join(sorted(self._rejected))}")

    def _documents(self) -> list[Path]:
        folder = self.folder
        texts = [folder.sweep_file, folder.plan_file, folder.comparison_file]
        return super()._documents() + texts + folder.figure_files()

    def _send_view(self) -> None:
        assert self.sent.run_id is not None
        tag, view = server.sweep_view(self.sent.run_id)
        if self.sent.view != view:
            self.client.set_experiment_tag(self.sent.experiment_id, tag, view)
            self.sent.view = view
            self.save()

    def check_store(self) -> None:
        """Check the sweep's own values, and read what MLflow has of the trials."""
        self.doubts_trials = self.doubted
        lost = self.sent
        super().check_store()
        self.doubts_trials |= self.sent is not lost  # values of the sweep were lost
        self._seen = {}
        self.unchecked = {trial.name for trial in self.folder.trials()}
        self.children = {run.info.run_id: run for run in self._fetch_children()}

    def _fetch_children(self) -> "Iterator[Run]":
        query = f"tags.`{server.PARENT_TAG}` = '{self.sent.run_id}'"
        token: str | None = None
        while True:
            page = self.client.search_runs([self.sent.experiment_id], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _send_trial(self, folder: RunFolder, unfinished: Status | None) -> None:
        """Send a trial if it has changed. If MLflow rejects it, log this once.

        Args:
            folder: Folder of the trial.
            unfinished: Status of a trial without a summary; None leaves it as it is.
        """
        name = folder.name
        state = (_file_state(folder), unfinished)
        if self._seen.get(name) == state:
            return
        try:
            with refusals(self.uri):
                # A new object each time: otherwise hundreds of trials keep hundreds of files open.
                TrialProjection(folder, self, state[0]).send(unfinished)
            self._rejected.discard(name)
            self.unchecked.discard(name)
        except (RefusedError, UserError) as error:
            if name not in self._rejected:
                message = redact_text(str(error))
                log.warning("trial %s: rejected by MLflow, the others go on: %s", name, message)
            self._rejected.add(name)
        self._seen[name] = state

    # ---- best checkpoint ----

    def _register_best(self) -> None:
        """Point the alias in the model registry to the last checkpoint of the best trial."""
        best_trial = (self.folder.read_summary() or {}).get("best_trial")
        if best_trial is None:
            return
        trial = Sent.read(self.folder.trial(best_trial))
        if trial is None or trial.uri != self.sent.uri:
            return  # MLflow has rejected the trial
        existing = [name for name, known in trial.checkpoints.items() if known.sha256 is not None]
        if not existing:
            return
        model_id = trial.checkpoints[max(existing)].model_id
        if self.sent.best != model_id:
            model_name = re.sub(r"[/:]", "-", self.record.get("name", self.folder.name))
            version = self._version(model_name, model_id, best_trial)
            self.client.set_registered_model_alias(model_name, ALIAS, version)
            self.sent.best = model_id
            self.save()

    def _version(self, model_name: str, model_id: str, trial: str) -> str:
        """Return the version of a checkpoint in the model registry; create it if necessary."""
        self._create_registered_model(model_name)
        query = f"name = '{model_name}' AND tags.`model_id` = '{model_id}'"
        known = server.search_one(self.client.search_model_versions, query)
        if known is not None:
            return known.version

        model = self.client.get_logged_model(model_id)
        server.check_complete(model.model_id)
        tags = {
            "model_id": model_id,
            "trial": trial,
            "checkpoint.uri": model.tags["checkpoint.uri"],
        }
        # The location of the artifacts, not `models:/<id>`: MLflow would look up the id in the
        # default store of this process, which may be another one.
        created = self.client.create_model_version(
            model_name,
            model.artifact_location,
            model.source_run_id,
            tags,
            model_id=model_id,
            await_creation_for=0,
        )
        server.check_complete(created.version)
        versions = json.loads(model.tags.get(VERSIONS_TAG, "[]"))
        versions.append({"name": model_name, "version": created.version})
        self.client.set_logged_model_tags(model_id, {VERSIONS_TAG: json.dumps(versions)})
        return created.version

    def _create_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


class TrialProjection(Projection):
    """Sends the folder of a trial to its MLflow run.

    Args:
        folder: Folder of the trial.
        sweep: Its sweep, which has an MLflow run.
        state: State of the trial's files; see `_file_state`.
    """

    def __init__(self, folder: RunFolder, sweep: SweepProjection, state: str) -> None:
        super().__init__(folder, sweep.uri, sweep.experiment_name, sweep.given_up)
        assert sweep.sent.run_id is not None
        self.client = sweep.client
        self.first_tags = {server.PARENT_TAG: sweep.sent.run_id}
        self._sweep = sweep
        self._state = state
        self._recorded_status = contents.recorded_status(folder)
        self.load()
        self.doubted = folder.name in sweep.unchecked and self._is_behind()

    def _is_behind(self) -> bool:
        """Return whether MLflow may lack values that it had accepted before the last check."""
        if self.sent.run_id is None:
            return False
        known = self._sweep.children.get(self.sent.run_id)
        if known is None or self._sweep.doubts_trials:
            return True
        accepted = outbox.accepted_rows(self.folder, self.sent)
        return not {row.key: row.value for row in accepted}.items() <= known.data.metrics.items()

    def lacks_values(self, accepted: list[Row]) -> bool:
        """Return False: the sweep has asked for all trials at once."""
        return False

    def note_new_run(self, before: str) -> None:
        """Report it. The sweep writes run.json of its trials."""
        log.warning(
            "tracking: MLflow no longer has the trial %s; it is sent again", self.folder.name
        )

    def send(self, status: Status | None) -> None:
        """Send everything that MLflow does not have, if the trial has changed since it was sent.

        Args:
            status: Status of the MLflow run if the trial has no summary.
        """
        status = self._recorded_status or status
        # The state was read before sending, so a file that changes now gives another mark.
        mark = f"{self.first_tags[server.PARENT_TAG]} {status} {self._state}"
        if self.doubted or self.sent.mark != mark:
            super().send(status)
            self.sent.mark = mark
            self.save()

    def _has_own_checkpoints(self) -> bool:
        # While a trial runs, its checkpoints are those of a stage that other trials share.
        return self._recorded_status is not None

    def _documents(self) -> list[Path]:
        """Its own, and its copies of the user's files, which are in the folder of the sweep."""
        kinds = [str(value) for value in self.record.get("params", {}).values()]
        names = [copy_name(kind) for kind in kinds if is_own(kind)]
        copies = self._sweep.folder.code_files()
        return super()._documents() + [copy for copy in copies if copy.name in names]

    def _samples(self) -> list[Path]:
        """Only the last one, because there are many trials."""
        return super()._samples()[-1:]


def _file_state(folder: RunFolder) -> str:
    """Return a text that changes if something in the folder of a trial changes."""
    watched = [
        folder.run_file,
        folder.journal_file,
        folder.summary_file,
        folder.checkpoints,
        folder.samples,
        folder.replays,
    ]
    marks = [(path.name, file_mark(path)) for path in watched]
    return " ".join(f"{name} {mark}" for name, mark in marks if mark is not None)
