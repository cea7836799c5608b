"""Which code a run used, for MLflow: the commit, and a hash of the Python files."""

import getpass
import os
import subprocess
from pathlib import Path
from typing import TypedDict

from orchestrator.code_hashes import PACKAGES, sources_sha256

UNKNOWN = "unknown"
GIT_TIMEOUT_S = 20


class CodeVersion(TypedDict):
    """Identifies the code that runs."""

    commit: str  # "unknown" without a repository
    dirty: bool | None  # True: files differ from the commit; None: the commit is not known
    sources_sha256: str


def source_facts(directory: Path) -> CodeVersion:
    """Return which code is in `directory`.

    ESPALIER_GIT_COMMIT and ESPALIER_GIT_DIRTY take precedence. `make submit` sets them, because the
    copy that Ray ships has no repository.
    """
    sources = CodeVersion(commit=UNKNOWN, dirty=None, sources_sha256=sources_sha256(directory))
    submitted = os.environ.get("ESPALIER_GIT_COMMIT")
    if submitted:
        dirty = os.environ.get("ESPALIER_GIT_DIRTY", "").lower() in ("1", "true", "yes")
        return {**sources, "commit": submitted, "dirty": dirty}
    # If another repository contains this copy, its commit is not ours.
    if not _git(directory, "ls-files", "--", *PACKAGES):
        return sources
    commit = _git(directory, "rev-parse", "HEAD")
    if not commit:
        return sources
    return {**sources, "commit": commit, "dirty": bool(_git(directory, "status", "--porcelain"))}


def source_tags(
    sources: CodeVersion, script: str = "pipelines/train.py", ray_job_id: str | None = None
) -> dict[str, str]:
    """Return tags about the sources, under the names that MLflow's pages read."""
    tags = {
        "mlflow.source.name": script,
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": sources["commit"],
        "source.sha256": sources["sources_sha256"],
        "mlflow.user": _user(),
    }
    if sources["dirty"] is not None:
        tags["source.dirty"] = str(sources["dirty"]).lower()
    if ray_job_id is not None:
        tags["ray.job_id"] = ray_job_id
    return tags


def _git(directory: Path, *words: str) -> str:
    """Return the output of a git command; empty if git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *words],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have an id but no name
        return UNKNOWN
