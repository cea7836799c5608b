"""Tracking: the projection of a run's folder into MLflow. The only user of mlflow.

Eats what driver and rank 0 leave in the folder (run.json, journal, samples/, checkpoints/, summary.json); yields one
MLflow run that shows it. The folder is the truth and MLflow its image: every request may be made twice and says the
same, so a crash, a dead server or a second sender costs time, never a point. `tracking.json` remembers how far it got.

A `Tracker` does this in a thread beside the driver and never raises; `replay` does it later, without one. Importing
mlflow costs a second, so it happens in the thread; a driver has made its own heavy imports before it starts one.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator import figures, journal
from orchestrator.outbox import Outbox, history, rows_of
from orchestrator.provenance import redact, redact_text
from orchestrator.sender import Ending, GivenUpError, RefusedError, Sender
from orchestrator.stores import local_path, resolve_uri, run_url  # noqa: F401 - resolve_uri is for our callers

STATE = "tracking.json"
KEY_TAG = "espalier.run_key"
STATUSES = ("FINISHED", "FAILED", "KILLED")
PASSING = ("BAD_REQUEST", "ENDPOINT_NOT_FOUND")  # a server out of connections says so; a proxy whose server is starting
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # to try again is the sender's business
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # the sender says once what MLflow repeats with tracebacks
}


class Tracker:
    """Keeps MLflow's image of a run up to date from a thread: no method raises or waits for a server, but `finish`."""

    def __init__(self, run_dir: Path, uri: str, experiment_name: str):
        self._sender = Sender(self._attempt, f"tracking to {redact_text(uri)}")
        self._projection = _Projection(Path(run_dir), uri, experiment_name, self._sender.given_up)
        self._reopen = True

    def start(self) -> None:
        """Begin to follow the folder, in which run.json already stands; returns at once."""
        self._sender.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None until the server has told it."""
        return self._projection.state["run_id"]

    @property
    def url(self) -> str | None:
        """The page of the run's curves; None while the run has no id."""
        state = self._projection.state
        return run_url(self._projection.uri, state["experiment_id"], state["run_id"]) if state["run_id"] else None

    def finish(self, status: str | None, deadline_s: float = 60) -> bool:
        """Send the rest and set the status; False if not all was accepted within `deadline_s` s. The caller says so.

        Args:
            status: FINISHED, FAILED or KILLED; None leaves it as it is.
        """
        assert status is None or status in STATUSES, status
        return self._sender.finish(Ending(status), deadline_s)

    def _attempt(self, ending: Ending | None) -> None:
        _quieten()
        from mlflow.exceptions import MlflowException

        try:
            self._projection.send(self._reopen, ending)
        except MlflowException as error:
            if 400 <= error.get_http_status_code() < 408 and error.error_code not in PASSING:
                raise RefusedError(str(error)) from error
            raise


def replay(run_dir: Path, uri: str, experiment_name: str, deadline_s: float = 60) -> bool:
    """Send what a run's folder holds and MLflow does not; True if all was accepted. The status is summary.json's."""
    tracker = Tracker(run_dir, uri, experiment_name)
    tracker._reopen = False
    tracker.start()
    status = str(_read(Path(run_dir) / "summary.json").get("status")).upper()
    return tracker.finish(status if status in STATUSES else None, deadline_s)


def _quieten() -> None:
    """Set MLflow's own knobs, in this process and before it is imported; what the user set stays."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)


class _Projection:
    """One run's folder and its image. Every method sends what is missing, and remembers what was accepted."""

    def __init__(self, run_dir: Path, uri: str, experiment_name: str, given_up: threading.Event):
        self.run_dir, self.uri, self.experiment_name, self.given_up = run_dir, uri, experiment_name, given_up
        self.outbox, self.client, self.run = Outbox(run_dir), None, None
        self.facts, self.state = _read(run_dir / "run.json"), _read(run_dir / STATE)
        if (self.state.get("uri"), self.state.get("key")) != (redact_text(uri), self.facts.get("key")):
            self.state = self._blank()  # another server, or another run under the same name

    def _blank(self) -> dict[str, Any]:
        return {"uri": redact_text(self.uri), "key": self.facts.get("key"), "run_id": None, "experiment_id": None,
                "experiment": self.experiment_name, "sent_step": -1, "checkpoints": {}, "samples": {}}

    def save(self) -> None:
        """Replace tracking.json. Not synced: if power fails, the same is sent again, which changes nothing."""
        if self.given_up.is_set():
            raise GivenUpError
        temporary = self.run_dir / f".{STATE}.{os.getpid()}"
        temporary.write_text(json.dumps(self.state, indent=1), "utf-8")
        os.replace(temporary, self.run_dir / STATE)

    def send(self, reopen: bool, ending: Ending | None) -> None:
        """Everything that is missing; curve and status first, for they are what people look at."""
        if self.run is None:
            self.attach(reopen)
        self.send_facts()
        self.send_metrics()
        if ending and ending.status:
            self.client.set_terminated(self.state["run_id"], ending.status, self._ended())
        self.send_checkpoints(ended=ending is not None)
        self.send_samples()
        if ending:
            self.send_documents()

    # ---- the run ----
    def attach(self, reopen: bool) -> None:
        """Find the run, by its id or its key, or create it; make it RUNNING again if `reopen`."""
        from mlflow import MlflowClient

        self.facts = _read(self.run_dir / "run.json")
        if not self.facts.get("key"):
            raise FileNotFoundError(f"{self.run_dir / 'run.json'}: missing; it names the run")
        if local := local_path(self.uri):
            local.parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=self.uri)
        run = self._known_run() or self._found_run() or self._created_run()
        if run.info.lifecycle_stage == "deleted":
            raise RefusedError(f"the run was deleted in MLflow: restore it there, or remove {self.run_dir / STATE} to "
                               f"send it as a new one")
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
        return _whole(run, run.info.run_id)

    def _found_run(self):
        """The run of an attempt that ended between creating it and remembering it."""
        experiment = self.client.get_experiment_by_name(self.experiment_name)
        if experiment is None:
            local = local_path(self.uri)
            location = (local.parent / "artifacts").as_uri() if local else None
            made = self.client.create_experiment(self.experiment_name, location)
            self.state["experiment_id"] = _whole(made, made)
            return None
        if experiment.lifecycle_stage == "deleted":
            raise RefusedError(f"the experiment '{self.experiment_name}' was deleted in MLflow: restore it there, "
                               f"or set tracking.experiment")
        self.state["experiment_id"] = _whole(experiment.experiment_id, experiment.experiment_id)
        query = f"tags.`{KEY_TAG}` = '{self.facts['key']}'"
        return _first(self.client.search_runs, [experiment.experiment_id], query)

    def _created_run(self):
        run = self.client.create_run(self.state["experiment_id"], self._started(), {KEY_TAG: self.facts["key"]},
                                     self.facts.get("name"))
        return _whole(run, run.info.run_id)

    def _started(self) -> int | None:
        """The run's first moment that anything recorded, in ms: a replay may come days later."""
        started = (self.facts.get("attempts") or [{}])[0].get("started")
        if started:
            return round(datetime.fromisoformat(started).timestamp() * 1000)
        return next((record["timestamp"] for record in journal.read(self.run_dir)), None)

    def _ended(self) -> int | None:
        """When the driver wrote its summary, in ms; None (now) where it did not."""
        try:
            return (self.run_dir / "summary.json").stat().st_mtime_ns // 1_000_000
        except FileNotFoundError:
            return None

    def send_facts(self) -> None:
        """Parameters, tags, the dataset. A parameter is for ever: what a resume changed is a tag of its attempt."""
        from mlflow.entities import Param, RunTag

        facts, data = self.facts | _read(self.run_dir / "run.json"), self.run.data
        attempts, params = facts.get("attempts") or [], redact(facts.get("params") or {})
        params = {k: _text(v)[:6000] for k, v in params.items()}
        tags = redact(facts.get("tags") or {})
        for number, attempt in enumerate(attempts, 1):
            tags |= {f"attempt.{number}.{k}": v for k, v in redact(attempt).items()}
        tags |= {f"attempt.{len(attempts)}.{k}": v for k, v in params.items() if data.params.get(k, v) != v}
        tags = {k: _text(v)[:8000] for k, v in tags.items()}
        params = {k: v for k, v in params.items() if k not in data.params}
        tags = {k: v for k, v in tags.items() if data.tags.get(k) != v}
        if params or tags:
            self.client.log_batch(self.state["run_id"], params=[Param(*p) for p in params.items()],
                                  tags=[RunTag(*t) for t in tags.items()])
            data.params.update(params)
            data.tags.update(tags)
        self._send_dataset(redact(facts.get("dataset") or {}))

    def _send_dataset(self, facts: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        known = [(d.dataset.name, d.dataset.digest) for d in self.run.inputs.dataset_inputs]
        if not facts or (facts["name"], facts["digest"][:36]) in known:
            return
        source = json.dumps({"uri": _text(facts.get("source", ""))})
        profile = {k: v for k, v in facts.items() if k not in ("name", "source")}
        dataset = Dataset(facts["name"], facts["digest"][:36], "local", source, profile=json.dumps(profile))
        entry = DatasetInput(dataset, [InputTag("mlflow.data.context", "train")])
        self.client.log_inputs(self.state["run_id"], [entry])
        self.run.inputs.dataset_inputs.append(entry)

    # ---- its curve ----
    def send_metrics(self) -> None:
        from mlflow.entities import Metric

        self.outbox.refresh(self.state["sent_step"])
        for last_step, rows in self.outbox.batches():
            if rows:
                self.client.log_batch(self.state["run_id"], metrics=[Metric(*row) for row in rows])
            self.state["sent_step"] = last_step
            self.save()

    # ---- its checkpoints ----
    def send_checkpoints(self, ended: bool) -> None:
        """Register new checkpoints by reference (nothing is copied), with their losses once these are sent."""
        folders = {p.parent.name: p for p in sorted((self.run_dir / "checkpoints").glob("step-*/MANIFEST.json"))}
        for name, manifest in folders.items():
            try:
                digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
            except FileNotFoundError:
                continue  # pruned in this moment
            self._register(name, digest)
            self._measure(name, ended)
        for name, known in self.state["checkpoints"].items():
            if name not in folders and known["sha256"]:
                self.client.set_logged_model_tags(known["model_id"], {"checkpoint.removed": "true"})
                known["sha256"] = None
                self.save()

    def _register(self, name: str, digest: str) -> None:
        known = self.state["checkpoints"].get(name)
        if known is None:
            known = self.state["checkpoints"][name] = {"model_id": self._model(name, digest), "sha256": digest,
                                                       "measured": False}
        elif known["sha256"] != digest:  # made again after a resume
            tags = {"checkpoint.sha256": digest, "checkpoint.removed": "false"}
            self.client.set_logged_model_tags(known["model_id"], tags)
            known["sha256"] = digest
        else:
            return
        self.save()

    def _model(self, name: str, digest: str) -> str:
        """The id of MLflow's external model for one checkpoint: what `create_external_model` does, with our client."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus
        from mlflow.models.utils import get_external_mlflow_model_spec

        run_id, experiment_id = self.state["run_id"], self.state["experiment_id"]
        title = re.sub(r"""[/:.%"']""", "-", f"{self.facts.get('name', 'run')}-{name}")
        query = f"source_run_id = '{run_id}' AND name = '{title}'"
        tags = {"mlflow.model.isExternal": "true", "checkpoint.sha256": digest,
                "checkpoint.uri": str(self.run_dir.absolute() / "checkpoints" / name)}
        model = _first(self.client.search_logged_models, [experiment_id], query) or self.client.create_logged_model(
            experiment_id, title, run_id, tags, {"step": str(_step(name))}, "checkpoint")
        _whole(model, model.model_id)
        with tempfile.TemporaryDirectory() as folder:
            get_external_mlflow_model_spec(model).save(os.path.join(folder, "MLmodel"))  # makes it registrable
            self.client.log_model_artifacts(model.model_id, folder)
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        if model.model_id not in [o.model_id for o in self._get_run().outputs.model_outputs]:
            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, _step(name))])
        return model.model_id

    def _measure(self, name: str, ended: bool) -> None:
        """The losses of its step, as the very rows of the curve; searched by them, checkpoints can be ranked."""
        from mlflow.entities import Metric

        known, step = self.state["checkpoints"][name], _step(name)
        if known["measured"] or self.state["sent_step"] < step and not ended:
            return
        rows = [row for record in history(self.run_dir) if record["step"] == step for row in rows_of(record)
                if row[0].startswith("val/") or row[0] == "train/loss"]
        if rows:
            self.client.log_batch(self.state["run_id"], metrics=[
                Metric(*row, model_id=known["model_id"], run_id=self.state["run_id"]) for row in rows])
        known["measured"] = True
        self.save()

    # ---- its files ----
    def send_samples(self) -> None:
        for path in sorted((self.run_dir / "samples").glob("step-*.txt")):
            stat = path.stat()
            mark = f"{stat.st_size} {stat.st_mtime_ns}"
            if self.state["samples"].get(path.name) != mark:
                self.client.log_artifact(self.state["run_id"], str(path), "samples")
                self.state["samples"][path.name] = mark
                self.save()

    def send_documents(self) -> None:
        """The experiment, the summary and the figures; a second time they replace the first."""
        run_id, records = self.state["run_id"], journal.read(self.run_dir)
        for name in ("experiment.yaml", "summary.json"):
            if (self.run_dir / name).exists():
                self.client.log_text(run_id, redact_text((self.run_dir / name).read_text("utf-8")), name)
        if records:
            self.client.log_figure(run_id, figures.loss_curve(records), "figures/loss.png")
            self.client.log_figure(run_id, figures.schedule_curve(figures.points(records, "optim/lr")),
                                   "figures/schedule.png")


def _whole(answer: Any, its_id: str | None) -> Any:
    """`answer`, unless it was cut: MLflow takes an empty body for an empty object."""
    if not its_id:
        raise ConnectionError("the server's answer was cut")
    return answer


def _first(search: Callable, *query: Any) -> Any:
    """The first hit or None. Asked again where nothing was found: an answer that was cut reads like no hit."""
    return next((hits[0] for _ in range(3) if (hits := search(*query))), None)


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _read(path: Path) -> dict[str, Any]:
    """A JSON file's content; nothing where it is missing or torn."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
