"""The workers of a stage: this process is rank 0, and each other rank is an actor of Ray.

The actors run in the placement group of this process. So a stage has all of its resources, or it
waits without any. The process group of torch.distributed stays for the next stage.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator import own_code
from orchestrator.cluster import nodes
from orchestrator.cluster.layout import Layout
from orchestrator.errors import UserError
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Line
from orchestrator.workers import process_group
from orchestrator.workers.attempts import record_failure
from orchestrator.workers.process_group import worker_of

if TYPE_CHECKING:
    from orchestrator.train.numerics import Worker

DEATH_SHOWS_S = 5  # Ray notices a dead process in less time

# Trains the stage of a folder; all ranks call it. Yields the lines of its journal.
Train: TypeAlias = "Callable[[RunFolder, Worker, Callable[[], bool]], Iterator[Line]]"


class Crew:
    """The workers of a stage. They stay for the next stage.

    Create it before this process imports torch, which takes seconds: the other ranks then start
    and import it at the same time.

    Args:
        layout: Number of workers, and their resources.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.peers: list[Any] = []
        self.has_group = layout.num_workers == 1
        self.running: list[ray.ObjectRef] = []
        group = ray.util.get_current_placement_group()
        for rank in range(1, layout.num_workers):
            actor = ray.remote(_Peer).options(
                num_cpus=layout.cpus_per_worker,
                num_gpus=int(layout.use_gpu),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            )
            self.peers.append(actor.remote(rank, layout, own_code.sources()))

    def run(
        self, train: Train, folder: RunFolder, stop_requested: Callable[[], bool]
    ) -> Iterator[Line]:
        """Train a stage on all workers; yield the lines of its journal."""
        own = (socket.gethostname(), nodes.software())
        asked = [peer.problem.remote(folder.path, *own) for peer in self.peers]
        for problem in ray.get(asked):
            if problem is not None:
                raise UserError(problem)
        if not self.has_group:
            self._join()
        self.running = [peer.run.remote(train, folder.path) for peer in self.peers]
        yield from train(folder, worker_of(0, self.layout), stop_requested)
        ray.get(self.running)

    def _join(self) -> None:
        address = process_group.new_address()
        joining = [peer.join.remote(address) for peer in self.peers]
        process_group.join(address, 0, self.layout)
        ray.get(joining)
        self.has_group = True

    def has_lost_a_peer(self) -> bool:
        """Return whether another worker is dead. Call it after the stage has failed here."""
        if not self.running:
            return False
        ended, _ = ray.wait(self.running, num_returns=len(self.running), timeout=DEATH_SHOWS_S)
        for result in ended:
            try:
                ray.get(result)
            except ray.exceptions.RayActorError:
                return True
        return False

    def disband(self) -> None:
        """End the other workers and the process group."""
        for peer in self.peers:
            ray.kill(peer)
        process_group.leave()


class _Peer:
    """An actor for a rank other than 0."""

    def __init__(self, rank: int, layout: Layout, code: list[own_code.Source]) -> None:
        import orchestrator.train.loop  # noqa: F401 - at the same time as rank 0

        own_code.register(code)
        self.rank = rank
        self.layout = layout

    def join(self, address: str) -> None:
        process_group.join(address, self.rank, self.layout)

    def problem(self, path: Path, host: str, software: nodes.Software) -> str | None:
        try:
            nodes.require_software(host, software)
        except UserError as error:
            return str(error)
        return nodes.folder_problem(path)

    def run(self, train: Train, path: Path) -> None:
        folder = RunFolder(path)
        try:
            # `stop_requested` of rank 0 decides, but all ranks must pass a function.
            for _ in train(folder, worker_of(self.rank, self.layout), lambda: False):
                pass
        except Exception as error:
            record_failure(folder, worker_of(self.rank, self.layout), error)
            # The other ranks wait for this one until its connection closes.
            os._exit(1)
