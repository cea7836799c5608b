"""The workers of a stage: this process is rank 0, and each other rank is an actor of Ray.

The actors run in the placement group of this process. So a stage has all of its resources, or it
waits without any. The process group of torch.distributed stays for the next stage.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.cluster.layout import Layout
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Line
from orchestrator.train.numerics import Worker
from orchestrator.workers import process_group
from orchestrator.workers.attempts import record_failure
from orchestrator.workers.process_group import worker_of

DEATH_SHOWS_S = 5  # Ray notices a dead process in less time

Train: TypeAlias = Callable[[RunFolder, Worker, Callable[[], bool]], Iterator[Line]]


class Crew:
    """The workers of a stage. They stay for the next stage.

    Args:
        layout: Number of workers, and their resources.
        train: Trains the stage of a folder; all ranks call it. Yields the lines of its journal.
    """

    def __init__(self, layout: Layout, train: Train) -> None:
        self.layout = layout
        self.train = train
        self.peers: list[Any] = []
        self.running: list[ray.ObjectRef] = []
        if layout.num_workers > 1:
            self._start_peers()

    def _start_peers(self) -> None:
        group = ray.util.get_current_placement_group()
        for rank in range(1, self.layout.num_workers):
            actor = ray.remote(_Peer).options(
                num_cpus=self.layout.cpus_per_worker,
                num_gpus=int(self.layout.use_gpu),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            )
            self.peers.append(actor.remote(rank, self.layout, self.train))
        address = process_group.new_address()
        joining = [peer.join.remote(address) for peer in self.peers]
        process_group.join(address, 0, self.layout)
        ray.get(joining)

    def run(self, folder: RunFolder, stop_requested: Callable[[], bool]) -> Iterator[Line]:
        """Train a stage on all workers; yield the lines of its journal."""
        self.running = [peer.run.remote(folder.path) for peer in self.peers]
        yield from self.train(folder, worker_of(0, self.layout), stop_requested)
        ray.get(self.running)

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

    def __init__(self, rank: int, layout: Layout, train: Train) -> None:
        self.rank = rank
        self.layout = layout
        self.train = train

    def join(self, address: str) -> None:
        process_group.join(address, self.rank, self.layout)

    def run(self, path: Path) -> None:
        folder = RunFolder(path)
        try:
            # `stop_requested` of rank 0 decides, but all ranks must pass a function.
            for _ in self.train(folder, worker_of(self.rank, self.layout), lambda: False):
                pass
        except Exception as error:
            record_failure(folder, worker_of(self.rank, self.layout), error)
            # The other ranks wait for this one until its connection closes.
            os._exit(1)
