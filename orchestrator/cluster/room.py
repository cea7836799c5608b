"""How many workers a run can start now, and what it says while there is no room for them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.cluster.layout import Layout, Node, alive_nodes, cluster_grows, groups, places
from orchestrator.cluster.reach import alive_hosts, free_nodes, present
from orchestrator.text import duration

LOOK_S = 1.0  # between two looks at the cluster
LINE_S = 60.0  # between two lines while the run waits

Note = Callable[[str, str], object]  # gets the kind and the message of an event


class WaitedTooLongError(RuntimeError):
    """There was no room for the workers for `compute.wait_for_nodes_s`."""


@dataclass
class Room:
    """Chooses the number of workers of each start of a run.

    Args:
        layout: Resources of a worker.
        numbers: Permitted numbers of workers.
        wait_s: Longest wait for room.
        newest_step: Returns the step of the newest checkpoint.
        stop_requested: Returns why the run was asked to stop; None if it was not.
        note: Writes an event.
        together: The workers of a group must be on one node.
    """

    layout: Layout
    numbers: Sequence[int]
    wait_s: float
    newest_step: Callable[[], int]
    stop_requested: Callable[[], str | None]
    note: Note
    together: bool = False
    _tries: int = 0  # starts since workers ran
    _waiting_since: float | None = None
    _line_at: float = 0.0
    _noticed: int | None = None  # newest checkpoint when there was room for more workers
    _look_at: float = 0.0
    _known: set[str] = field(default_factory=set)  # hosts that were alive at a look

    def choose(self) -> int | None:
        """Return the number of workers to start; None: there is no room, after a short wait.

        Raises:
            WaitedTooLongError: There was none for `wait_s`, or the run was asked to stop.
        """
        nodes, away = self._present()
        room = places(nodes, self.layout)
        fitting = sorted((n for n in self.numbers if n <= room), reverse=True)
        if cluster_grows() and not fitting:
            fitting = [max(self.numbers)]  # the autoscaler adds machines for workers that wait
        if self._tries > 0 or not fitting:
            self._wait(nodes, away)
        if not fitting:
            time.sleep(LOOK_S)
            return None
        if away and self._tries == 0 and fitting[0] < max(self.numbers):
            message = f"going on with {fitting[0]} worker(s) without {', '.join(away)}"
            self.note("resize", f"{message}: down, drained or cut off from the network")
        # After a start that had no room, because others use the cluster, try a smaller number.
        chosen = fitting[self._tries % len(fitting)]
        self._tries += 1
        return chosen

    def started(self) -> None:
        """Note that the workers have started."""
        self._tries = 0
        self._waiting_since = None

    def groups(self, none_starts: bool = False) -> int:
        """Return how many groups of workers have room at the same time.

        Args:
            none_starts: No group starts although there is room; another job may use it.

        Raises:
            WaitedTooLongError: As `choose`, if there is no room for one, or none starts.
        """
        self._known |= alive_hosts()
        group = replace(self.layout, num_workers=min(self.numbers))
        room = groups(alive_nodes(), group, self.together)
        if room and not none_starts:
            self._waiting_since = None
        else:
            self._wait(*self._present())
        return room

    def larger(self, running: int) -> int | None:
        """Return a larger number of workers if there is room and a new checkpoint, else None.

        Call it often while `running` workers train.
        """
        if running == max(self.numbers) or time.monotonic() < self._look_at:
            return None
        self._look_at = time.monotonic() + LOOK_S
        room = running + places(free_nodes(), self.layout)
        number = max(n for n in self.numbers if n <= max(room, running))
        if number <= running:
            self._noticed = None
            return None
        step = self.newest_step()
        if self._noticed is None:
            self._noticed = step
        if step <= self._noticed:
            return None
        self._noticed = None
        self.note("resize", f"there is room for {number} workers: going on with them")
        return number

    def _present(self) -> tuple[list[Node], list[str]]:
        """Return the machines that answer, and the hosts that were alive before and do not.

        Ray also lists the machines that an autoscaler ended before this run: they are not lost.
        """
        self._known |= alive_hosts()
        nodes, hosts = present()
        return nodes, sorted(self._known - hosts)

    def _wait(self, nodes: list[Node], away: list[str]) -> None:
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = self._line_at = now
        left = self._waiting_since + self.wait_s - now
        text = self._missing(nodes, away)
        asked = self.stop_requested()
        if asked is not None:
            raise WaitedTooLongError(f"{asked}: stopped while it waited, because there was {text}")
        if left <= 0:
            raise WaitedTooLongError(
                f"{text} for {duration(self.wait_s)} (compute.wait_for_nodes_s); run the same "
                "command again when they are there"
            )
        if now >= self._line_at:
            self._line_at = now + LINE_S
            self.note("waiting", f"{text}; waiting for {duration(left)} at most")

    def _missing(self, nodes: list[Node], away: list[str]) -> str:
        each = f"{self.layout.cpus_per_worker} CPU(s)"
        found = f"{sum(node.cpus for node in nodes)} CPU(s)"
        if self.layout.use_gpu:
            each += " and 1 GPU"
            found += f" and {sum(node.gpus for node in nodes)} GPU(s)"
        return (
            f"no room for {min(self.numbers)} worker(s){' on one node' if self.together else ''} "
            f"with {each} each: the cluster has {found} on {len(nodes)} node(s), some of them "
            "perhaps in use" + (f", without {', '.join(away)}" if away else "")
        )
