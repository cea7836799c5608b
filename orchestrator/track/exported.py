"""Registers an exported model in MLflow: a copy that `mlflow.pyfunc` loads without this project."""

import re
import threading
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.redact import redact_text
from orchestrator.runs import lock
from orchestrator.runs.folder import RunFolder
from orchestrator.track import server
from orchestrator.track.mlflow import refusals
from orchestrator.track.mlflow_run import MlflowRun
from orchestrator.track.sender import DoubtfulError, RefusedError


def register(run: RunFolder, uri: str, experiment_name: str, folder: Path, step: int) -> str:
    """Store an exported model as one of the MLflow run of a run. Return its URI.

    Args:
        run: Folder of the run.
        uri: Tracking URI.
        experiment_name: Name of the MLflow experiment.
        folder: The exported model, which has a file MLmodel.
        step: Number of updates of its weights.

    Raises:
        UserError: The run is not tracked, or the server rejects a request.
    """
    server.set_client_options()
    from mlflow.exceptions import MlflowException

    tracked = MlflowRun(run, uri, experiment_name, threading.Event())
    tracked.load()
    try:
        with lock.held(run.sender_lock), refusals(uri):
            tracked.attach()
            return f"models:/{_create(tracked, folder, step)}"
    except (RefusedError, DoubtfulError, MlflowException) as error:
        reason = " ".join(redact_text(str(error)).split())[:400]
        raise UserError(f"--mlflow: {redact_text(uri)}: {reason}") from None


def _create(tracked: MlflowRun, folder: Path, step: int) -> str:
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    name = re.sub(r"""[/:.%"']""", "-", f"{tracked.record.get('name', 'run')}-step-{step}-export")
    client = tracked.client
    model = client.create_logged_model(
        tracked.sent.experiment_id, name, tracked.sent.run_id, {}, {"step": str(step)}, "export"
    )
    server.check_complete(model.model_id)
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(tracked.sent.run_id, [LoggedModelOutput(model.model_id, step)])
    return model.model_id
