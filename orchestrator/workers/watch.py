"""What a driver looks after while its workers train: signals that cannot wait, nodes that are taken away, processes that
are stopped or do not end.

Eats the folder of a run, or of a sweep and its stages; asks the run to stop (`stopping`), ends what is stuck on this
machine, and ends the wait for a run's workers that are done and do not exit (torch's shutdown can deadlock).
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from orchestrator.runs import stop
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import watchdog

POLL_S = 1.0
EXIT_S = (
    2.0,
    20.0,
)  # the least and the most that workers that are done have to end: less than a SIGTERM's notice
GRACE_S = 5.0  # beyond the limit of a worker that watches itself


class Watch:
    """`with watch:` around Ray's wait, in the main thread.

    Args:
        folder: of the run or the sweep, which a SIGTERM asks to stop.
        places: the folders in which workers train now; asked for by another thread.
    """

    def __init__(self, folder: Path, places: Callable[[], Iterable[Path]]):
        self.folder, self.places, self.closed = Path(folder), places, threading.Event()
        # (folder, rank): (its last mark, since when by our own clock)
        self.seen: dict[tuple[Path, int], tuple[tuple[int, int], float]] = {}

    def __enter__(self) -> "Watch":
        # The interpreter runs a handler once the main thread comes back from Ray's wait, a second later; this pipe at once.
        self.read, self.write = os.pipe()
        os.set_blocking(self.write, False)
        self.fd_before = signal.set_wakeup_fd(self.write, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._loop, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        signal.set_wakeup_fd(self.fd_before)
        self.closed.set()
        os.write(self.write, b"\0")
        self.thread.join()
        os.close(self.read)
        os.close(self.write)

    def _loop(self) -> None:
        while not self.closed.is_set():
            ready, _, _ = select.select([self.read], [], [], POLL_S)
            try:
                if ready and signal.SIGTERM in os.read(self.read, 64):
                    stop.request(RunFolder(self.folder), "SIGTERM")
                elif not ready:
                    self._look()
            except (
                OSError
            ) as error:  # a full disk, a file system that is away: the next look may see more
                print(f"watching {self.folder}: {error}", flush=True)

    def _look(self) -> None:
        for place in self.places():
            for mark in watchdog.marks(place):
                if (
                    mark["phase"] not in (watchdog.DONE, watchdog.FAILED)
                    and self._age(place, mark) > mark["limit"] + GRACE_S
                ):
                    watchdog.end_stuck(place, mark)

    def _age(self, place: Path, mark: dict) -> float:
        """Seconds since a worker's mark was another one."""
        known, since = self.seen.get((place, mark["rank"]), (None, 0.0))
        if known != _identity(mark):
            since = time.monotonic()
            self.seen[place, mark["rank"]] = _identity(mark), since
        return time.monotonic() - since


class RunWatch(Watch):
    """Of a lone run, whose workers end with it; `over`: it ended the wait for workers that were done.

    Args:
        hang_after_s: after which a step counts as hung. An end that takes so long hangs, within the bounds of `EXIT_S`.
    """

    def __init__(self, run_dir: Path, hang_after_s: float):
        super().__init__(run_dir, lambda: [self.folder])
        self.exit_s, self.done_since, self.over = (
            min(max(hang_after_s, EXIT_S[0]), EXIT_S[1]),
            None,
            False,
        )

    def __enter__(self) -> "RunWatch":
        self.before = {
            _identity(mark) for mark in watchdog.marks(self.folder)
        }  # of earlier workers
        super().__enter__()
        return self

    def _look(self) -> None:
        super()._look()
        marks = [m for m in watchdog.marks(self.folder) if _identity(m) not in self.before]
        if node := draining(marks):
            stop.request(RunFolder(self.folder), f"the node {node} is drained")
        done = bool(marks) and all(m["phase"] == watchdog.DONE for m in marks)
        self.done_since = (self.done_since or time.monotonic()) if done else None
        if done and not self.over and time.monotonic() - self.done_since > self.exit_s:
            self.over = True
            os.kill(
                os.getpid(), signal.SIGINT
            )  # Ray's own way out of its wait: it kills the workers


def _identity(mark: dict) -> tuple[int, int]:
    return mark["pid"], mark["number"]


def draining(marks: list[dict]) -> str | None:
    """The name of a node that Ray is taking away and that workers are on."""
    import ray

    try:
        leaving = (
            ray._private.state.state.get_draining_nodes()
        )  # where Ray Train's own watcher looks; there is no public way
        names = {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes()} if leaving else {}
    except Exception:  # the cluster is not there at this moment
        return None
    ours = {mark["node"] for mark in marks}
    return next((names.get(node, node) for node in leaving if node in ours), None)
