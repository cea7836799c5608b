"""Run a tree of stages with Ray Tune. Each stage is a Tune trial and starts after its parent.

The configuration of a Tune trial is only the id of its stage. Everything else is in `stages/<id>/`:
Tune stores no checkpoints and is never restored. `_StageSearcher` suggests stages that may start. A
process runs one stage after the other. With several workers, the process of the trial is rank 0,
and the other ranks are actors in its placement group. So a stage either has all of its resources,
or it waits and holds none.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ENVIRONMENT = {  # Tune reads these when it is imported
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # so that Ctrl-C raises KeyboardInterrupt in fit()
}
for _key, _value in ENVIRONMENT.items():
    os.environ.setdefault(_key, _value)

from ray import tune  # noqa: E402
from ray.exceptions import RayActorError  # noqa: E402
from ray.tune.schedulers import ASHAScheduler  # noqa: E402
from ray.tune.search import Searcher  # noqa: E402

from orchestrator import own_code  # noqa: E402
from orchestrator.cluster import calls  # noqa: E402
from orchestrator.cluster.layout import Layout, cluster_grows  # noqa: E402
from orchestrator.cluster.nodes import folder_problem  # noqa: E402
from orchestrator.cluster.room import LOOK_S, Room, WaitedTooLongError  # noqa: E402
from orchestrator.runs import events, stop  # noqa: E402
from orchestrator.runs.folder import SweepFolder  # noqa: E402
from orchestrator.runs.journal import Line  # noqa: E402
from orchestrator.sweep.progress import Progress  # noqa: E402
from orchestrator.sweep.records import read_spec  # noqa: E402
from orchestrator.sweep.study import Study  # noqa: E402
from orchestrator.workers.attempts import record_failure  # noqa: E402

if TYPE_CHECKING:
    from orchestrator.workers.crew import Crew

# Names in the results that a Tune scheduler compares.
METRIC = "val_loss"
TIME = "optimizer_step"
PROBLEM = "problem"  # why a node cannot train a stage: it may not share the folder of the stage

MOST_STAGES = 1_000_000  # at the same time
ASHA_REDUCTION = 3  # of three trials that reach a rung of asha, one goes on


def execute(study: Study, slots: int) -> None:
    """Run stages until none is left. A stage that fails does not end the others.

    After a stop request in the folder of the sweep, stages end after their step and none starts.

    Args:
        study: The sweep.
        slots: Number of stages that the cluster can run at the same time when the sweep starts.
    """
    room = Room(
        study.layout,
        [study.layout.num_workers],
        study.sweep.base.compute.wait_for_nodes_s,
        newest_step=lambda: 0,
        stop_requested=lambda: stop.requested(study.folder),
        note=lambda kind, message: print(events.note(study.folder, kind, message)["message"]),
    )
    searcher = _StageSearcher(study.progress, slots)
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    scheduler = _asha(study)
    trainable = tune.with_parameters(
        StageTrainable,
        folder=study.folder.path,
        layout=study.layout,
        code=own_code.sources(),
        reported_metric=None if scheduler is None else study.metric,
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, _resources(study.layout)),
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


def _resources(layout: Layout) -> tune.PlacementGroupFactory:
    """Return one bundle for each worker of a stage."""
    bundle: dict[str, float] = {"CPU": layout.cpus_per_worker}
    if layout.use_gpu:
        bundle["GPU"] = 1
    return tune.PlacementGroupFactory([bundle] * layout.num_workers)


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

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self.progress.tick()
        if time.monotonic() > self.look_at:
            self.look_at = time.monotonic() + LOOK_S
            groups = self.room.groups()
            # On a cluster that grows, machines are added for stages that wait.
            if self.groups is not None and not cluster_grows():
                self.searcher.slots += groups - self.groups
            self.groups = groups


class StageTrainable(tune.Trainable):
    """The process of rank 0, which runs one stage after the other. It keeps its other workers."""

    def setup(
        self,
        config: dict[str, Any],
        folder: Path,
        layout: Layout,
        code: list[own_code.Source],
        reported_metric: str | None,
    ) -> None:
        own_code.register(code)
        self.sweep = SweepFolder(folder)
        self.layout = layout
        self.reported_metric = reported_metric
        self.stop_requested = stop.Listener(self.sweep)
        self.crew: Crew | None = None
        self.lines: Iterator[Line] | None = None
        self.reported: dict[str, Any] = {}
        self._begin(config["stage"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._abandon()
        self._begin(new_config["stage"])
        return True

    def step(self) -> dict[str, Any]:
        """Train to the end of the stage or, if a metric is reported, to the next evaluation."""
        if self.lines is None and stop.requested(self.sweep):
            return {**self.reported, "done": True}
        if self.problem is not None:
            return {**self.reported, "done": True, PROBLEM: self.problem}
        try:
            is_over = self._train()
        except Exception as error:
            # If another rank died, this is only the closed connection to it.
            if not (isinstance(error, RayActorError) or self._has_lost_a_peer()):
                from orchestrator.workers.process_group import worker_of

                record_failure(self.folder, worker_of(0, self.layout), error)
            raise
        return {**self.reported, "done": True} if is_over else self.reported

    def _has_lost_a_peer(self) -> bool:
        return self.crew is not None and self.crew.has_lost_a_peer()

    def _train(self) -> bool:
        """Return True at the end of the stage, False at an evaluation before it."""
        if self.crew is None:
            from orchestrator.workers.crew import Crew

            self.crew = Crew(self.layout)
        # Only the workers import torch.
        from orchestrator.sweep.stage import run_stage

        if self.lines is None:
            self.lines = self.crew.run(run_stage, self.folder, self.stop_requested)
        for line in self.lines:
            if self.reported_metric not in line or line["step"] == 0:
                continue
            self.reported = {TIME: line["step"], METRIC: line[self.reported_metric]}
            # The scheduler may stop a stage at an evaluation that we report. The last one is
            # reported at the end of the stage, because the result is written after it.
            if line["step"] < self.last_step:
                return False
        return True

    def cleanup(self) -> None:
        self.stop_requested.close()
        self._abandon()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: stages write their own checkpoints."""

    load_checkpoint = save_checkpoint

    def _begin(self, stage: str) -> None:
        self.folder = self.sweep.stage(stage)
        self.lines = None
        self.problem = folder_problem(self.folder.path)
        spec = read_spec(self.folder)
        self.last_step = 0 if spec is None else spec.stop
        self.reported = {TIME: 0, METRIC: math.inf}

    def _abandon(self) -> None:
        """End a stage that the scheduler stopped, while its other ranks are in a step."""
        if self.lines is None or inspect.getgeneratorstate(self.lines) == inspect.GEN_CLOSED:  # type: ignore[arg-type]
            return
        self.lines.close()  # type: ignore[attr-defined]
        if self.crew is not None and self.crew.peers:
            self.crew.disband()
            self.crew = None
