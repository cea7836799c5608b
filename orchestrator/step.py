"""One optimizer update: micro-batches in, losses, gradient norm and moved weights out. What the hardware is for.

The loop, the benchmarks and later the stages of a sweep all make their updates here.

Legend: B sequences per micro-batch, T tokens per sequence, M micro-batches per step over all workers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from orchestrator.config import Experiment
from orchestrator.numerics import autocast, keyed_seed
from orchestrator.state import TrainState


class Step:
    """`gradient` and then, unless something is not finite, `update`; `state.step` counts the updates."""

    def __init__(self, experiment: Experiment, state: TrainState):
        self.experiment, self.state = experiment, state
        self.autocast = autocast(experiment, str(state.gradients.device))

    def gradient(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[list[float], float]:
        """Mean gradient over the step's M micro-batches, into every `param.grad`.

        Args:
            batches: this worker's micro-batches in order, (B, T) int64 inputs and targets on its device.

        Returns:
            The M losses (nats per token, in micro-batch order) and the gradient's norm before clipping: the same bits
            on every worker. Reading them is the step's only wait for the GPU.
        """
        s = self.state
        for slot in s.gradients.my_slots():
            s.gradients.begin_slot()
            for m in slot:
                s.meter.lap("rest")
                inputs, targets = next(batches)
                s.meter.lap("data")
                self._forward_backward(m, inputs, targets)
                s.meter.lap("compute")
            s.gradients.end_slot()
        losses = s.gradients.reduce()
        if s.scaler.is_enabled():
            s.scaler.unscale_(s.optimizer)
        *values, norm = torch.cat((losses, s.gradients.norm().view(1))).tolist()
        return values, norm

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

    def _forward_backward(self, m: int, inputs: Tensor, targets: Tensor) -> None:
        """Add the gradient of micro-batch m of this step."""
        s = self.state
        if self.experiment.model.dropout:
            torch.manual_seed(keyed_seed(self.experiment.train.seed, s.step, m))
        with self.autocast:
            _, loss = s.forward(inputs, targets)
        s.gradients.record_loss(m, loss)
        s.scaler.scale(loss).backward()
