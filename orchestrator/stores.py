"""Tracking stores: which MLflow a run is sent to, and at which address a browser finds it. Needs no mlflow."""

import logging
import os
import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from orchestrator.errors import UserError
from orchestrator.provenance import redact_text

UI_PORT = 5000
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # to try again is the sender's business
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # the sender says once what MLflow repeats with tracebacks
}
_MODE = "workflowType=machine_learning"  # else MLflow opens its GenAI pages, which are empty here


def store_path(storage: Path) -> Path:
    """The embedded store's database; its artifacts lie beside it."""
    return Path(storage).absolute() / "mlflow" / "mlflow.db"


def resolve_uri(experiment, storage: Path) -> str:
    """The absolute tracking URI: `tracking.uri`, else $MLFLOW_TRACKING_URI, else the embedded store of `storage`.

    Raises:
        UserError: the variable holds something that MLflow 3 does not serve.
    """
    if experiment.tracking.uri:
        return absolute_uri(experiment.tracking.uri, "tracking.uri")
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return absolute_uri(uri, "MLFLOW_TRACKING_URI")
    return f"sqlite:///{store_path(storage)}"


def absolute_uri(uri: str, where: str) -> str:
    """`uri`, valid from any directory; `where` opens the message of a `UserError`."""
    if not re.match(r"^(https?|sqlite|postgresql|mysql)[+a-z0-9]*://.", uri):
        raise UserError(f"{where}: '{redact_text(uri)}' is none of http(s)://…, sqlite:///…, postgresql://…")
    local = local_path(uri)
    return f"sqlite:///{local}" if local else uri.rstrip("/")


def local_path(uri: str) -> Path | None:
    """The absolute database file of a sqlite URI: MLflow resolves a relative one in each process anew."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def experiment_url(base: str, experiment_id: str) -> str:
    """The list of an experiment's runs."""
    return f"{base}/#/experiments/{experiment_id}/runs?{_MODE}"


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The page with a run's curves. An embedded store's page exists while `make ui` serves it."""
    base = f"http://127.0.0.1:{UI_PORT}"
    if uri.startswith("http"):
        parts = urlsplit(uri)
        base = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}/model-metrics?{_MODE}"


def quieten() -> None:
    """Set MLflow's own knobs, in this process and before it is imported; what the user set stays."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
