"""Where runs and data are stored: `<storage>/<name>/`, `<storage>/data/`, `<storage>/mlflow/`."""

import os
from collections.abc import Callable
from pathlib import Path

from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError
from orchestrator.objects.address import Address, is_address, parse
from orchestrator.paths import expand_home, local_path, scratch_folder
from orchestrator.runs.folder import RunFolder, SweepFolder

DEFAULT = "runs"
MOST_KEY_BYTES = 600  # of a mirror; names of files follow, and S3 permits 1,024 bytes


def storage_setting(experiment: Experiment) -> str:
    """Return the storage as the user wrote it: `storage`, else $ESPALIER_STORAGE, else `runs`."""
    return experiment.storage or os.environ.get("ESPALIER_STORAGE") or DEFAULT


def storage_root(experiment: Experiment) -> Path:
    """Return the absolute folder of runs and data.

    It is a folder of this machine if the storage is in a bucket. Inside a Ray job the current
    directory is a copy that is deleted later. A relative storage is then a folder in the home
    directory.
    """
    setting = storage_setting(experiment)
    mirror = mirror_of(experiment)
    if mirror is not None and is_address(setting):
        return scratch_of(mirror)
    path = local_path("storage", setting)
    if path.is_absolute():
        return path
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        home = expand_home("~/espalier")
        return home if setting == DEFAULT else home / setting
    return path.absolute()


def scratch_of(mirror: Address) -> Path:
    """Return the folder of this machine for runs whose storage is in a bucket."""
    return scratch_folder() / mirror.scheme / mirror.bucket / mirror.key


def mirror_of(experiment: Experiment) -> Address | None:
    """Return the address that gets a copy of the run: `mirror`, or `storage` if it is an address.

    Raises:
        UserError: It is not an address in object storage, or is too long, or both are set.
    """
    setting = storage_setting(experiment)
    if is_address(setting):
        if (experiment.mirror or setting).rstrip("/") != setting.rstrip("/"):
            raise UserError(
                f"mirror: '{experiment.mirror}' is not the storage, {setting}; set one of the two"
            )
        return _parse_mirror("storage", setting)
    return None if experiment.mirror is None else _parse_mirror("mirror", experiment.mirror)


def _parse_mirror(field: str, text: str) -> Address:
    mirror = parse(field, text)
    size = len(mirror.key.encode())
    if size > MOST_KEY_BYTES:
        raise UserError(
            f"{field}: {mirror} has a key of {size:,} bytes, and the names of files follow it; use "
            f"one of at most {MOST_KEY_BYTES}"
        )
    return mirror


def run_folder(experiment: Experiment) -> RunFolder:
    """Return the folder of the run, or of the sweep that varies `experiment`."""
    return RunFolder(storage_root(experiment) / experiment.name)


def run_places(word: str, storage: Path | None = None) -> list[RunFolder]:
    """Return the folders that a word for a run may mean; see `find_run`."""
    storage = storage or storage_root(Experiment())
    paths = [local_path("RUN", word).absolute(), storage / word]
    return [RunFolder(path) for path in dict.fromkeys(paths)]


def find_run(
    word: str, is_wanted: Callable[[RunFolder], bool], storage: Path | None = None
) -> RunFolder:
    """Find a folder by its path, or by its name in the storage.

    Args:
        word: Path or name.
        is_wanted: Returns whether a folder is of the wanted kind, or raises UserError.
        storage: None: $ESPALIER_STORAGE, else `runs`.

    Raises:
        UserError: There is none.
    """
    places = run_places(word, storage)
    for folder in places:
        if is_wanted(folder):
            return folder
    advice = "the folder of a run, or its name in the storage ($ESPALIER_STORAGE)"
    for folder in places:
        if folder.path.exists():
            raise UserError(f"'{word}': {folder.path} is not the folder of a run; give {advice}")
    raise UserError(
        f"'{word}': there is no run at {' or '.join(str(folder.path) for folder in places)}; give "
        f"{advice}"
    )


def refuse_sweep(folder: RunFolder) -> None:
    """Raise UserError if this is the folder of a sweep, where one of its trials is needed."""
    sweep = SweepFolder(folder)
    if sweep.sweep_file.exists():
        trials = [str(trial.path) for trial in sweep.trials()]
        raise UserError(
            f"{folder.path}: is a sweep; give one of its trials, such as "
            f"{trials[0] if trials else sweep.trial('…').path}"
        )
