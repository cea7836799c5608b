"""Tracking stores: which MLflow a run is sent to, what its answers are worth, and at which address a browser finds it.

Needs no mlflow.
"""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from orchestrator.errors import UserError
from orchestrator.redact import redact_text

UI_PORT = 5000
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own name for what makes a run a child of another
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # to try again is the sender's business
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
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
        raise UserError(
            f"{where}: '{redact_text(uri)}' is none of http(s)://…, sqlite:///…, postgresql://…"
        )
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
    return f"{_base(uri)}/#/experiments/{experiment_id}/runs/{run_id}/model-metrics?{_MODE}"


def sweep_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The trials of the sweep `run_id`, ranked, beside all their curves; the experiment needs the tag of `sweep_view`."""
    return f"{_base(uri)}/#/experiments/{experiment_id}/runs?{_MODE}&compareRunsMode=CHART&viewStateShareKey={run_id}"


def sweep_view(run_id: str, metric: str = "val/loss") -> tuple[str, str]:
    """(key, value) of the tag that holds the view of a sweep: ranked by the last `metric`, lowest first.

    Of itself MLflow nests a sweep's trials out of sight while they are in order of time, draws the curves of ten, and no
    address can say otherwise but one of a stored view. Its charts are filtered: about thirty would come before the loss.
    """
    view = {
        "searchFilter": f"tags.`{PARENT_TAG}` = '{run_id}'",
        "orderByKey": f"metrics.`{metric}`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",
        "chartsSearchFilter": f"^({metric}|optim/lr)$",
    }
    return f"mlflow.sharedViewState.{run_id}", json.dumps(view)


def _base(uri: str) -> str:
    """Where a browser finds the server of `uri`, without a password."""
    if not uri.startswith("http"):
        return f"http://127.0.0.1:{UI_PORT}"
    parts = urlsplit(uri)
    return urlunsplit(
        (parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", "")
    )


# ---- answers ----
def whole(answer: Any, its_id: str | None) -> Any:
    """`answer`, unless it was cut: MLflow takes an empty body for an empty object."""
    if not its_id:
        raise ConnectionError("the server's answer was cut")
    return answer


def hits(search: Callable, *query: Any, **options: Any) -> Any:
    """What `search` finds. Asked again where that is nothing: an answer that was cut reads like no hit."""
    return next((found for _ in range(3) if (found := search(*query, **options))), [])


def first(search: Callable, *query: Any) -> Any:
    """The first hit or None."""
    return next(iter(hits(search, *query)), None)


def quieten() -> None:
    """Set MLflow's own knobs, in this process and before it is imported; what the user set stays."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
