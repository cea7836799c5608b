"""Ray Train's controller in this process, by private functions of Ray.

`tests/cluster/test_private.py` shows what an upgrade broke.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

from orchestrator.cluster.room import Room

TASK_S = 1  # for a cancelled task to end
SHUTDOWN_S = 2.0  # Ray's default of 5 is also waited for workers on a node that is gone


def fit_here(trainer: Any, room: Room) -> None:
    """Train with a Ray Train trainer whose controller runs in this process.

    `room` decides the number of workers at each start, and when there may be more.

    Ray itself runs the controller in an actor. The run would wait for that process, which imports
    Ray Train again. It would also wait for two callbacks that we do not need. `DatasetsCallback`
    starts a process for Ray Data. `PlacementGroupCleanerCallback` removes the workers of a dead
    controller, and waits 10 s for an API server at the end; here, workers end with this process.

    Raises:
        TrainingFailedError: The workers failed too often; see the configuration of the trainer.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    create_callbacks = trainer._create_default_callbacks
    # Errors of workers are raised, and we print them.
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    superfluous = DatasetsCallback, PlacementGroupCleanerCallback

    def create_needed() -> list[Any]:
        return [one for one in create_callbacks() if not isinstance(one, superfluous)]

    trainer._create_default_callbacks = create_needed
    trainer._initialize_and_run_controller = functools.partial(_control, room)
    with _rank_0_here():
        trainer.fit()


@contextlib.contextmanager
def _rank_0_here() -> Iterator[None]:
    """Let rank 0 be on this machine, if a worker is: the others may not have its folder."""
    import ray
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

    by_node = WorkerGroup._sort_workers_by_gpu_id_grouped_by_node
    from_here = functools.partial(by_node, _first_id=ray.get_runtime_context().get_node_id())
    WorkerGroup._sort_workers_by_gpu_id_grouped_by_node = staticmethod(from_here)
    try:
        yield
    finally:
        WorkerGroup._sort_workers_by_gpu_id_grouped_by_node = staticmethod(by_node)


def _control(room: Room, scaling_policy: Any, **arguments: Any) -> Any:
    """Start the workers of Ray Train and wait for them. Return Ray Train's result."""
    import ray
    from ray.runtime_context import RuntimeContext
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
    from ray.train.v2._internal.execution.worker_group import WorkerGroup, state

    class Workers(WorkerGroup):
        """Workers in the environment of the driver, so that they can be idle processes of it."""

        def _get_worker_runtime_env(self, custom_runtime_env: Any) -> Any:
            return custom_runtime_env

        def _start_impl(self, builder: Any) -> None:
            """Start the workers. After an error, the controller does not know them."""
            try:
                super()._start_impl(builder)
                room.started()
            except (KeyboardInterrupt, ray.exceptions.RayActorError) as error:
                with contextlib.suppress(ray.exceptions.RayError):
                    (self.abort if self.has_started() else builder.shutdown)()
                if isinstance(error, KeyboardInterrupt):
                    raise
                # Ray Train would start them again, but not after a loss at the end of their start.
                raise WorkerGroupStartupFailedError(str(error)) from error

    class Controller(TrainController):
        worker_group_cls = Workers

    def resized(number: int | None) -> Any:
        if number is None:
            return NoopDecision()
        return ResizeDecision(number, scaling_policy.scaling_config._resources_per_worker_not_none)

    state._shutdown_workers.__defaults__ = (SHUTDOWN_S,)
    # Ray's own policy asks an actor of Ray Data for machines. The placement group of the workers
    # asks, too.
    scaling_policy.after_controller_start = lambda _: None
    scaling_policy.make_decision_for_non_running_worker_group = lambda: resized(room.choose())
    scaling_policy.make_decision_for_running_worker_group = lambda worker_group_state, **_: resized(
        room.larger(worker_group_state.num_workers)
    )
    current_actor = RuntimeContext.current_actor
    # Workers get it for `ray.train.report`, which we do not use.
    RuntimeContext.current_actor = None
    controller = Controller(scaling_policy=scaling_policy, **arguments)
    loop = asyncio.new_event_loop()
    running = loop.create_task(controller.run())
    try:
        loop.run_until_complete(running)
    except KeyboardInterrupt:
        _end_workers(controller)
        raise
    finally:
        _end_task(running, loop)
        RuntimeContext.current_actor = current_actor
    return controller.get_result()


def _end_task(task: asyncio.Task[None], loop: asyncio.AbstractEventLoop) -> None:
    """End a task that may have been interrupted, and its loop."""
    task.cancel()
    # An interrupt can take a wake-up of the task with it. The task then never ends.
    loop.run_until_complete(asyncio.wait([task], timeout=TASK_S))
    if task.done() and not task.cancelled():
        task.exception()  # asyncio would print an exception that is not retrieved
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it would be printed, too
    loop.close()


def _end_workers(controller: Any) -> None:
    import ray

    workers = controller.get_worker_group()
    if workers is not None:
        with contextlib.suppress(ray.exceptions.RayError):
            workers.abort()
