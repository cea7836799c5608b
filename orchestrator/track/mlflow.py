"""Tracking: the projection of a run's folder into MLflow. With sweep_tracking, the only user of mlflow.

Eats what driver and rank 0 leave in the folder (run.json, journal, samples/, checkpoints/, summary.json); yields one
MLflow run that shows it. The folder is the truth and MLflow its image: every request may be made twice and says the
same, so a crash, a dead server or a second sender costs time, never a point. `tracking.json` remembers how far it got.

A `Tracker` does this in a thread beside the driver and never raises; `resend_metrics` does it later. Importing
mlflow costs a second, so it happens in the thread; a driver has made its own heavy imports before it starts one.
"""

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.redact import redact_text
from orchestrator.runs import lock, signals
from orchestrator.runs.folder import RunFolder
from orchestrator.track import attachments, outbox
from orchestrator.track.sender import Ending, GivenUpError, RefusedError, Sender
from orchestrator.track.server import first, local_path, quieten, run_url, whole

STATE = "tracking.json"
KEY_TAG = "espalier.run_key"
PASSING = (
    "BAD_REQUEST",
    "ENDPOINT_NOT_FOUND",
)  # a server out of connections says so; a proxy whose server is starting


class Tracker:
    """Keeps MLflow's image of a run up to date from a thread: no method raises or waits for a server, but `finish`."""

    _page = staticmethod(run_url)

    def __init__(self, run_dir: Path, uri: str, experiment_name: str):
        self._sender = Sender(self._attempt, f"tracking to {redact_text(uri)}")
        self._projection = self._image(Path(run_dir), uri, experiment_name, self._sender.given_up)
        self._reopen = True

    def _image(self, *where: Any) -> "Projection":
        return Projection(*where)

    def start(self) -> None:
        """Begin to follow the folder, in which run.json already stands; returns at once."""
        self._sender.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has told it."""
        return self._projection.state["run_id"]

    @property
    def url(self) -> str | None:
        """The page of its curves; None while the run has no id."""
        state = self._projection.state
        return (
            self._page(self._projection.uri, state["experiment_id"], state["run_id"])
            if state["run_id"]
            else None
        )

    def finish(self, status: str | None, deadline_s: float = 60) -> bool:
        """Send the rest and set the status; False if not all was accepted within `deadline_s` s. The caller says so.

        Args:
            status: FINISHED, FAILED or KILLED; None leaves it as it is.
        """
        assert status is None or status in outbox.STATUSES, status
        return self._sender.finish(Ending(status), deadline_s)

    def _attempt(self, ending: Ending | None) -> None:
        quieten()
        # MLflow has no "create if missing": of two who look, find nothing and create, each would make a run of its own.
        with lock.held(RunFolder(self._projection.run_dir).sender_lock), refusals():
            self._projection.send(self._reopen, ending)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Tell a server that says no (`RefusedError`) from one that could not be asked."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if 400 <= error.get_http_status_code() < 408 and error.error_code not in PASSING:
            raise RefusedError(str(error)) from error
        raise


def resend_metrics(
    run_dir: Path,
    uri: str,
    experiment_name: str,
    deadline_s: float = 60,
    kind: type[Tracker] = Tracker,
) -> bool:
    """Send what a run's folder holds and MLflow does not; True if all was accepted. The status is summary.json's.

    Ctrl-C ends the wait and nothing else.
    """
    tracker = kind(run_dir, uri, experiment_name)
    tracker._reopen = False
    tracker.start()
    try:
        return tracker.finish(outbox.status(Path(run_dir)), deadline_s)
    except KeyboardInterrupt:
        if signals.was_terminated():
            raise
        return False


class Projection:
    """One run's folder and its image. Every method sends what is missing, and remembers what was accepted."""

    def __init__(self, run_dir: Path, uri: str, experiment_name: str, given_up: threading.Event):
        self.tags: dict[str, str] = {}  # that the run has from its first moment, besides its key
        self.run_dir, self.uri, self.experiment_name, self.given_up = (
            run_dir,
            uri,
            experiment_name,
            given_up,
        )
        self.lines, self.client, self.run, self.told = outbox.MetricQueue(run_dir), None, None, None
        self.facts, self.state = (
            outbox.read_json(run_dir / "run.json"),
            outbox.read_json(run_dir / STATE),
        )
        if (self.state.get("uri"), self.state.get("key")) != (
            redact_text(uri),
            self.facts.get("key"),
        ):
            self.state = {}  # another server, or another run under the same name
        self.state = self._blank() | self.state

    def _blank(self) -> dict[str, Any]:
        return outbox.blank_state(
            redact_text(self.uri), self.facts.get("key"), self.experiment_name
        )

    def save(self) -> None:
        if self.given_up.is_set():
            raise GivenUpError
        outbox.write_state(self.run_dir / STATE, self.state)

    def send(self, reopen: bool, ending: Ending | None) -> None:
        """Everything that is missing; curve and status first, for they are what people look at."""
        if self.run is None:
            self.attach(reopen)
        self.send_metrics()
        self.send_facts()
        if ending and ending.status:
            self.client.set_terminated(
                self.state["run_id"], ending.status, outbox.ended_ms(self.run_dir)
            )
        self.send_checkpoints()
        attachments.send_samples(self, outbox.samples(self.run_dir))
        attachments.send_events(self)
        attachments.send_replays(self)
        if ending:
            self.send_documents()

    def send_documents(self) -> None:
        attachments.send_documents(self)

    # ---- the run ----
    def attach(self, reopen: bool) -> None:
        """Find the run, by its id or its key, or create it; make it RUNNING again if `reopen`."""
        from mlflow import MlflowClient

        self.facts = outbox.read_json(self.run_dir / "run.json")
        if not self.facts.get("key"):
            raise FileNotFoundError(f"{self.run_dir / 'run.json'}: missing; it names the run")
        if local := local_path(self.uri):
            local.parent.mkdir(parents=True, exist_ok=True)
        self.client = self.client or MlflowClient(tracking_uri=self.uri)
        run = self._known_run() or self._found_run() or self._created_run()
        if run.info.lifecycle_stage == "deleted":
            raise RefusedError(
                f"the run was deleted in MLflow: restore it there, or remove {self.run_dir / STATE} to "
                f"send it as a new one"
            )
        self.state |= {"run_id": run.info.run_id, "experiment_id": run.info.experiment_id}
        self.save()
        if reopen and run.info.status != "RUNNING":
            self.client.update_run(run.info.run_id, status="RUNNING")
        self.run = run

    def _known_run(self):
        if not self.state["run_id"]:
            return None
        try:
            return self._get_run()
        except Exception as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            self.state = self._blank()  # the store was emptied: what it had is sent anew
            return None

    def _get_run(self):
        run = self.client.get_run(self.state["run_id"])
        return whole(run, run.info.run_id)

    def _found_run(self):
        """The run of an attempt that ended between creating it and remembering it."""
        experiment = self.client.get_experiment_by_name(self.experiment_name)
        if experiment is None:
            local = local_path(self.uri)
            location = (local.parent / "artifacts").as_uri() if local else None
            made = self.client.create_experiment(self.experiment_name, location)
            self.state["experiment_id"] = whole(made, made)
            return None
        if experiment.lifecycle_stage == "deleted":
            raise RefusedError(
                f"the experiment '{self.experiment_name}' was deleted in MLflow: restore it there, "
                f"or set tracking.experiment"
            )
        self.state["experiment_id"] = whole(experiment.experiment_id, experiment.experiment_id)
        query = f"tags.`{KEY_TAG}` = '{self.facts['key']}'"
        return first(self.client.search_runs, [experiment.experiment_id], query)

    def _created_run(self):
        started, tags = (
            outbox.started_ms(self.run_dir, self.facts),
            {KEY_TAG: self.facts["key"], **self.tags},
        )
        run = self.client.create_run(
            self.state["experiment_id"], started, tags, self.facts.get("name")
        )
        return whole(run, run.info.run_id)

    # ---- its curve ----
    def send_metrics(self) -> None:
        from mlflow.entities import Metric

        self.lines.refresh(self.state)
        for mark, rows in self.lines.batches():
            if rows:
                self.client.log_batch(self.state["run_id"], metrics=[Metric(*row) for row in rows])
            self.state |= mark
            if (
                "asides" in mark
            ):  # a resume went back: losses that a checkpoint's step lacked may come
                for name, known in self.state["checkpoints"].items():
                    known["measured"] &= outbox.step_of(name) <= self.state["sent_step"]
            self.save()

    # ---- its facts ----
    def send_facts(self) -> None:
        """Parameters, tags and the dataset, where run.json is not what it was."""
        from mlflow.entities import Param, RunTag

        facts, data = outbox.read_json(self.run_dir / "run.json") or self.facts, self.run.data
        if facts == self.told:
            return
        params = outbox.wanted_params(facts)
        tags = outbox.wanted_tags(facts, params, data.params) | self.tags
        tags = {k: v for k, v in tags.items() if data.tags.get(k) != v}
        params = {k: v for k, v in params.items() if k not in data.params}
        if params or tags:
            self.client.log_batch(
                self.state["run_id"],
                params=[Param(*p) for p in params.items()],
                tags=[RunTag(*t) for t in tags.items()],
            )
        self._send_dataset(outbox.dataset(facts))
        data.params.update(params)
        data.tags.update(tags)
        self.told = facts

    def _send_dataset(self, words: dict[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        known = [(d.dataset.name, d.dataset.digest) for d in self.run.inputs.dataset_inputs]
        if words and (words["name"], words["digest"]) not in known:
            entry = DatasetInput(Dataset(**words), [InputTag("mlflow.data.context", "train")])
            self.client.log_inputs(self.state["run_id"], [entry])

    # ---- its checkpoints ----
    def send_checkpoints(self) -> None:
        """Register new checkpoints by reference (nothing is copied), with their losses once these are sent."""
        found, known = outbox.checkpoints(self.run_dir), self.state["checkpoints"]
        for name, digest in found.items():
            if name not in known:
                known[name] = {
                    "model_id": self._model(name, digest),
                    "sha256": digest,
                    "measured": False,
                }
                self.save()
            elif known[name]["sha256"] != digest:  # made again after a resume
                self._mark(
                    name, digest, self._whereabouts(name, digest) | {"checkpoint.removed": "false"}
                )
            if not known[name]["measured"] and self.state["sent_step"] >= outbox.step_of(name):
                self._measure(name)
        for name in known:
            if name not in found and known[name]["sha256"]:
                self._mark(name, None, {"checkpoint.removed": "true"})

    def _mark(self, name: str, digest: str | None, tags: dict[str, str]) -> None:
        known = self.state["checkpoints"][name]
        self.client.set_logged_model_tags(known["model_id"], tags)
        known["sha256"] = digest
        self.save()

    def _whereabouts(self, name: str, digest: str) -> dict[str, str]:
        path = (
            self.run_dir / "checkpoints" / name
        ).resolve()  # a trial's folder is a link to a stage's
        return {"checkpoint.sha256": digest, "checkpoint.uri": str(path)}

    def _model(self, name: str, digest: str) -> str:
        """The id of MLflow's external model for one checkpoint: what `create_external_model` does, with our client."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.models.utils import get_external_mlflow_model_spec

        run_id, experiment_id = self.state["run_id"], self.state["experiment_id"]
        title = re.sub(r"""[/:.%"']""", "-", f"{self.facts.get('name', 'run')}-{name}")
        query = f"source_run_id = '{run_id}' AND name = '{title}'"
        tags = {"mlflow.model.isExternal": "true", **self._whereabouts(name, digest)}
        model = first(
            self.client.search_logged_models, [experiment_id], query
        ) or self.client.create_logged_model(
            experiment_id, title, run_id, tags, {"step": str(outbox.step_of(name))}, "checkpoint"
        )
        whole(model, model.model_id)
        with tempfile.TemporaryDirectory() as folder:
            get_external_mlflow_model_spec(model).save(
                os.path.join(folder, "MLmodel")
            )  # makes it registrable
            self.client.log_model_artifacts(model.model_id, folder)
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        if model.model_id not in [o.model_id for o in self._get_run().outputs.model_outputs]:
            self.client.log_outputs(
                run_id, [LoggedModelOutput(model.model_id, outbox.step_of(name))]
            )
        return model.model_id

    def _measure(self, name: str) -> None:
        """The losses of its step: searched by them, checkpoints can be ranked."""
        from mlflow.entities import Metric

        known, run_id = self.state["checkpoints"][name], self.state["run_id"]
        if rows := outbox.losses(self.run_dir, outbox.step_of(name)):
            data = outbox.dataset(self.facts)
            links = {
                "dataset_name": data.get("name"),
                "dataset_digest": data.get("digest"),
                "model_id": known["model_id"],
                "run_id": run_id,
            }
            self.client.log_batch(run_id, metrics=[Metric(*row, **links) for row in rows])
        known["measured"] = True
        self.save()
