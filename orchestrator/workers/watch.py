"""What the driver does while its workers train.

It passes on a signal to stop at once, stops when Ray drains a node of the workers, notes nodes that
do not answer, ends stuck processes, and ends the wait for workers that are done but do not exit.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable

from orchestrator.cluster import connection, private
from orchestrator.cluster.reach import Reach
from orchestrator.folders import MovedError, check_held
from orchestrator.runs import events, signals, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import hangs, marks
from orchestrator.workers.marks import DONE, Mark

POLL_S = 1.0
RECENT_S = 60.0  # for which a node without workers is still looked at
JOIN_S = 5.0  # the thread may wait for a dead Ray
GRACE_S = 5.0  # added to the limit of a rank, so that its own watchdog acts first
# Least and most seconds that workers have to exit once they are done. Shorter than the usual time
# between SIGTERM and SIGKILL.
EXIT_S = (2.0, 20.0)

MarkId = tuple[int, int]  # pid, number of the mark


class Watch:
    """Watches the workers in a thread; used as a context manager around Ray's wait.

    Enter it in the main thread, because Python sets signal handlers only there.

    Args:
        folder: Folder of the run or the sweep. A signal of `signals.STOPS` asks it to stop.
        places: Returns the folders in which workers train now. Called by the thread.

    Attributes:
        over: True after the watch ended Ray's wait: Ray has died, the folder was removed or moved,
            or the workers of a run were done but did not exit (torch's shutdown can deadlock).
    """

    def __init__(self, folder: RunFolder, places: Callable[[], Iterable[RunFolder]]) -> None:
        self.folder = folder
        self.places = places
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self.over = False
        self._reach = Reach(self._note)
        self._used: dict[str, float] = {}  # when workers were seen on a node
        # Last report of each rank, and when it was first seen by our own clock.
        self._seen: dict[tuple[str, int], tuple[MarkId, float]] = {}

    def __enter__(self) -> "Watch":
        # While the main thread waits for Ray, Python runs a signal handler up to a second late.
        # The number of the signal arrives in this pipe at once.
        self._pipe_out, self._pipe_in = os.pipe()
        os.set_blocking(self._pipe_in, False)
        self._fd_before = signal.set_wakeup_fd(self._pipe_in, warn_on_full_buffer=False)
        self._thread.start()
        connection.watch(self._closed, self._end_wait)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._fd_before)
        self._closed.set()
        os.write(self._pipe_in, b"\0")
        self._thread.join(JOIN_S)
        os.close(self._pipe_out)
        os.close(self._pipe_in)

    def _watch(self) -> None:
        while not self._closed.is_set():
            ready, _, _ = select.select([self._pipe_out], [], [], POLL_S)
            try:
                if not ready:
                    self._look()
                elif name := signals.named(os.read(self._pipe_out, 64)):
                    stop.request(self.folder, name)
            except OSError as error:  # such as a full disk; the next look may succeed
                print(f"watching {self.folder.path}: {error}", flush=True)

    def _look(self) -> None:
        """End the wait for workers whose folder is gone, and stuck processes."""
        try:
            check_held(self.folder.path)
        except MovedError:
            self._end_wait()
            return
        groups = []
        for place in self.places():
            group = self._current(place)
            groups.append(group)
            running = [mark for mark in group if not mark.is_over]
            stuck = [mark for mark in running if self._age(place, mark) > mark.limit + GRACE_S]
            for mark in stuck:
                del self._seen[str(place.path), mark.rank]  # tried again after the same time
            if stuck:
                hangs.end_stuck(place, stuck)
        self._look_at_nodes(groups)

    def _current(self, place: RunFolder) -> list[Mark]:
        """Return the marks of the workers that train in a folder now."""
        return marks.read(place)

    def _look_at_nodes(self, groups: list[list[Mark]]) -> None:
        """Note nodes of workers that do not answer; stop if one is drained.

        Args:
            groups: The workers that train together.
        """
        nodes = {mark.node for group in groups for mark in group}
        for node, name in private.draining_nodes().items():
            if node in nodes:
                stop.request(self.folder, f"the node {name} is drained")
        now = time.monotonic()
        self._used |= dict.fromkeys(nodes, now)
        # Workers of a node that is lost may have started elsewhere by now.
        self._reach.look({node for node, used in self._used.items() if now - used < RECENT_S})
        asked = stop.requested(self.folder)
        away = set(self._reach.away)
        waiting = [group for group in groups if not all(mark.is_over for mark in group)]
        if self.over or not asked or not waiting:
            return
        if all(away & {mark.host for mark in group} for group in waiting):
            # The steps that would end with checkpoints wait for these nodes.
            self._end_without(", ".join(sorted(away)), asked)

    def _end_without(self, hosts: str, asked: str) -> None:
        self._end_wait()

    def _note(self, kind: str, message: str) -> None:
        """Note an event and print it."""
        print(events.note(self.folder, kind, message)["message"], flush=True)

    def _end_wait(self) -> None:
        if not self.over:
            self.over = True
            signals.interrupt_work()

    def _age(self, place: RunFolder, mark: Mark) -> float:
        """Return the seconds since the rank reported something new."""
        key = (str(place.path), mark.rank)
        known = self._seen.get(key)
        now = time.monotonic()
        if known is None or known[0] != _mark_id(mark):
            self._seen[key] = (_mark_id(mark), now)
            return 0.0
        return now - known[1]


class RunWatch(Watch):
    """Watches a lone run, whose workers exit when it ends.

    Args:
        folder: Folder of the run.
        hang_after_s: `compute.hang_after_s`. Workers that are done have this time to exit, within
            the bounds of `EXIT_S`.
    """

    def __init__(self, folder: RunFolder, hang_after_s: float) -> None:
        super().__init__(folder, lambda: [folder])
        least, most = EXIT_S
        self._exit_s = min(max(hang_after_s, least), most)
        self._done_since: float | None = None
        self._earlier: set[MarkId] = set()

    def __enter__(self) -> "RunWatch":
        self._earlier = {_mark_id(mark) for mark in marks.read(self.folder)}  # of earlier workers
        super().__enter__()
        return self

    def _current(self, place: RunFolder) -> list[Mark]:
        return [mark for mark in super()._current(place) if _mark_id(mark) not in self._earlier]

    def _note(self, kind: str, message: str) -> None:
        step = max(self.folder.checkpoint_steps(), default=0)
        events.note(self.folder, kind, message, step=step)  # the console prints it

    def _end_without(self, hosts: str, asked: str) -> None:
        reason = f"{asked}: stopped without a new checkpoint, because {hosts} did not answer"
        self.folder.write_ending(Ending("again", reason))
        super()._end_without(hosts, asked)

    def _look(self) -> None:
        super()._look()
        current = self._current(self.folder)
        if not current or any(mark.phase != DONE for mark in current):
            self._done_since = None
            return
        now = time.monotonic()
        if self._done_since is None:
            self._done_since = now
        if now - self._done_since > self._exit_s:
            self._end_wait()


def _mark_id(mark: Mark) -> MarkId:
    return mark.pid, mark.number
