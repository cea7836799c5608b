"""Tracking URI, links to the UI, checks for truncated responses. Imports no mlflow."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from orchestrator.config.checks import is_tracking_uri
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError
from orchestrator.machine import network_file_system
from orchestrator.redact import REDACTED, redact_text

UI_PORT = 5000
PARENT_TAG = "mlflow.parentRunId"  # MLflow's tag that makes a run the child of another
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # `sender.Sender` retries
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # the sender logs each outage once, without a traceback
}
# Without this part of a link, MLflow opens its GenAI pages, which are empty for these runs.
_WORKFLOW = "workflowType=machine_learning"


def store_path(storage: Path) -> Path:
    """Return the database of the embedded store. The artifacts are in the same folder."""
    return Path(storage).absolute() / "mlflow" / "mlflow.db"


def resolve_uri(experiment: Experiment, storage: Path) -> str:
    """Return `tracking.uri`, else $MLFLOW_TRACKING_URI, else the embedded store of `storage`.

    Raises:
        UserError: MLflow 3 does not support the URI.
    """
    uri = experiment.tracking.uri
    from_environment = os.environ.get("MLFLOW_TRACKING_URI")
    if uri and not (from_environment and REDACTED in uri):
        return absolute_uri(uri, "tracking.uri")
    if from_environment:
        return absolute_uri(from_environment, "MLFLOW_TRACKING_URI")
    return sqlite_uri(store_path(storage))


def absolute_uri(uri: str, source: str) -> str:
    """Return `uri` in a form that does not depend on the current directory.

    Args:
        uri: Tracking URI.
        source: Field, variable or option that has it, for the error message.

    Raises:
        UserError: MLflow 3 does not support the URI, or a part of it is not known.
    """
    if not is_tracking_uri(uri):
        raise UserError(
            f"{source}: '{redact_text(uri)}' is not a tracking URI; use http(s)://…, sqlite:///… "
            "or postgresql://…"
        )
    if REDACTED in uri:
        raise UserError(
            f"{source}: '{uri}' has {REDACTED} in place of a part that was not stored; set "
            "MLFLOW_TRACKING_URI to the whole URI"
        )
    database = local_path(uri)
    if database is None:
        return uri.rstrip("/")
    _, mark, options = uri.partition("?")
    return f"{sqlite_uri(database)}{mark}{options}"


def sqlite_uri(database: Path) -> str:
    """Return the URI of a database. In a URI, a ? ends the path and %3F stands for one."""
    return f"sqlite:///{database}".replace("%", "%25").replace("?", "%3F")


def local_path(uri: str) -> Path | None:
    """Return the absolute path of a sqlite database; None for a server."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def share_warning(uri: str) -> str | None:
    """Return a line about a sqlite database on a network file system; None for other stores."""
    database = local_path(uri)
    kind = None if database is None else network_file_system(database)
    if kind is None:
        return None
    return (
        f"tracking.uri: {database} is on a network file system ({kind}), where sqlite's locks can "
        "fail: with several drivers at a time, start one MLflow server and set tracking.uri"
    )


def set_client_options() -> None:
    """Set MLflow's environment variables. Call it before mlflow is imported.

    Variables that the user has set are not changed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)


# ---- links to the UI ----


def experiment_url(base: str, experiment_id: str) -> str:
    """Return the page with all runs of an experiment."""
    return f"{base}/#/experiments/{experiment_id}/runs?{_WORKFLOW}"


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """Return the page with the metrics of a run.

    The page of an embedded store exists only while `pipelines/ui.py` serves it.
    """
    page = f"experiments/{experiment_id}/runs/{run_id}/model-metrics"
    return f"{_server_address(uri)}/#/{page}?{_WORKFLOW}"


def where_to_look(uri: str, url: str | None = None) -> str:
    """Return a link for the terminal, with the command that serves the pages of a local store.

    Args:
        uri: Tracking URI.
        url: A page of this server; None: its first page.
    """
    link = url or _server_address(uri)
    database = local_path(uri)
    if database is None:
        return link
    command = f"mlflow server --backend-store-uri {uri}"
    if database == store_path(database.parents[1]):
        command = f"pipelines/ui.py {database.parents[1]}"
    return f"{link} (after `{command}`)"


def sweep_url(uri: str, experiment_id: str, run_id: str) -> str:
    """Return the page that ranks the trials of a sweep and draws all their curves.

    The experiment needs the tag of `sweep_view`.
    """
    page = f"experiments/{experiment_id}/runs?{_WORKFLOW}"
    view = f"compareRunsMode=CHART&viewStateShareKey={run_id}"
    return f"{_server_address(uri)}/#/{page}&{view}"


def sweep_view(run_id: str) -> tuple[str, str]:
    """Return key and value of the experiment tag that stores the view of a sweep.

    MLflow's default view hides the trials of the sweep and draws only ten curves, and it shows
    about thirty charts before the loss. The stored view shows all trials, ranked by the last
    val/loss, and two charts.
    """
    view = {
        "searchFilter": f"tags.`{PARENT_TAG}` = '{run_id}'",
        "orderByKey": "metrics.`val/loss`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "chartsSearchFilter": "^(val/loss|optim/lr)$",
    }
    return f"mlflow.sharedViewState.{run_id}", json.dumps(view)


def _server_address(uri: str) -> str:
    """Return the address for a browser, without user name and password."""
    if not uri.startswith("http"):
        return f"http://127.0.0.1:{UI_PORT}"
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))


# ---- truncated responses ----


def check_complete(response_id: str | None) -> None:
    """Check that a response was not truncated: MLflow parses an empty body as an empty object.

    Args:
        response_id: The id in the response. A complete response always has one.

    Raises:
        ConnectionError: The id is missing.
    """
    if not response_id:
        raise ConnectionError("the server's response was truncated")


def search_one(function: Callable[..., Any], *query: Any) -> Any:
    """Return the first hit of a search function of MLflow's client; None without hits.

    Asks up to three times, because a truncated response has no hits either.
    """
    for _ in range(3):
        hits = function(*query)
        if hits:
            return hits[0]
    return None
