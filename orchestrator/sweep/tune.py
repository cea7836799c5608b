"""Run a tree of stages with Ray Tune. Each stage is a Tune trial and starts after its parent.

The configuration of a Tune trial is only the id of its stage. Everything else is in `stages/<id>/`:
Tune stores no checkpoints and is never restored. `_StageSearcher` suggests stages that may start. A
process runs one stage after the other. With several workers, the process of the trial is rank 0,
and the other ranks are actors in its placement group. So a stage either has all of its resources,
or it waits and holds none.
"""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from orchestrator.sweep.processes import environment as environment  # before Tune is imported

# isort: split
import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator import own_code
from orchestrator.cluster import calls
from orchestrator.cluster.layout import Layout, cluster_grows
from orchestrator.cluster.room import LOOK_S, Room, WaitedTooLongError
from orchestrator.objects.address import Address
from orchestrator.runs import events, stop
from orchestrator.runs.folder import SweepFolder
from orchestrator.sweep.processes.desk import Desk
from orchestrator.sweep.processes.trainable import METRIC, PROBLEM, TIME, StageTrainable
from orchestrator.sweep.progress import Progress
from orchestrator.sweep.study import Study
from orchestrator.workers import places

START_S = 20.0  # longest start of a process; then another job seems to use the room
DESK_CALLS = 100  # of stages on other machines at the same time
MOST_STAGES = 1_000_000  # at the same time
ASHA_REDUCTION = 3  # of three trials that reach a rung of asha, one goes on


def execute(study: Study, slots: int, mirror: Address | None = None) -> None:
    """Run stages until none is left. A stage that fails does not end the others.

    After a stop request in the folder of the sweep, stages end after their step and none starts.

    Args:
        study: The sweep.
        slots: Number of stages that the cluster can run at the same time when the sweep starts.
        mirror: Where nodes find the tokens that do not share the folder of the sweep; None: all
            nodes share it.
    """
    room = Room(
        study.layout,
        [study.layout.num_workers],
        study.sweep.base.compute.wait_for_nodes_s,
        newest_step=lambda: 0,
        stop_requested=lambda: stop.requested(study.folder),
        note=lambda kind, message: print(events.note(study.folder, kind, message)["message"]),
        together=mirror is not None,
    )
    searcher = _StageSearcher(study.progress, slots)
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    scheduler = _asha(study)
    trainable = tune.with_parameters(
        StageTrainable,
        folders=places.of_driver(study.folder, Path(), mirror),
        desk=None if mirror is None else _desk(study.folder),
        layout=study.layout,
        code=own_code.sources(),
        reported_metric=None if scheduler is None else study.metric,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, _resources(study.layout, together=mirror is not None)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            max_concurrent_trials=MOST_STAGES,  # the searcher knows how many have room
            reuse_actors=True,  # starting a process takes seconds
            scheduler=scheduler,
            trial_name_creator=_trial_id,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=str(study.folder.tune_scratch),
            verbose=0,
            callbacks=[_Ticks(study.progress, searcher, room)],
            failure_config=tune.FailureConfig(max_failures=0, fail_fast=False),
        ),
    )
    try:
        calls.interruptibly(tuner.fit)
    except WaitedTooLongError as error:
        if stop.requested(study.folder) is None:
            stop.request(study.folder, str(error))
    finally:
        shutil.rmtree(study.folder.tune_scratch, ignore_errors=True)


def _desk(folder: SweepFolder) -> Any:
    """Start the desk on this machine."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(Desk).options(
        num_cpus=0, max_restarts=-1, max_concurrency=DESK_CALLS, scheduling_strategy=here
    )
    return actor.remote(folder.path, own_code.sources())


def _resources(layout: Layout, together: bool) -> tune.PlacementGroupFactory:
    """Return one bundle for each worker of a stage; `together`: all on one node."""
    bundle: dict[str, float] = {"CPU": layout.cpus_per_worker}
    if layout.use_gpu:
        bundle["GPU"] = 1
    bundles = [bundle] * layout.num_workers
    return tune.PlacementGroupFactory(bundles, strategy="STRICT_PACK" if together else "PACK")


def _asha(study: Study) -> ASHAScheduler | None:
    """Return Tune's scheduler that stops trials, if `sweep.stop` is asha."""
    if study.sweep.settings.stop != "asha":
        return None
    longest = max(trial.branch.steps for trial in study.trials.values())
    return ASHAScheduler(
        time_attr=TIME,
        metric=METRIC,
        mode="min",
        max_t=longest,
        grace_period=asha_first_rung(longest, study.sweep.base.train.eval_interval),
        reduction_factor=ASHA_REDUCTION,
    )


def asha_first_rung(longest: int, eval_interval: int | None) -> int:
    """Return the first step at which asha compares trials.

    The rungs are a ninth, a third and the whole of the longest trial. The first rung is not before
    the first evaluation.
    """
    return min(max(eval_interval or 1, longest // 9), longest)


def _trial_id(trial: Any) -> str:
    return trial.trial_id


class _StageSearcher(Searcher):
    """Suggests the stages that may start. It ends the search if none is ready and none runs."""

    def __init__(self, progress: Progress, slots: int) -> None:
        super().__init__()
        self.progress = progress
        self.slots = slots
        self.running: dict[str, str] = {}  # stage of each Tune trial

    def suggest(self, trial_id: str) -> dict[str, str] | str | None:
        if len(self.running) >= self.slots:
            return None  # Tune cannot take back a stage
        stage = self.progress.next()
        if stage is None:
            return None if self.running else Searcher.FINISHED
        self.running[trial_id] = stage
        return {"stage": stage}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        problem = (result or {}).get(PROBLEM)
        self.progress.ended(self.running.pop(trial_id), error, problem)

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the stages are on disk."""

    restore = save


class _Ticks(tune.Callback):
    """Calls `Progress.tick` in Tune's loop, and follows the room for stages."""

    def __init__(self, progress: Progress, searcher: _StageSearcher, room: Room) -> None:
        self.progress = progress
        self.searcher = searcher
        self.room = room
        self.groups: int | None = None
        self.look_at = 0.0
        self.moved_at = time.monotonic()  # when a stage last ran, or none waited

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.progress.tick()
        now = time.monotonic()
        statuses = {trial.status for trial in trials}
        if Trial.RUNNING in statuses or Trial.PENDING not in statuses:
            self.moved_at = now
        if now > self.look_at:
            self.look_at = now + LOOK_S
            groups = self.room.groups(none_starts=now - self.moved_at > START_S)
            # On a cluster that grows, machines are added for stages that wait.
            if self.groups is not None and not cluster_grows():
                self.searcher.slots += groups - self.groups
            self.groups = groups
