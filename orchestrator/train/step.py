"""One optimizer step: forward, backward, sum over all ranks, update of the weights.

The training loop, the stages of a sweep, the cost estimate and the benchmarks all use `Step`.

Notation: B sequences per micro-batch, T tokens per sequence, M micro-batches per step (all ranks).
"""

import hashlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.optim import momentum_at
from orchestrator.config.experiment import Experiment
from orchestrator.data.batches import Batches, Prefetcher
from orchestrator.train.gradients import Gradients
from orchestrator.train.numerics import autocast, keyed_seed, seed_device
from orchestrator.train.state import TrainState

PROOF_LR = 1e-3  # not a rate of the schedule: a trial may start from a run with another schedule
MicroBatch = tuple[Tensor, Tensor]  # inputs and targets, (B, T) int64 each


@dataclass(frozen=True)
class Gradient:
    """Result of `Step.gradient`, with the same bits on all ranks.

    Attributes:
        losses: M losses in nats per token, in micro-batch order.
        norm: L2 norm before clipping.
        stop: A rank asked all ranks to stop after this step.
    """

    losses: list[float]
    norm: float
    stop: bool


class Step:
    """Makes optimizer steps: call `gradient`, then `update` or `skip`.

    Args:
        experiment: The configuration.
        state: State that the steps change.
        stop_requested: Called once per slot. If it returns True, all ranks stop after this step.
        report_phase: Called with (phase, step) when a phase of the step starts.
    """

    def __init__(
        self,
        experiment: Experiment,
        state: TrainState,
        stop_requested: Callable[[], bool] | None = None,
        report_phase: Callable[[str, int], None] | None = None,
    ) -> None:
        self.experiment = experiment
        self.state = state
        self.stop_requested = stop_requested or _never_stop
        self.report_phase = report_phase or ignore_phase
        self.autocast = autocast(experiment, str(state.gradients.device))

    def gradient(self, batches: Iterator[MicroBatch]) -> Gradient:
        """Compute the mean gradient of M micro-batches into the `grad` of every parameter.

        Reading the result is the only point of a step at which the CPU waits for the GPU.

        Args:
            batches: The micro-batches of this rank, in order and on its device.
        """
        state = self.state
        gradients = state.gradients
        self.report_phase("gradient", state.step)
        for slot in gradients.my_slots():
            gradients.begin_slot()
            for micro_batch in slot:
                state.meter.lap("rest")
                inputs, targets = next(batches)
                state.meter.lap("data")
                self._forward_backward(micro_batch, inputs, targets)
                state.meter.lap("compute")
            if self.stop_requested():
                gradients.vote()
            gradients.end_slot()

        self.report_phase("exchange", state.step)
        losses = gradients.reduce()
        if state.scaler.is_enabled():
            state.scaler.unscale_(state.optimizer)
        votes = gradients.votes().view(1)
        norm = gradients.norm().view(1)
        *loss_values, vote_count, norm_value = torch.cat((losses, votes, norm)).tolist()
        self.report_phase("update", state.step)
        return Gradient(loss_values, norm_value, vote_count > 0)

    def update(self, lr: float) -> None:
        """Clip the gradient and update the weights with learning rate `lr`."""
        state = self.state
        self._apply(lr, state.scaler)
        state.scaler.update()
        state.step += 1
        state.meter.lap("compute")

    def _apply(self, lr: float, scaler: torch.amp.GradScaler) -> None:
        optimizer = self.state.optimizer
        max_norm = self.experiment.optim.max_grad_norm
        if max_norm:
            self.state.gradients.clip(max_norm)
        section = self.experiment.optim
        momentum = momentum_at(section.momentum, section.momentum_warmup_steps, self.state.step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
            if "momentum" in group:
                group["momentum"] = momentum
        scaler.step(optimizer)

    def skip(self) -> None:
        """Count a step without an update: weights and moments stay as they are."""
        state = self.state
        if state.scaler.is_enabled():
            state.scaler.update()  # allows the scaler to unscale the next gradient
        state.step += 1
        state.skipped += 1
        state.meter.lap("compute")

    def proof(self, batches: Batches) -> str:
        """Return a hash of what the next step computes. The state stays as it is.

        It is the SHA-256 of the loss and the clipped gradient of the next step's first micro-batch,
        and of an update of the smallest parameter of each group: the same code, on the same
        weights, as in the step.

        Args:
            batches: Micro-batches of all ranks.
        """
        gradients = self.state.gradients
        device = gradients.device
        arrays = batches.micro_batch(self.state.step, 0)
        inputs, targets = (torch.from_numpy(array).to(device) for array in arrays)
        buffers = [(buffer, buffer.clone()) for buffer in self.state.model.buffers()]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            gradients.begin_slot()  # the next step begins with zeros as well
            self._forward_backward(0, inputs, targets)
        for buffer, before in buffers:
            buffer.copy_(before)
        norm = gradients.norm().view(1)
        updated = self._updated_copies()
        used = gradients.current.flat[: gradients.n_params + 1]  # the gradient and the loss
        result = torch.cat((used, norm, *updated)).cpu()
        return hashlib.sha256(result.numpy().data).hexdigest()

    @torch.no_grad()
    def _updated_copies(self) -> list[Tensor]:
        """Update copies of some parameters of each group; return the copies, flat.

        The smallest one is enough where each number is updated by itself. Matrices that Muon
        updates meet other kernels if they have another shape, so there is one of each shape.
        """
        optimizer = self.state.optimizer
        groups = optimizer.param_groups
        copies = []
        trial = []
        for group in groups:
            chosen = list({param.shape: param for param in group["params"]}.values())
            if not group.get("muon"):
                chosen = sorted(group["params"], key=Tensor.numel)[:1]
            updated = [self._copy_with_state(param) for param in chosen]
            copies += updated
            trial.append({**group, "params": updated})
        optimizer.param_groups = trial
        try:
            scaler = torch.amp.GradScaler(self.state.gradients.device.type, enabled=False)
            self._apply(PROOF_LR, scaler)
        finally:
            optimizer.param_groups = groups
            for copy in copies:
                del optimizer.state[copy]
        return [copy.view(-1) for copy in copies]

    def _copy_with_state(self, param: Tensor) -> Tensor:
        """Return a copy that has the gradient and a copy of the optimizer's state."""
        state = self.state.optimizer.state
        copy = param.clone()
        copy.grad = param.grad
        state[copy] = {key: value.clone() for key, value in state.get(param, {}).items()}
        return copy

    def _forward_backward(self, micro_batch: int, inputs: Tensor, targets: Tensor) -> None:
        """Add the gradient of one micro-batch of this step."""
        state = self.state
        if getattr(self.experiment.model, "dropout", None) != 0:
            seed = self.experiment.train.seed
            key = keyed_seed(seed, state.step, micro_batch)
            seed_device(key, str(state.gradients.device))
        with self.autocast:
            loss = state.forward(inputs, targets)
        state.gradients.record_loss(micro_batch, loss)
        state.scaler.scale(loss).backward()


def micro_batches(
    batches: Batches, gradients: Gradients, steps: range
) -> Generator[MicroBatch, None, None]:
    """Yield the micro-batches of this rank on its device; a thread reads and pins the next ones.

    Args:
        batches: Micro-batches of all ranks.
        gradients: Gradients of this rank, for its micro-batches and device.
        steps: Steps to read, rising.
    """
    device = gradients.device
    mine = [micro_batch for slot in gradients.my_slots() for micro_batch in slot]
    items = ((step, micro_batch) for step in steps for micro_batch in mine)

    def fetch(item: tuple[int, int]) -> MicroBatch:
        input_array, target_array = batches.micro_batch(*item)
        inputs = torch.from_numpy(input_array)
        targets = torch.from_numpy(target_array)
        if device.type == "cuda":
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    with Prefetcher(fetch, items) as prefetched:
        for inputs, targets in prefetched:
            yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def ignore_phase(phase: str, step: int) -> None:
    """Report nothing: the default of `report_phase`."""


def _never_stop() -> bool:
    return False
