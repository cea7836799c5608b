"""Empty MLflow databases. Each is a copy of one, which MLflow takes seconds to make."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from orchestrator.track import server


def copy_empty(database: Path) -> None:
    """Put an empty database there."""
    database.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(_empty(), database)


@functools.cache
def _empty() -> Path:
    """Return the database that this process has made."""
    folder = tempfile.mkdtemp(prefix="espalier-store-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    database = Path(folder) / "mlflow.db"
    server.set_client_options()
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=f"sqlite:///{database}").search_experiments()
    return database
