"""Tracking stores: which MLflow a run is sent to, and at which address a browser finds it. Needs no mlflow."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from orchestrator.errors import UserError
from orchestrator.provenance import redact_text

UI_PORT = 5000


def store_path(storage: Path) -> Path:
    """The embedded store's database; its artifacts lie beside it."""
    return Path(storage).absolute() / "mlflow" / "mlflow.db"


def resolve_uri(experiment, storage: Path) -> str:
    """The absolute tracking URI: `tracking.uri`, else $MLFLOW_TRACKING_URI, else the embedded store of `storage`.

    Raises:
        UserError: the variable holds something that MLflow 3 does not serve.
    """
    uri = experiment.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{store_path(storage)}"
    if not re.match(r"^(https?|sqlite|postgresql|mysql)[+a-z0-9]*://.", uri):
        raise UserError(f"MLFLOW_TRACKING_URI: '{redact_text(uri)}' is none of http(s)://…, sqlite:///…, postgresql://…")
    local = local_path(uri)
    return f"sqlite:///{local}" if local else uri.rstrip("/")


def local_path(uri: str) -> Path | None:
    """The absolute database file of a sqlite URI: MLflow resolves a relative one in each process anew."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The page with the run's curves. An embedded store's page exists while `make ui` serves it."""
    base = f"http://127.0.0.1:{UI_PORT}"
    if uri.startswith("http"):
        parts = urlsplit(uri)
        base = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}/model-metrics?workflowType=machine_learning"
