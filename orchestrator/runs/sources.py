"""Provenance: which sources a run came from, and what of its facts may be shown.

Input: a working directory and the environment. Output: the commit (or, without a repository, a hash of the shipped
sources) and MLflow's source tags.
"""

import getpass
import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("model", "orchestrator", "pipelines")
UNKNOWN = "unknown"


# ---- sources ----
def source_facts(cwd: Path) -> dict[str, Any]:
    """What the code in `cwd` is: `{"commit", "dirty", "sources_sha256"}`; `dirty` is None where the commit is unknown.

    `ESPALIER_GIT_COMMIT` and `ESPALIER_GIT_DIRTY`, taken where a job was submitted, come before what is found here: the
    copy that Ray ships has no repository. Without either the commit is "unknown" and the hash says what ran.
    """
    facts = {"commit": UNKNOWN, "dirty": None, "sources_sha256": sources_sha256(cwd)}
    if commit := os.environ.get("ESPALIER_GIT_COMMIT"):
        dirty = os.environ.get("ESPALIER_GIT_DIRTY", "").lower() in ("1", "true", "yes")
        return facts | {"commit": commit, "dirty": dirty}
    # A folder that merely lies inside somebody else's repository is not that repository's commit.
    if _git(cwd, "ls-files", "--", *PACKAGES) and (commit := _git(cwd, "rev-parse", "HEAD")):
        return facts | {"commit": commit, "dirty": bool(_git(cwd, "status", "--porcelain"))}
    return facts


def sources_sha256(cwd: Path) -> str:
    """SHA-256 (hex) over sorted names, sizes and bytes of the Python files under model/, orchestrator/, pipelines/."""
    cwd, digest = Path(cwd), hashlib.sha256()
    for name in sorted(
        p.relative_to(cwd).as_posix() for package in PACKAGES for p in (cwd / package).rglob("*.py")
    ):
        content = (cwd / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def source_tags(
    facts: dict[str, Any], script: str = "pipelines/train.py", ray_job_id: str | None = None
) -> dict[str, str]:
    """The tags under which MLflow's pages show where a run came from."""
    tags = {
        "mlflow.source.name": script,
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": facts["commit"],
        "source.sha256": facts["sources_sha256"],
        "mlflow.user": _user(),
    }
    if facts["dirty"] is not None:
        tags["source.dirty"] = str(facts["dirty"]).lower()
    return tags | ({"ray.job_id": ray_job_id} if ray_job_id else {})


def _git(cwd: Path, *words: str) -> str:
    """Standard output of git, or nothing where git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(cwd), *words], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return UNKNOWN
