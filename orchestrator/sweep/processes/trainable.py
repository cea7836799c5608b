"""What Ray Tune runs in the process of rank 0 of a stage."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orchestrator.sweep.processes import environment as environment  # before Tune is imported

# isort: split
import ray
from ray import tune
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from orchestrator import own_code
from orchestrator.cluster.layout import Layout
from orchestrator.runs import stop
from orchestrator.runs.journal import Line
from orchestrator.sweep.processes.away import place_of
from orchestrator.sweep.processes.desk import LostTurnError
from orchestrator.sweep.records import read_spec

if TYPE_CHECKING:
    from orchestrator.workers.crew import Crew

# Names in the results that a Tune scheduler compares.
METRIC = "val_loss"
TIME = "optimizer_step"
LOST = (RayActorError, ObjectLostError, LostTurnError)  # another process died: not the reason
PROBLEM = "problem"  # why a node cannot train a stage: it may not share the folder of the stage


def _ask(desk: Any, method: str, *args: Any) -> Any:
    """Call the desk; raise its error as it was."""
    try:
        return ray.get(getattr(desk, method).remote(*args))
    except RayTaskError as error:
        raise error.cause from None


class StageTrainable(tune.Trainable):
    """The process of rank 0. It runs one stage after the other with the same other workers."""

    def setup(
        self,
        config: dict[str, Any],
        folders: dict[str, Any],
        desk: Any,
        layout: Layout,
        code: list[own_code.Source],
        reported_metric: str | None,
    ) -> None:
        own_code.register(code)
        self.place = place_of(folders, desk and functools.partial(_ask, desk))
        self.sweep = self.place.sweep
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
            self.place.give_up()
            # If another rank died, the error only says that the connection to it was closed.
            if not (isinstance(error, LOST) or self._has_lost_a_peer()):
                from orchestrator.workers.process_group import worker_of

                self.place.failed(self.folder.name, worker_of(0, self.layout), error)
            self.place.close()  # Tune ends this process
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
            if not self.place.begin(self.folder.name):
                return True
            spec = read_spec(self.folder)
            self.last_step = 0 if spec is None else spec.stop
            self.lines = self.crew.run(run_stage, self.folder, self.stop_requested)
        for line in self.lines:
            if self.reported_metric not in line or line["step"] == 0:
                continue
            self.reported = {TIME: line["step"], METRIC: line[self.reported_metric]}
            # The scheduler may stop a stage at an evaluation that we report. The last one is
            # reported at the end of the stage, because the result is written after it.
            if line["step"] < self.last_step:
                self.place.sync()
                return False
        self.place.finish()
        return True

    def cleanup(self) -> None:
        self.stop_requested.close()
        self._abandon()
        self.place.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Do nothing: stages write their own checkpoints."""

    load_checkpoint = save_checkpoint

    def _begin(self, stage: str) -> None:
        self.folder = self.sweep.stage(stage)
        self.lines = None
        self.problem = self.place.problem(stage)
        self.stop_requested.close()
        self.stop_requested = stop.Listener(self.sweep)  # the old one knows the old request
        self.reported = {TIME: 0, METRIC: math.inf}

    def _abandon(self) -> None:
        """End a stage that the scheduler stopped, while its other ranks are in a step."""
        if self.lines is None or inspect.getgeneratorstate(self.lines) == inspect.GEN_CLOSED:  # type: ignore[arg-type]
            return
        self.lines.close()  # type: ignore[attr-defined]
        self.place.give_up()
        if self.crew is not None and self.crew.peers:
            self.crew.disband()
            self.crew = None
