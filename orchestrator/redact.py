"""Secrets in texts and facts, replaced before anything is stored, shown or sent."""

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


_SECRET_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox[abprs]-|dapi)[A-Za-z0-9_-]{16,}"
    r"|\bA[KS]IA[A-Z0-9]{16}\b"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}",
    re.DOTALL,
)


_USERINFO = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")


_PARAMETER = re.compile(r"""(?P<head>[?&](?P<name>[^=&#\s]+)=)(?P<value>[^&#\s"']+)""")


_ASSIGNMENT = re.compile(
    r"""(?P<head>(?P<quote>["']?)(?P<name>[A-Za-z_][\w.-]*)(?P=quote)\s*[=:]\s*)"""
    r"""(?P<value>"[^"]*"|'[^']*'|[^\s&,;}"']+)"""
)


def redact(facts: dict[str, Any]) -> dict[str, Any]:
    """The same dict without secrets: values of keys named like one, and what looks like one inside any text."""
    return {
        k: REDACTED if _names_secret(k) and v not in (None, "") else _redact_value(v)
        for k, v in facts.items()
    }


def redact_text(text: str) -> str:
    """`text` without URL userinfo, tokens of known shapes, `password=…` words and values of secret variables."""
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    text = _SECRET_SHAPES.sub(REDACTED, _USERINFO.sub(REDACTED, text))
    for rule in (
        _PARAMETER,
        _ASSIGNMENT,
    ):  # `https:` is an assignment too, and would have a whole query for its value
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
