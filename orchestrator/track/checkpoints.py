"""Registers checkpoints as logged models of MLflow: only their paths, no tensors."""

import re
import tempfile
from pathlib import Path

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.track import contents, server
from orchestrator.track.mlflow_run import MlflowRun
from orchestrator.track.outbox import SentCheckpoint


def send(tracked: MlflowRun) -> None:
    """Register new checkpoints, and mark removed checkpoints."""
    sent = tracked.sent
    digests = contents.checkpoints(tracked.folder)
    for name, digest in digests.items():
        if name not in sent.checkpoints:
            model_id = _register(tracked, name, digest)
            sent.checkpoints[name] = SentCheckpoint(model_id, digest)
            tracked.save()
        elif sent.checkpoints[name].sha256 != digest:
            # A resumed run has repeated the step.
            tags = _reference(tracked, name, digest) | {"checkpoint.removed": "false"}
            _update(tracked, name, digest, tags)
    for name, known in sent.checkpoints.items():
        if name not in digests and known.sha256 is not None:
            _update(tracked, name, None, {"checkpoint.removed": "true"})


def _update(tracked: MlflowRun, name: str, digest: str | None, tags: dict[str, str]) -> None:
    known = tracked.sent.checkpoints[name]
    tracked.client.set_logged_model_tags(known.model_id, tags)
    known.sha256 = digest
    tracked.save()


def _reference(tracked: MlflowRun, name: str, digest: str) -> dict[str, str]:
    """Return tags with the path and hash of the checkpoint."""
    # In the folder of a trial, `checkpoints` is a symlink to those of a stage.
    path = (tracked.folder.checkpoints / name).resolve()
    return {"checkpoint.sha256": digest, "checkpoint.uri": str(path)}


def _register(tracked: MlflowRun, name: str, digest: str) -> str:
    """Find or create the logged model of a checkpoint. Return its id.

    Does what `mlflow.create_external_model` does, but with the client of `tracked`.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models.utils import get_external_mlflow_model_spec

    client = tracked.client
    run_id = tracked.sent.run_id
    experiment_id = tracked.sent.experiment_id
    step = checkpoint_format.step_of(Path(name))
    title = re.sub(r"""[/:.%"']""", "-", f"{tracked.record.get('name', 'run')}-{name}")
    query = f"source_run_id = '{run_id}' AND name = '{title}'"
    model = server.search_one(client.search_logged_models, [experiment_id], query)
    if model is None:
        tags = {"mlflow.model.isExternal": "true", **_reference(tracked, name, digest)}
        model = client.create_logged_model(
            experiment_id, title, run_id, tags, {"step": str(step)}, "checkpoint"
        )
    server.check_complete(model.model_id)
    with tempfile.TemporaryDirectory() as folder:
        # MLflow registers only models that have this file.
        get_external_mlflow_model_spec(model).save(Path(folder) / "MLmodel")
        client.log_model_artifacts(model.model_id, folder)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    outputs = tracked.fetch().outputs.model_outputs
    if model.model_id not in [output.model_id for output in outputs]:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    return model.model_id
