"""A thread that sends until the server has accepted everything. Nothing else waits for a server."""

import logging
import threading
import time
from collections.abc import Callable

from orchestrator.folders import MovedError
from orchestrator.redact import redact_text

POLL_S = 2.0  # pause between two attempts if there is no outage
PAUSES_S = (1.0, 30.0)  # first and longest pause during an outage
WAKE_S = 0.2  # how often `finish` checks whether to print a message
QUIET_S = 10.0  # `finish` prints a message after this time
DOUBT_S = 10.0  # `finish` no longer waits if the server has rejected everything for so long
ERROR_LENGTH = 300  # characters
log = logging.getLogger(__name__)


class RefusedError(Exception):
    """The server rejects the request: sending it again would not help."""


class DoubtfulError(Exception):
    """The server rejects the request, but may accept it when it has started: 403 and 404."""


class GivenUpError(Exception):
    """The deadline of `Sender.finish` has passed."""


class Sender:
    """Calls `attempt` repeatedly from a daemon thread, until it succeeds after `finish` was called.

    Args:
        attempt: Sends what is missing, or raises. It may be called again after it has sent a part
            or everything.
        name: What is sent and where: the first words of every message.

    Attributes:
        given_up: Set when `finish` returns. An attempt that is still running should stop.
    """

    def __init__(self, attempt: Callable[[], None], name: str) -> None:
        self.given_up = threading.Event()
        self._attempt = attempt
        self._name = name
        self._is_last = False
        self._is_away = False
        self._is_complete = False
        self._pause = 0.0
        self._rejected_since: float | None = None
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def finish(self, deadline_s: float) -> bool:
        """Send the rest. Return whether everything was accepted within `deadline_s` seconds."""
        self._is_last = True
        self._wake.set()
        deadline = time.monotonic() + deadline_s
        has_printed = False
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or self._ended.wait(min(left, WAKE_S)):
                    break
                waits_long = self._is_away or deadline_s - left > QUIET_S
                if waits_long and left > 1 and not has_printed:
                    has_printed = True
                    self._print_wait(left)
        finally:
            self.given_up.set()
        return self._is_complete

    def _print_wait(self, left_s: float) -> None:
        print(
            f"{self._name}: sending the rest, for up to {left_s:.0f} s; Ctrl-C ends the wait, and "
            "loses nothing",
            flush=True,
        )

    def _loop(self) -> None:
        while not self.given_up.is_set() and self._try_once():
            self._wake.wait(self._pause)
            self._wake.clear()
        self._ended.set()

    def _try_once(self) -> bool:
        """Make one attempt. Return whether another one should follow after the pause."""
        # Read before the attempt, so that the last attempt sends all that the run has written.
        is_last = self._is_last
        try:
            self._attempt()
        except (GivenUpError, MovedError):  # the command itself reports a folder that was moved
            return False
        except RefusedError as error:
            self._note_refusal(error)
            return False
        except DoubtfulError as error:
            now = time.monotonic()
            self._rejected_since = self._rejected_since or now
            if is_last and now - self._rejected_since >= DOUBT_S:
                self._note_refusal(error)
                return False
            self._note_outage(error)
            return True
        except Exception as error:
            self._rejected_since = None
            self._note_outage(error)
            return True
        self._rejected_since = None
        if is_last:
            self._is_complete = True
            return False
        if self._is_away:
            log.warning("%s: reached again", self._name)
        self._is_away = False
        self._pause = POLL_S
        return True

    def _note_refusal(self, error: Exception) -> None:
        log.warning(
            "%s: rejected by the server, nothing more is sent: %s. The run folder keeps all data; "
            "pipelines/replay_metrics.py sends it later",
            self._name,
            _one_line(error),
        )

    def _note_outage(self, error: Exception) -> None:
        """Log the first failure of an outage, and double the pause after each further one."""
        first, longest = PAUSES_S
        if self._is_away:
            self._pause *= 2
        else:
            self._pause = first
            log.warning("%s: not reached, retrying: %s", self._name, _one_line(error))
        if self._is_last:
            longest = first  # the driver waits for this thread
        self._pause = min(self._pause, longest)
        self._is_away = True


def _one_line(error: Exception) -> str:
    """Return the error as one line without secrets: MLflow's messages contain the whole URI."""
    text = redact_text(f"{type(error).__name__}: {error}".replace("\n", " "))
    if len(text) > ERROR_LENGTH:
        return text[: ERROR_LENGTH - 1] + "…"
    return text
