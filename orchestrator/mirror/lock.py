"""One writer of a mirrored folder at a time, on any machine.

The lock is an object that only a conditional write changes. Its holder writes it again every
`BEAT_S`. If it was not written for `STALE_S`, by the clock of a process that waits for the lock,
the holder counts as lost. Time in which the store does not answer, or takes no writes, is left out.

A holder that can read but not write looks lost to others. So, when a write fails, it reads whether
another process has taken the lock.
"""

import contextlib
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator

from orchestrator.errors import HeldError, UserError
from orchestrator.objects.address import Address
from orchestrator.objects.store import (
    ChangedObjectError,
    MissingObjectError,
    Store,
)
from orchestrator.runs.lock import own_name

NAME = "lock.json"
WAITING = "lock-waiting.json"  # a process that waits writes it, to see that writes succeed
BEAT_S = 10.0
STALE_S = 60.0
POLL_S = 1.0


class MirrorLock:
    """The lock, held by this process.

    Args:
        store: The store.
        address: Address of the folder's copy.
        beat_store: The same store, for signs of life: a request that fails is soon given up.

    Attributes:
        token: Tells this holder from others.
        lost_to: Another process that has taken it; None while it is held.
        stays: It is not released at the end: a write of this process may still be under way.
    """

    lost_to: str | None = None
    stays = False

    def __init__(self, store: Store, address: Address, beat_store: Store) -> None:
        self.store = store
        self.beat_store = beat_store
        self.address = address
        self.token = uuid.uuid4().hex
        self._version = ""
        self._beats = 0
        self._has_waited = False

    def acquire(self, known_token: str | None) -> None:
        """Take the lock; wait until a holder that no longer writes counts as lost.

        Args:
            known_token: Token of a holder that is known to have ended.

        Raises:
            HeldError: Its holder lives.
            UserError: The store ignores conditions.
        """
        try:
            self._wait_and_take(known_token)
        finally:
            if self._has_waited:
                with contextlib.suppress(UserError):
                    self.store.delete((self.address / WAITING).key)
        self._require_conditions()
        self.store = self.beat_store

    def _wait_and_take(self, known_token: str | None) -> None:
        seen: tuple[str, float] | None = None  # version; when it was first seen, and time left out
        while True:
            asked = time.monotonic()
            holder, token, version = self._read()
            if seen is not None:
                # While writes fail, the holder cannot show that it lives.
                self.store.put((self.address / WAITING).key, self.token.encode())
                self._has_waited = True
            away_s = max(0.0, time.monotonic() - asked - POLL_S)
            if holder and token != known_token:
                if seen is None:
                    print(
                        f"{self.address}: held by {holder}; waiting for its next sign of life, for "
                        f"{STALE_S:.0f} s at most",
                        flush=True,
                    )
                    seen = (version or "", time.monotonic())
                elif seen[0] != version:
                    raise HeldError(f"{self.address}: held by {holder}")
                else:
                    seen = (seen[0], seen[1] + away_s)
                if time.monotonic() < seen[1] + STALE_S:
                    time.sleep(POLL_S)
                    continue
            with contextlib.suppress(ChangedObjectError):
                self._version = self._write(own_name(), version)
                return

    def _require_conditions(self) -> None:
        try:
            self._write("a writer without the right version", '"0"')
        except ChangedObjectError:
            return
        raise UserError(
            f"{self.address}: this store ignores the conditions of a write, so that two runs could "
            "write to one mirror; use another store"
        )

    def beat(self) -> None:
        """Show that this process lives, unless it has lost the lock.

        Raises:
            UserError: It cannot write, and has not lost the lock as far as it can read.
        """
        try:
            self._write_again(own_name())
        except UserError as error:
            holder, token, _ = self._read()
            is_unknown = not token and not isinstance(error, ChangedObjectError)
            if token == self.token or is_unknown:
                raise
            self.lost_to = holder or "another process"

    def release(self) -> None:
        """Free the lock."""
        with contextlib.suppress(ChangedObjectError):
            self._write_again("")

    def _write_again(self, holder: str) -> None:
        """Write the lock, also if its version is not known, as after an answer that was lost.

        Raises:
            ChangedObjectError: Another process has taken it.
        """
        try:
            self._version = self._write(holder, self._version)
        except ChangedObjectError:
            _, token, version = self._read()
            if token != self.token:
                raise
            self._version = self._write(holder, version)

    def _read(self) -> tuple[str, str, str | None]:
        """Return holder, token and version."""
        try:
            found = self.store.get((self.address / NAME).key)
        except MissingObjectError:
            return "", "", None
        try:
            content = json.loads(found.data)
            return str(content["holder"]), str(content["token"]), found.version
        except (ValueError, LookupError, TypeError):
            return "a process that wrote something else", "", found.version

    def _write(self, holder: str, version: str | None) -> str:
        self._beats += 1
        content = {"holder": holder, "token": self.token, "beat": self._beats}
        data = json.dumps(content).encode()
        return self.store.put_if((self.address / NAME).key, data, version)


@contextlib.contextmanager
def held(
    lock: MirrorLock, known_token: str | None, lost: Callable[[str], object]
) -> Iterator[None]:
    """Hold the lock in the `with` block.

    Args:
        lock: The lock.
        known_token: See `MirrorLock.acquire`.
        lost: Called from a thread with the name of a process that has taken the lock.
    """
    lock.acquire(known_token)
    ended = threading.Event()

    def beat() -> None:
        while lock.lost_to is None and not ended.wait(BEAT_S):
            # Go on after any error: without signs of life, this holder would count as lost. The
            # uploader reports a store that is away or refuses.
            with contextlib.suppress(Exception):
                lock.beat()
        if lock.lost_to is not None:
            lost(lock.lost_to)

    thread = threading.Thread(target=beat, name="mirror-lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(UserError):
            if lock.lost_to is None and not lock.stays:
                lock.release()
