"""Sends a small JSON to a webhook when a run or a sweep ends, hangs, waits, or loses a trial.

The address is a secret, as those of Slack are: it is in $ESPALIER_ALERT_URL only, and is neither
stored nor printed. A thread sends, so that a slow server does not delay the work.
"""

import contextlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from datetime import UTC, datetime
from types import TracebackType
from urllib.parse import urlsplit

from orchestrator.errors import HeldError, RayDiedError, UserError
from orchestrator.folders import MovedError
from orchestrator.redact import redact_text
from orchestrator.runs import events
from orchestrator.runs.ending import Ending, Kind
from orchestrator.runs.folder import RunFolder

VARIABLE = "ESPALIER_ALERT_URL"
POLL_S = 1.0
TIMEOUT_S = 5.0
MESSAGE_CHARS = 500
_ENDINGS: dict[Kind, str] = {
    "done": "finished",
    "failed": "failed",
    "user": "failed",
    "diverged": "diverged",
}
_EVENTS = {
    "hang": "hung",
    "waiting": "waiting",
    "trial_diverged": "diverged",
    "trial_failed": "failed",
}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: another server must not get the message."""

    def redirect_request(self, *_: object) -> None:
        return None


def address() -> str | None:
    """Return $ESPALIER_ALERT_URL; None if it is not set.

    Raises:
        UserError: It is not an http(s) address. The message does not quote it.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    with contextlib.suppress(ValueError):
        parts = urlsplit(given)
        has_host = parts.hostname and parts.port != 0  # ValueError: no number, or too large
        is_plain = given.isprintable() and " " not in given
        if parts.scheme in ("http", "https") and has_host and is_plain:
            return given
    raise UserError(f"{VARIABLE} is not an http:// or https:// address; correct or unset it")


class Alerts:
    """Sends alerts of a job until the `with` block ends.

    Args:
        folder: Folder of the run or the sweep.
        which: `tracking.alert`.
    """

    def __init__(self, folder: RunFolder, which: str) -> None:
        self._folder = folder
        self._which = which
        self._address = None if which == "never" else address()
        self._ended: tuple[str, str] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="alerts", daemon=True)
        self._has_failed = False
        self._is_waiting = False
        self._trials: set[str] = set()  # that had an alert

    def __enter__(self) -> "Alerts":
        if self._address is not None:
            before = events.read(self._folder)
            self._seen = len(before)
            self._trials = {str(event["trial"]) for event in before if "trial" in event}
            self._thread.start()
        return self

    def ended(self, ending: Ending) -> None:
        """Send how the job ended when the block ends."""
        event = _ENDINGS.get(ending.kind)
        if event is not None and (event != "finished" or self._which == "all"):
            self._ended = event, ending.reason or ""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # With the other errors, another process continues or works on the same run.
        if isinstance(error, Exception) and not isinstance(
            error, (HeldError, MovedError, RayDiedError)
        ):
            self._ended = "failed", str(error)
        self._done.set()
        # After SIGTERM there is no ending to send, and no time to wait.
        if self._address is not None and self._ended is not None:
            self._thread.join(2 * TIMEOUT_S + POLL_S)  # an earlier alert may be on its way
            if self._thread.is_alive():
                self._print_once(self._ended[0], TimeoutError())

    def _follow(self) -> None:
        done = False
        while not done:
            done = self._done.wait(POLL_S)
            found = events.read(self._folder)
            for event in found[self._seen :]:
                kind = event.get("kind")
                is_waiting, self._is_waiting = self._is_waiting, kind == "waiting"
                is_old = is_waiting and kind == "waiting"  # noted each minute
                if "trial" in event:
                    is_old = event["trial"] in self._trials  # a later start has tried it again
                    self._trials.add(str(event["trial"]))
                if kind in _EVENTS and not is_old:
                    self._send(_EVENTS[event["kind"]], str(event.get("message", "")))
            self._seen = max(self._seen, len(found))
        if self._ended is not None:
            self._send(*self._ended)

    def _send(self, event: str, reason: str) -> None:
        assert self._address is not None
        reason = redact_text(reason).strip().partition("\n")[0][:MESSAGE_CHARS]
        name = self._folder.name
        body = {
            "text": f"{name}: {event}" + (f": {reason}" if reason else ""),  # shown by Slack
            "name": name,
            "event": event,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        request = urllib.request.Request(
            self._address,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "User-Agent": "espalier"},
        )
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_S):
                pass
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._print_once(event, error)

    def _print_once(self, event: str, error: Exception) -> None:
        if self._has_failed:
            return
        self._has_failed = True
        why = (
            f"HTTP status {error.code}"
            if isinstance(error, urllib.error.HTTPError)
            else "no answer"
        )
        print(f"{VARIABLE}: its server did not take the alert '{event}' ({why})", flush=True)
