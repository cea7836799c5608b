"""Names of trials. A name is a function of the values alone, so a grown sweep finds its trials.

A name is also the name of a folder: letters, digits, '.', '_' and '-'.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.own_code import plain

LONGEST_NAME = 100  # a run's name may have 128 characters, and the seed follows


def trial_name(fields: Mapping[str, Any]) -> str:
    """Return the name of the trial with these values; other values have another name.

    >>> trial_name({"schedule.max_lr": 1e-3, "schedule.kind": "wsd", "train.max_steps": 80})
    'kind-wsd_max_lr-0.001_max_steps-80'
    """
    return _shortened("_".join(_parts(fields)))


def sample_name(number: int, fields: Mapping[str, Any]) -> str:
    """Return the name of a sample. The number makes it unique, so the values may be rounded."""
    rounded = {}
    for key, value in fields.items():
        rounded[key] = float(f"{value:.4g}") if isinstance(value, float) else value
    return _shortened("_".join([f"sample-{number}", *_parts(rounded)]))


def _parts(fields: Mapping[str, Any]) -> list[str]:
    """Return `field-value` of each field, sorted: the order of the fields does not matter."""
    leaves = [key.partition(".")[2] for key in fields]
    parts = []
    for key in sorted(fields):
        leaf = key.partition(".")[2]
        label = leaf if leaves.count(leaf) == 1 else key.replace(".", "-")
        parts.append(f"{label}-{_word(fields[key])}")
    return parts


def _word(value: Any) -> str:
    """Return a value as a part of a name; it has a hash if a name cannot have all its characters.

    No word has '-' after '_'. So a value cannot look like another value and the next field.
    """
    if isinstance(value, float):
        return repr(value).removesuffix(".0").replace("e+", "e")
    text = plain(value) if isinstance(value, str) else json.dumps(value)
    if re.fullmatch(r"[A-Za-z0-9.]+(-[A-Za-z0-9.]+)*(_[A-Za-z0-9.]+)*", text):
        return text
    readable = re.sub("[^A-Za-z0-9.]+", "-", text).strip("-")[:40]
    return f"{readable}-{_digest(text)}"


def _shortened(name: str) -> str:
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
