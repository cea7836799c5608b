"""Addresses in object storage, `s3://bucket/key` and `gs://bucket/key`."""

import re
from dataclasses import dataclass, replace

from orchestrator.errors import UserError
from orchestrator.redact import address_shown

MOST_BYTES = 235  # of a name: 20 fewer than a system permits, for a file that is being written
# Control characters, ends of lines, marks that turn the direction of a text, and what is no UTF-8
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
MOST_KEY_BYTES = 1024  # of a key; S3's limit
_ADDRESS = re.compile(r"(s3|gs)://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """A place in a bucket. `key` has no slash at its ends, and is empty for the whole bucket."""

    scheme: str
    bucket: str
    key: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> "Address":
        return replace(self, key=f"{self.key}/{name}".lstrip("/"))

    @property
    def name(self) -> str:
        """The last part of the key, or the bucket."""
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> "Address":
        """The address without the last part of the key."""
        return replace(self, key=self.key.rpartition("/")[0])


def is_address(text: object) -> bool:
    """Return whether a text is an address in object storage, perhaps a wrong one."""
    return isinstance(text, str) and re.match(r"(?i)(s3|gs):", text) is not None


def parse(setting: str, text: str) -> Address:
    """Return the address that a setting gives.

    Raises:
        UserError: It is not one, or has a user or a password.
    """
    match = _ADDRESS.fullmatch(text)
    if "@" in text.partition(":")[2].lstrip("/").partition("/")[0]:
        problem = "contains a user or a password; credentials come from the environment, a profile "
        problem += "or the role of the machine (AWS_ACCESS_KEY_ID, AWS_PROFILE …)"
    elif match is None:
        problem = "is not s3://BUCKET/KEY, with a bucket of 3 or more of a-z, 0-9, '-' and '.'"
    elif not is_plain_key(match[3] and match[3].rstrip("/")):
        problem = (
            f"has a part that is empty, '.', '..' or longer than {MOST_BYTES} bytes, or a control "
            "character; use another key"
        )
    else:
        return Address(match[1], match[2], (match[3] or "").rstrip("/"))
    shown = address_shown(text) if text.isprintable() else ascii(address_shown(text))[1:-1]
    raise UserError(f"{setting}: '{shown}' {problem}")


def is_plain_key(key: str | None) -> bool:
    """Return whether a key is also a path below a folder. An empty one is."""
    if not key:
        return True
    if CONTROL.search(key):
        return False
    parts = key.split("/")
    return all(part not in ("", ".", "..") and len(part.encode()) <= MOST_BYTES for part in parts)
