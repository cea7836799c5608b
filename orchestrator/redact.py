"""Replace secrets in texts that are shown or sent, and find passwords in addresses.

What is read back is stored as it is: a redacted address would be another one. So an experiment with
a password in an address is refused (`config/checks.py`).
"""

import os
import re
from collections.abc import Callable
from typing import Any

REDACTED = "[redacted]"

# Not `pwd`: $PWD is the current directory.
_SECRET = (
    r"passw(?:or)?d|passphrase|secret|credential|api[_-]?key"
    r"|(?:access|auth|private)[_-]?(?:key|token)|alert[_-]?url"
)
# Names of variables and of parameters of an address
_SECRET_NAME = re.compile(rf"{_SECRET}|(?<![a-z])(?:key|token|sig|signature)$", re.IGNORECASE)

# Private keys; tokens of Hugging Face, GitHub, GitLab, OpenAI, Slack, Databricks and AWS; JSON web
# tokens; bearer tokens.
_SECRET_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-[A-Za-z0-9_-]{20}|xox[abprs]-|dapi)"
    r"[A-Za-z0-9_-]{16,}"
    r"|\bA[KS]IA[A-Z0-9]{16}\b"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}",
    re.DOTALL,
)

# The user and password in scheme://user:password@host
_USERINFO = re.compile(r"(?<=://)[^\s/?#'\"]+(?=@)")

# ?name=value and &name=value in an address
_PARAMETER = re.compile(r"""(?P<head>[?&](?P<name>[^=&#\s]+)=)(?P<value>[^&#\s"']+)""")

# password=value and password: value
_ASSIGNMENT = re.compile(
    rf"""(?P<head>["']?\b[\w.-]*(?:{_SECRET})[\w.-]*["']?\s*[=:]\s*)"""
    r"""(?P<value>"[^"]*"|'[^']*'|[^\s&,;}"']+)""",
    re.IGNORECASE,
)
VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})")


def redact(value: Any) -> Any:
    """Return a copy of nested dicts and lists without secrets.

    Secrets are parts of texts, and whole texts under a key such as `password`.
    """
    if isinstance(value, dict):
        return {key: _redact_part(key, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(part) for part in value]
    if isinstance(value, str):
        return redact_text(value)
    return value


def _redact_part(key: object, part: Any) -> Any:
    if isinstance(part, str) and _SECRET_NAME.search(str(key)) and not _is_harmless(part):
        return REDACTED
    return redact(part)


def redact_text(text: str) -> str:
    """Return a text without secrets; a path that exists stays as it is.

    Secrets are users and passwords in addresses, tokens of known shapes, the values of assignments
    such as `password=…`, and the values of environment variables such as $API_KEY.
    """
    if _is_harmless(text):
        return text
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    text = hide_passwords(text)
    text = _SECRET_SHAPES.sub(REDACTED, text)
    return _ASSIGNMENT.sub(_redact_match, text)


def hide_passwords(text: str) -> str:
    """Return a text without the users and passwords in its addresses.

    Unlike the result of `redact_text`, the result does not depend on the environment.
    """
    return replace_passwords(text, lambda _: REDACTED)


def address_shown(text: str) -> str:
    """Return an address without a password, also if it has too few slashes."""
    return redact_text(re.sub(":/*", "://", text, count=1) if "@" in text else text)


def replace_passwords(text: str, replace: Callable[[str], str]) -> str:
    """Replace `user:password` in `://user:password@` and the value in `?token=value`."""
    text = _USERINFO.sub(lambda match: replace(match[0]), text)

    def parameter(match: re.Match[str]) -> str:
        if _SECRET_NAME.search(match["name"]) is None:
            return match[0]
        return match["head"] + replace(match["value"])

    return _PARAMETER.sub(parameter, text)


def has_password(address: str) -> bool:
    """Return whether an address has a password or a token, not only the name of a variable."""
    found: list[str] = []

    def note(secret: str) -> str:
        found.append(secret)
        return secret

    replace_passwords(address, note)
    return not all(
        secret == REDACTED or VARIABLE.fullmatch(secret.rpartition(":")[2]) for secret in found
    )


def _redact_match(match: re.Match[str]) -> str:
    if _is_harmless(match["value"].strip("\"'")):
        return match[0]
    return match["head"] + REDACTED


def _is_harmless(text: str) -> bool:
    """Return whether a text is a number or a path that exists."""
    try:
        float(text)
    except ValueError:
        return os.path.isabs(text) and os.path.exists(text)
    return True


def _environment_secrets() -> list[str]:
    """Return the values of secret environment variables, longest first.

    Values of fewer than 8 characters are left out, because they may be ordinary words.
    """
    values = [
        value
        for name, value in os.environ.items()
        if len(value) >= 8 and _SECRET_NAME.search(name) and not _is_harmless(value)
    ]
    return sorted(values, key=len, reverse=True)
