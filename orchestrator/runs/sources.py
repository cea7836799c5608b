"""Provenance: which sources a run came from, and what of its facts may be shown.

Eats a working directory, the environment and dicts of facts; yields the commit (or, without a repository, a hash of
the shipped sources), MLflow's source tags, and the same facts with every secret taken out.
"""

import getpass
import hashlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("model", "orchestrator", "pipelines")
UNKNOWN = "unknown"
REDACTED = "[redacted]"

_SECRET_WORDS = {"token", "secret", "secrets", "password", "passwd", "passphrase", "pwd", "key", "apikey", "credential",
                 "credentials"}
_SECRET_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-|dapi)[A-Za-z0-9_-]{16,}"
    r"|\bA[KS]IA[A-Z0-9]{16}\b"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}", re.DOTALL)
_USERINFO = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
_PARAMETER = re.compile(r"""(?P<head>[?&](?P<name>[^=&#\s]+)=)(?P<value>[^&#\s"']+)""")
_ASSIGNMENT = re.compile(r"""(?P<head>(?P<quote>["']?)(?P<name>[A-Za-z_][\w.-]*)(?P=quote)\s*[=:]\s*)"""
                         r"""(?P<value>"[^"]*"|'[^']*'|[^\s&,;}"']+)""")


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
    for name in sorted(p.relative_to(cwd).as_posix() for package in PACKAGES for p in (cwd / package).rglob("*.py")):
        content = (cwd / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def source_tags(facts: dict[str, Any], script: str = "pipelines/train.py",
                ray_job_id: str | None = None) -> dict[str, str]:
    """The tags under which MLflow's pages show where a run came from."""
    tags = {"mlflow.source.name": script, "mlflow.source.type": "JOB", "mlflow.source.git.commit": facts["commit"],
            "source.sha256": facts["sources_sha256"], "mlflow.user": _user()}
    if facts["dirty"] is not None:
        tags["source.dirty"] = str(facts["dirty"]).lower()
    return tags | ({"ray.job_id": ray_job_id} if ray_job_id else {})


def _git(cwd: Path, *words: str) -> str:
    """Standard output of git, or nothing where git or the repository is missing."""
    try:
        done = subprocess.run(["git", "-C", str(cwd), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return UNKNOWN


# ---- secrets ----
def redact(facts: dict[str, Any]) -> dict[str, Any]:
    """The same dict without secrets: values of keys named like one, and what looks like one inside any text."""
    return {k: REDACTED if _names_secret(k) and v not in (None, "") else _redact_value(v) for k, v in facts.items()}


def redact_text(text: str) -> str:
    """`text` without URL userinfo, tokens of known shapes, `password=…` words and values of secret variables."""
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    text = _SECRET_SHAPES.sub(REDACTED, _USERINFO.sub(REDACTED, text))
    for rule in (_PARAMETER, _ASSIGNMENT):  # `https:` is an assignment too, and would have a whole query for its value
        text = rule.sub(lambda m: m["head"] + REDACTED if _names_secret(m["name"]) else m[0], text)
    return text


def redact_addresses(tree: Any) -> Any:
    """The same tree of dicts and lists, its addresses (`scheme://…`) without passwords and tokens."""
    if isinstance(tree, dict):
        return {key: redact_addresses(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redact_addresses(value) for value in tree]
    return redact_text(tree) if isinstance(tree, str) and "://" in tree else tree


def _redact_value(value: Any) -> Any:
    if isinstance(value, dict):
        return redact(value)
    if isinstance(value, (list, tuple)):
        return [_redact_value(v) for v in value]
    return redact_text(value) if isinstance(value, str) else value


def _names_secret(name: str) -> bool:
    """Whether a field is named like a secret: `api_key` and `hfToken` are, `eval_tokens` and `tokenizer` are not."""
    words = [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", str(name))]
    return any(w in _SECRET_WORDS or "password" in w or "secret" in w for w in words)


def _environment_secrets() -> list[str]:
    """Values of variables named like secrets, longest first; too short ones would redact ordinary words."""
    values = (v for k, v in os.environ.items() if _names_secret(k) and len(v) >= 8)
    return sorted(values, key=len, reverse=True)
