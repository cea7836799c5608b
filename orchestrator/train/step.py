"""One optimizer update: micro-batches in, losses, gradient norm and moved weights out. What the hardware is for.

The loop, the benchmarks and the stages of a sweep all make their updates here.

Legend: B sequences per micro-batch, T tokens per sequence, M micro-batches per step over all workers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.config.experiment import Experiment
from orchestrator.train.numerics import autocast, keyed_seed
from orchestrator.train.state import TrainState


@dataclass(frozen=True)
class Gradient:
    """What a step's gradient was: the M losses (nats per token, in micro-batch order), its norm before clipping, and
    whether a worker asked all to stop after this step. The same bits on every worker."""

    losses: list[float]
    norm: float
    stop: bool


class Step:
    """`gradient` and then `update`, or `skip` where something is not finite; `state.step` counts the steps.

    Args:
        stop: asked in every step, on rank 0 alone: whether it is to be the last.
        beat: told when another phase begins, and the step (for a watchdog).
    """

    def __init__(
        self,
        experiment: Experiment,
        state: TrainState,
        stop: Callable[[], bool] = lambda: False,
        beat: Callable[[str, int], None] = lambda phase, step: None,
    ):
        self.experiment, self.state, self.stop, self.beat = experiment, state, stop, beat
        self.autocast = autocast(experiment, str(state.gradients.device))

    def gradient(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Gradient:
        """Mean gradient over the step's M micro-batches, into every `param.grad`.

        Reading what it returns is the step's only wait for the GPU.

        Args:
            batches: this worker's micro-batches in order, (B, T) int64 inputs and targets on its device.
        """
        s = self.state
        self.beat("gradient", s.step)
        for slot in s.gradients.my_slots():
            s.gradients.begin_slot()
            for m in slot:
                s.meter.lap("rest")
                inputs, targets = next(batches)
                s.meter.lap("data")
                self._forward_backward(m, inputs, targets)
                s.meter.lap("compute")
            if self.stop():
                s.gradients.vote()
            s.gradients.end_slot()
        self.beat("exchange", s.step)
        losses = s.gradients.reduce()
        if s.scaler.is_enabled():
            s.scaler.unscale_(s.optimizer)
        *values, votes, norm = torch.cat(
            (losses, s.gradients.votes().view(1), s.gradients.norm().view(1))
        ).tolist()
        self.beat("update", s.step)
        return Gradient(values, norm, votes > 0)

    def update(self, lr: float) -> None:
        """Clip, and let the optimizer move the weights at learning rate `lr`."""
        s, limit = self.state, self.experiment.optim.max_grad_norm
        if limit:
            s.gradients.clip(limit)
        for group in s.optimizer.param_groups:
            group["lr"] = lr
        s.scaler.step(s.optimizer)
        s.scaler.update()
        s.step += 1
        s.meter.lap("compute")

    def skip(self) -> None:
        """Leave the update out: weights and moments stay, and the next step has the next windows."""
        if self.state.scaler.is_enabled():
            self.state.scaler.update()  # forgets what it unscaled
        self.state.step += 1
        self.state.skipped += 1
        self.state.meter.lap("compute")

    def _forward_backward(self, m: int, inputs: Tensor, targets: Tensor) -> None:
        """Add the gradient of micro-batch m of this step."""
        s = self.state
        if self.experiment.model.dropout:
            torch.manual_seed(keyed_seed(self.experiment.train.seed, s.step, m))
        with self.autocast:
            _, loss = s.forward(inputs, targets)
        s.gradients.record_loss(m, loss)
        s.scaler.scale(loss).backward()
