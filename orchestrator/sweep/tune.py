"""Ray Tune executes a tree of stages: each stage is a Tune trial that a searcher releases once its parent is done.

Eats `Work` (what may start, what has ended) and the folder of the stages; yields when nothing is left. A Tune trial's
configuration is its stage's id alone, all else lies in `stages/<id>/`, which is the truth: Tune keeps no checkpoints and
is never restored. Processes are reused from stage to stage. Of several workers the trial's own process is rank 0 and the
others are actors in its placement group, so a stage has all of its resources or waits without any.
"""

import contextlib
import inspect
import logging
import math
import os
import shutil
import traceback
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

ENVIRONMENT = {  # read when Tune is imported
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the table is ours
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C comes out of fit() as what it is
}
for _key, _value in ENVIRONMENT.items():
    os.environ.setdefault(_key, _value)

import ray  # noqa: E402
from ray import tune  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: E402

from orchestrator.cluster.layout import COLLECTIVE_TIMEOUT_S, Layout  # noqa: E402
from orchestrator.files import write_atomically  # noqa: E402
from orchestrator.runs import stop  # noqa: E402
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep.stage import read_order, run_stage  # noqa: E402
from orchestrator.train.numerics import Worker  # noqa: E402

METRIC, TIME = "val_loss", "optimizer_step"  # of the results that a Tune scheduler sees
DEATH_SHOWS_S = 5  # Ray notices a dead process in less


class Work(Protocol):
    """What the tree's keeper answers to the searcher."""

    def next(self) -> str | None:
        """Id of a stage that may start now, whose stage.json stands; it counts as started. None: none is ready."""

    def ended(self, stage: str, died: bool) -> None:
        """The stage's trial is over; `died`: with an exception or its process."""

    def tick(self) -> None:
        """Called several times a second."""


def execute(
    work: Work,
    stages: Path,
    layout: Layout,
    slots: int,
    asha: dict[str, Any] | None = None,
    reuse: bool = True,
) -> None:
    """Run stages until `work` has none; failed ones end nothing but themselves.

    Asked to stop (`stopping`, in the folder above `stages`), those that run end after their step, and none begins.

    Args:
        slots: how many stages the cluster holds at a time. A suggested stage is fixed, so none is suggested earlier.
        asha: arguments of Tune's ASHAScheduler (`max_t`, `grace_period` …) and the `metric` of the journal that it judges by;
            then a stage reports each of its evaluations.
        reuse: run stage after stage in one process; False: each in a new one, which costs seconds and changes no bit.
    """
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    scratch = stages.parent / ".tune"
    bundle = {"CPU": layout.cpus_per_worker, **({"GPU": 1} if layout.use_gpu else {})}
    trainable = tune.with_parameters(
        StageTrainable, stages=str(stages), layout=layout, reports=asha and asha["metric"]
    )
    rungs = {key: value for key, value in (asha or {}).items() if key != "metric"}
    scheduler = tune.schedulers.ASHAScheduler(TIME, METRIC, "min", **rungs) if asha else None
    tuner = tune.Tuner(
        tune.with_resources(trainable, tune.PlacementGroupFactory([bundle] * layout.num_workers)),
        tune_config=tune.TuneConfig(
            search_alg=_Gate(work),
            num_samples=-1,
            max_concurrent_trials=slots,
            reuse_actors=reuse,
            scheduler=scheduler,
            trial_name_creator=lambda trial: trial.trial_id,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=str(scratch),
            verbose=0,
            callbacks=[_Ticks(work)],
            failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Gate(Searcher):
    """Suggests what may start. With nothing ready and nothing running the search is over."""

    def __init__(self, work: Work):
        super().__init__()
        self.work, self.running = work, {}

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        stage = self.work.next()
        if stage is None:
            return None if self.running else Searcher.FINISHED
        self.running[trial_id] = stage
        return {"stage": stage}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        self.work.ended(self.running.pop(trial_id), error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the folder of the stages is the truth."""

    restore = save


class _Ticks(tune.Callback):
    def __init__(self, work: Work):
        self.work = work

    def on_step_end(self, iteration: int, trials: list, **_) -> None:
        self.work.tick()


class StageTrainable(tune.Trainable):
    """Rank 0 of stage after stage; the crew of its other workers and their process group outlive a stage."""

    def setup(
        self, config: dict[str, Any], stages: str, layout: Layout, reports: str | None
    ) -> None:
        self.stages, self.layout, self.reports, self.crew, self.run = (
            Path(stages),
            layout,
            reports,
            None,
            None,
        )
        self.stop_asked = stop.Listener(RunFolder(self.stages.parent))
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._abandon()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """To the end of the stage or, where results are reported, to its next evaluation."""
        if self.run is None and stop.requested(RunFolder(self.stages.parent)):
            return {**self.last, "done": True}
        try:
            self.crew = self.crew or Crew(self.layout)
            self.run = self.run or self.crew.run(self.folder, self.stop_asked)
            for line in self.run:
                # The last evaluation is the end: a scheduler must not stop the stage before its result is written.
                if self.reports in line and line["step"]:
                    self.last = {TIME: line["step"], METRIC: line[self.reports]}
                    if line["step"] < self.stop:
                        return self.last
        except Exception as error:
            # Where a peer died this is the echo, a closed connection; the peer has left its own word, or was killed.
            if not (self.crew and self.crew.has_lost_a_peer()):
                write_atomically(
                    self.folder / "failure-rank0.txt", "".join(traceback.format_exception(error))
                )
            raise
        return {**self.last, "done": True}

    def cleanup(self) -> None:
        self.stop_asked.close()
        self._abandon()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: stages commit their own."""

    load_checkpoint = save_checkpoint

    def _begin(self, config: dict[str, Any]) -> None:
        self.folder, self.run = self.stages / config["stage"], None
        self.stop, self.last = read_order(self.folder).stop, {TIME: 0, METRIC: math.inf}

    def _abandon(self) -> None:
        """A stage that a scheduler stopped leaves peers in the middle of a step: they go."""
        if self.run is None or inspect.getgeneratorstate(self.run) == inspect.GEN_CLOSED:
            return
        self.run.close()
        if self.crew.peers:
            self.crew.disband()
            self.crew = None


class Crew:
    """The workers of one placement group: this process as rank 0, and an actor for each other rank."""

    def __init__(self, layout: Layout):
        self.layout, self.peers, self.theirs = layout, [], []
        if layout.num_workers > 1:
            self._assemble()

    def _assemble(self) -> None:
        group, gpus = ray.util.get_current_placement_group(), int(self.layout.use_gpu)
        peer = ray.remote(_Peer)
        for rank in range(1, self.layout.num_workers):
            place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
            options = {
                "num_cpus": self.layout.cpus_per_worker,
                "num_gpus": gpus,
                "scheduling_strategy": place,
            }
            self.peers.append(peer.options(**options).remote())
        address = f"tcp://{ray.util.get_node_ip_address()}:{_free_port()}"
        joined = [p.join.remote(address, rank, self.layout) for rank, p in enumerate(self.peers, 1)]
        _join(address, 0, self.layout)
        ray.get(joined)

    def run(self, folder: Path, stop_asked: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """The lines of the stage, while every worker runs it."""
        self.theirs = [p.run.remote(str(folder)) for p in self.peers]
        yield from run_stage(folder, _worker(0, self.layout), stop_asked)
        ray.get(self.theirs)

    def has_lost_a_peer(self) -> bool:
        """Whether a worker of the stage that just failed is dead; one that only waits for this process is not."""
        if not self.theirs:
            return False
        over, _ = ray.wait(self.theirs, num_returns=len(self.theirs), timeout=DEATH_SHOWS_S)
        for peer in over:
            try:
                ray.get(peer)
            except ray.exceptions.RayActorError:
                return True
        return False

    def disband(self) -> None:
        import torch.distributed as dist

        for peer in self.peers:
            ray.kill(peer)
        dist.destroy_process_group()


class _Peer:
    """A worker that is not rank 0."""

    def join(self, address: str, rank: int, layout: Layout) -> None:
        self.rank, self.layout = rank, layout
        _join(address, rank, layout)

    def run(self, folder: str) -> None:
        try:
            for _ in run_stage(Path(folder), _worker(self.rank, self.layout), lambda: False):
                pass
        except Exception as error:
            write_atomically(
                Path(folder) / f"failure-rank{self.rank}.txt",
                "".join(traceback.format_exception(error)),
            )
            os._exit(
                1
            )  # the others stand in a collective: a closed connection ends their wait, an exception here does not


def _join(address: str, rank: int, layout: Layout) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if layout.use_gpu else "gloo",
        init_method=address,
        rank=rank,
        world_size=layout.num_workers,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )


def _worker(rank: int, layout: Layout) -> Worker:
    # Ray shows a worker its own GPU alone.
    return Worker(
        rank, layout.num_workers, "cuda:0" if layout.use_gpu else "cpu", layout.cpus_per_worker
    )


def _free_port() -> int:
    import socket

    with contextlib.closing(socket.socket()) as s:
        s.bind(("", 0))
        return s.getsockname()[1]
