"""Downloads a file of a corpus; passwords of its address come from environment variables."""

import base64
import hashlib
import os
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import UserError
from orchestrator.redact import REDACTED, VARIABLE, redact_text, replace_passwords

if TYPE_CHECKING:
    import urllib.request

TIMEOUT_S = 60  # a download fails if the server sends nothing for this time
_BLOCK = 1 << 20

Progress = Callable[[str, int, int], None]  # stage, bytes done, bytes in all


def _request(url: str) -> "urllib.request.Request":
    """Return the request for an address, with the values of the variables in it.

    Raises:
        UserError: A variable is not set, or an earlier version has stored `[redacted]`.
    """
    import urllib.request

    def with_values(secret: str) -> str:
        unset = [name for name in VARIABLE.findall(secret) if os.path.expandvars(name) == name]
        if secret == REDACTED:
            unset = ["a password, which was not stored: write $NAME in its place"]
        if unset:
            raise UserError(
                f"data.corpus: '{redact_text(url)}' needs {', '.join(unset)}; set this "
                "environment variable"
            )
        return os.path.expandvars(secret)

    parts = urllib.parse.urlsplit(replace_passwords(url, with_values))
    userinfo, has_userinfo, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)))
    if has_userinfo:  # urllib would take a password for a port
        encoded = base64.b64encode(urllib.parse.unquote(userinfo).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request


def download(url: str, file: Path, place: Path, progress: Progress) -> str:
    """Download `url` into `file`, and return its SHA-256.

    Args:
        url: Address; it may have variables in place of passwords.
        file: The file to write.
        place: Where the user may put the file instead, for the message.
        progress: Called with ("downloading", bytes done, bytes in all).

    Raises:
        UserError: The address does not answer, or a variable is not set.
    """
    import http.client
    import urllib.request

    digest = hashlib.sha256()
    done = 0
    request = _request(url)
    try:
        with (
            urllib.request.urlopen(request, timeout=TIMEOUT_S) as response,
            open(file, "wb") as out,
        ):
            total = int(response.headers.get("Content-Length") or 0)
            while block := response.read(_BLOCK):
                digest.update(block)
                out.write(block)
                done += len(block)
                progress("downloading", done, total or done + 1)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = redact_text(str(getattr(error, "reason", error)))
        raise UserError(
            f"{redact_text(url)}: cannot be downloaded ({reason}); put the file at {place}, "
            "or name a local copy in data.corpus"
        ) from None
    return digest.hexdigest()
