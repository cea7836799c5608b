"""Replace secrets in texts and in dicts before they are stored, shown or sent."""

import os
import re
from typing import Any

REDACTED = "[redacted]"

_SECRET_WORDS = {
    "token",
    "secret",
    "secrets",
    "password",
    "passwd",
    "passphrase",
    "pwd",
    "key",
    "apikey",
    "credential",
    "credentials",
}

# Private keys; tokens of Hugging Face, GitHub, GitLab, OpenAI, Slack, Databricks and AWS; JSON web
# tokens; bearer tokens.
_SECRET_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-|dapi)[A-Za-z0-9_-]{16,}"
    r"|\bA[KS]IA[A-Z0-9]{16}\b"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}",
    re.DOTALL,
)

# The user and password in scheme://user:password@host
_USERINFO = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")

# ?name=value and &name=value in an address
_PARAMETER = re.compile(r"""(?P<head>[?&](?P<name>[^=&#\s]+)=)(?P<value>[^&#\s"']+)""")

# name=value and name: value
_ASSIGNMENT = re.compile(
    r"""(?P<head>(?P<quote>["']?)(?P<name>[A-Za-z_][\w.-]*)(?P=quote)\s*[=:]\s*)"""
    r"""(?P<value>"[^"]*"|'[^']*'|[^\s&,;}"']+)"""
)


def redact(facts: dict[str, Any]) -> dict[str, Any]:
    """Return a copy without secrets: values of keys such as `password`, and parts of texts."""
    redacted = {}
    for key, value in facts.items():
        if _names_secret(key) and value not in (None, ""):
            redacted[key] = REDACTED
        else:
            redacted[key] = _redact_value(value)
    return redacted


def redact_text(text: str) -> str:
    """Return a text without secrets.

    Secrets are users and passwords in addresses, tokens of known shapes, the values of assignments
    such as `password=…`, and the values of environment variables such as $API_KEY.
    """
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    text = _USERINFO.sub(REDACTED, text)
    text = _SECRET_SHAPES.sub(REDACTED, text)
    # Parameters first: the other rule reads a whole address as one assignment, `https: //…`.
    text = _PARAMETER.sub(_redact_match, text)
    return _ASSIGNMENT.sub(_redact_match, text)


def redact_addresses(tree: Any) -> Any:
    """Return a copy of nested dicts and lists without the secrets in addresses (`scheme://…`)."""
    if isinstance(tree, dict):
        return {key: redact_addresses(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redact_addresses(value) for value in tree]
    if isinstance(tree, str) and "://" in tree:
        return redact_text(tree)
    return tree


def _redact_value(value: Any) -> Any:
    if isinstance(value, dict):
        return redact(value)
    if isinstance(value, (list, tuple)):
        return [_redact_value(part) for part in value]
    if isinstance(value, str):
        return redact_text(value)
    return value


def _redact_match(match: re.Match[str]) -> str:
    if _names_secret(match["name"]):
        return match["head"] + REDACTED
    return match[0]


def _names_secret(name: str) -> bool:
    """Return whether a value of this name is secret: `api_key`, `hfToken`; not `eval_tokens`."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", str(name))
    for word in words:
        word = word.lower()
        if word in _SECRET_WORDS or "password" in word or "secret" in word:
            return True
    return False


def _environment_secrets() -> list[str]:
    """Return the values of secret environment variables, longest first.

    Values of fewer than 8 characters are left out, because they may be ordinary words.
    """
    values = [
        value for name, value in os.environ.items() if _names_secret(name) and len(value) >= 8
    ]
    return sorted(values, key=len, reverse=True)
