"""Paths that a user gives, and the folder of this program's caches."""

import os
import re
import tempfile
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.redact import address_shown


def local_path(setting: str, value: str) -> Path:
    """Return the path that a setting gives; `~` is the home directory.

    Raises:
        UserError: It is the address of an object store. As a path it would be a local folder.
    """
    if re.match(r"[A-Za-z][\w.+-]+:/|(file|s3|gs):", value):
        raise UserError(
            f"{setting}: '{address_shown(value)}' is an address, and only paths are supported "
            "here; mount it, or copy it to a folder that all nodes share"
        )
    return expand_home(value)


def expand_home(path: str | Path) -> Path:
    """Replace `~` or `~user` at the start of a path, which need not exist.

    Raises:
        UserError: There is no such user, or this user has no home directory; or the system refuses
            the path, for example because a name is too long or a folder may not be entered.
    """
    try:
        expanded = Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"'{path}': '{Path(path).parts[0]}' is no home directory here; give the whole path"
        ) from None
    try:
        os.stat(expanded)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{path}': cannot be opened ({reason}); give another path") from None
    return expanded


def cache_folder() -> Path:
    """Return the folder of this program's downloads, timings and hashes on this machine."""
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if base.startswith("~"):  # this user has no home directory
        return Path(tempfile.gettempdir()) / f"espalier-cache-{os.getuid()}"
    return Path(os.path.abspath(base)) / "espalier"


def scratch_folder() -> Path:
    """Return the folder for storages that are in a bucket. Other machines do not share it."""
    return cache_folder() / "scratch"
