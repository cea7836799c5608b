"""Ray Train's controller in this process, by private functions of Ray.

`tests/cluster/test_private.py` shows what an upgrade broke.
"""

import asyncio
import contextlib
import logging
from typing import Any

TASK_S = 1  # for a cancelled task to end


def fit_here(trainer: Any) -> None:
    """Train with a Ray Train trainer whose controller runs in this process.

    Ray itself runs the controller in an actor. The run would wait for that process, which imports
    Ray Train again. It would also wait for two callbacks that we do not need: one starts a process
    for Ray Data, and one removes the workers of a dead controller. Here they end with this process.
    At the end that one waits 10 s for an API server.

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
    trainer._initialize_and_run_controller = _control
    trainer.fit()


def _control(scaling_policy: Any, **arguments: Any) -> Any:
    """Start the workers of Ray Train and wait for them. Return Ray Train's result."""
    import ray
    from ray.runtime_context import RuntimeContext
    from ray.train.v2._internal.execution.controller import TrainController
    from ray.train.v2._internal.execution.worker_group import WorkerGroup

    class Workers(WorkerGroup):
        """Workers in the environment of the driver, so that they can be idle processes of it."""

        def _get_worker_runtime_env(self, custom_runtime_env: Any) -> Any:
            return custom_runtime_env

        def _start_impl(self, builder: Any) -> None:
            """Start the workers. After an interrupt, the controller does not know them yet."""
            try:
                super()._start_impl(builder)
            except KeyboardInterrupt:
                with contextlib.suppress(ray.exceptions.RayError):
                    (self.abort if self.has_started() else builder.shutdown)()
                raise

    class Controller(TrainController):
        worker_group_cls = Workers

    # It asks an actor of Ray Data for machines. The placement group of the workers asks, too.
    scaling_policy.after_controller_start = lambda _: None
    scaling_policy._maybe_send_resource_request = lambda: None
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
