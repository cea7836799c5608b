"""Where runs and data lie: `<storage>/<name>/`, `<storage>/data/`, `<storage>/mlflow/`. Needs nothing heavy."""

import os
from pathlib import Path

from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError


def storage_root(experiment: Experiment) -> Path:
    """The absolute folder of runs and data.

    Inside a Ray job the current directory is a throw-away copy, so a relative storage moves to the home directory.
    """
    text = experiment.storage or os.environ.get("ESPALIER_STORAGE") or "runs"
    path = Path(text).expanduser()
    if path.is_absolute():
        return path
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return Path("~/espalier").expanduser() / ("" if text == "runs" else text)
    return path.absolute()


def check_writable(storage: Path) -> None:
    """Refuse a storage that cannot be made or written to; makes nothing."""
    place = storage
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "not writable" if place.is_dir() else "a file"
        raise UserError(
            f"storage: {storage} cannot be written to, {place} is {why}; set storage=… or ESPALIER_STORAGE"
        )
