"""A thread that repeats one idempotent attempt until it succeeds, so that nobody else ever waits for a server.

Eats an attempt (a function that sends whatever is missing, or raises); yields a log line per outage and, at the end, one for
whoever waits and whether all was sent. What the attempt says twice must mean the same as said once.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.redact import redact_text

POLL_S = 2.0
LOOK_S, SILENCE_S = (
    0.2,
    10.0,
)  # at the end: whoever waits for longer, or for a server that is away, is told so
PAUSES_S = (
    1.0,
    30.0,
)  # first and longest pause while a server is away; at the end never longer than the first
log = logging.getLogger(__name__)


class RefusedError(Exception):
    """The server is there and says no: sending again would change nothing."""


class GivenUpError(Exception):
    """The deadline has passed; nobody waits for this attempt any longer."""


@dataclass(frozen=True)
class Ending:
    """The last attempt's order: send everything, then set this status (None: leave it as it is)."""

    status: str | None


class Sender:
    """`attempt(ending)` in a daemon thread, every `POLL_S` seconds; `ending` is None until `finish`."""

    def __init__(self, attempt: Callable[[Ending | None], None], what: str):
        self.attempt, self.what = attempt, what
        self.ending: Ending | None = None
        self.complete = self.away = False
        self.given_up, self._wake, self._ended = (
            threading.Event(),
            threading.Event(),
            threading.Event(),
        )
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, ending: Ending, deadline_s: float) -> bool:
        """Send the rest; True if all of it was accepted within `deadline_s` seconds."""
        deadline, told, self.ending = time.monotonic() + deadline_s, False, ending
        self._wake.set()
        try:
            while (left := deadline - time.monotonic()) > 0 and not self._ended.wait(
                min(left, LOOK_S)
            ):
                if not told and left > 1 and (self.away or left < deadline_s - SILENCE_S):
                    told = True
                    print(
                        f"{self.what}: sending the rest, for up to {left:.0f} s; Ctrl-C ends the wait, and loses nothing",
                        flush=True,
                    )
        finally:
            self.given_up.set()
        return self.complete

    def _loop(self) -> None:
        pause = 0.0
        while not self.given_up.is_set():
            ending = (
                self.ending
            )  # before the attempt: all that was written until the end goes with it
            try:
                self.attempt(ending)
            except GivenUpError:
                break
            except RefusedError as error:
                log.warning(
                    "%s: refused, and not sent any more: %s. It is kept; pipelines/replay_metrics.py sends it",
                    self.what,
                    _line(error),
                )
                break
            except Exception as error:
                if not self.away:
                    log.warning("%s: not reached, trying on: %s", self.what, _line(error))
                pause = min(
                    2 * pause if self.away else PAUSES_S[0], PAUSES_S[0 if self.ending else 1]
                )
                self.away = True
            else:
                if ending is not None:
                    self.complete = True
                    break
                if self.away:
                    log.warning("%s: reached again", self.what)
                self.away, pause = False, POLL_S
            self._wake.wait(pause)
            self._wake.clear()
        self._ended.set()


def _line(error: Exception) -> str:
    """One readable line of an error, without secrets: MLflow puts the whole URI into its messages."""
    text = redact_text(f"{type(error).__name__}: {error}".replace("\n", " "))
    return text if len(text) <= 300 else text[:299] + "…"
