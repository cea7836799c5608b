"""Runs and sweeps with all steps of their commands, whose worker is this process, without Ray."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from orchestrator.cluster.layout import Node
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.jobs.sweep import SweepJob
from orchestrator.jobs.train import TrainJob
from orchestrator.runs import signals
from orchestrator.track.server import local_path
from orchestrator.track.tracker import Tracker
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker
from tests.helpers import stores
from tests.helpers.fixtures import SMALL, run_stages

RUN = ["name=run", "train.keep=2", "schedule.decay_steps=20", "compute.use_gpu=false"]


class LocalTrainJob(TrainJob):
    """A run that calls `act` with each line of its journal. Needs `without_ray`."""

    def __init__(self, experiment: Experiment, act=lambda line: None) -> None:
        super().__init__(experiment)
        self.act = act

    def connect(self):
        pass

    def work(self):
        worker = Worker(cpus=1)
        for line in Trainer(self.experiment, self.folder, self.dataset.directory, worker).run():
            self.act(line)


class LocalSweepJob(SweepJob):
    """A sweep, one stage after the other. Needs `without_ray`."""

    def connect(self):
        pass

    def work(self):
        run_stages(self.study.progress, cpus=self.study.layout.cpus_per_worker)


def _start_with_store(start: Callable[[Tracker], None]) -> Callable[[Tracker], None]:
    """Return `Tracker.start` with a copied database instead of a new one, which takes seconds."""

    def start_with_store(tracker: Tracker) -> None:
        database = local_path(tracker._projection.uri)
        if database is not None and not database.exists():
            stores.copy_empty(database)
        start(tracker)

    return start_with_store


@contextlib.contextmanager
def without_ray(cpus: int = 1) -> Iterator[None]:
    """Let the jobs above run on a cluster with these CPUs."""
    threads = torch.get_num_threads()
    numbers = (*signals.STOPS, signal.SIGINT, signal.SIGALRM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.cluster.layout.alive_nodes", lambda: [Node(cpus)])
        patch.setattr("orchestrator.track.sender.POLL_S", 0.1)
        patch.setattr(Tracker, "start", _start_with_store(Tracker.start))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.set_num_threads(threads)


def start(storage, tokens, steps=20, act=lambda line: None) -> int:
    """Train the run `storage/run` to this step. Return the exit status.

    `tokens` are the overrides of the corpus and its dataset.
    """
    words = [*SMALL, *RUN, f"storage={storage}", *tokens]
    experiment = load_experiment(None, [*words, f"train.max_steps={steps}"])
    return LocalTrainJob(experiment, act).run()
