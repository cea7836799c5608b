"""One optimizer step: forward, backward, sum over all ranks, update of the weights.

The training loop, the stages of a sweep, the cost estimate and the benchmarks all use `Step`.

Notation: B sequences per micro-batch, T tokens per sequence, M micro-batches per step (all ranks).
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orchestrator.config.experiment import Experiment
from orchestrator.config.steps import Steps, StepSettings
from orchestrator.data.batches import Batches, Prefetcher
from orchestrator.own_code import is_own
from orchestrator.train.gradients import Gradients
from orchestrator.train.numerics import autocast, casts_kept, keyed_seed, seed_device
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
        steps: Settings of every step. None: the configured ones.
        stop_requested: Called once per slot. If it returns True, all ranks stop after this step.
        report_phase: Called with (phase, step) when a phase of the step starts.
    """

    def __init__(
        self,
        experiment: Experiment,
        state: TrainState,
        steps: Steps | None = None,
        stop_requested: Callable[[], bool] | None = None,
        report_phase: Callable[[str, int], None] | None = None,
    ) -> None:
        self.experiment = experiment
        self.state = state
        self.steps = steps or experiment.steps()
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
        batch_size = self.steps.batch_sizes.at(state.step)
        gradients.set_micro_batches(batch_size // self.experiment.train.micro_batch_size)
        self.report_phase("gradient", state.step)
        with casts_kept():
            for slot in gradients.my_slots():
                self._add_slot(slot, batches)
                if gradients.ends_round():
                    self.report_phase("exchange", state.step)
                    gradients.end_round()
                    self.report_phase("gradient", state.step)

        self.report_phase("exchange", state.step)
        losses = gradients.reduce()
        if state.scaler.is_enabled():
            state.scaler.unscale_(state.optimizer)
        votes = gradients.votes().view(1)
        norm = gradients.norm().view(1)
        *loss_values, vote, norm_value = torch.cat((losses, votes, norm)).tolist()
        self.report_phase("update", state.step)
        return Gradient(loss_values, norm_value, vote > 0)

    def _add_slot(self, slot: Iterable[int], batches: Iterator[MicroBatch]) -> None:
        """Add the gradients of the micro-batches of a slot."""
        state = self.state
        state.gradients.begin_slot()
        for micro_batch in slot:
            state.meter.lap("rest")
            inputs, targets = next(batches)
            state.meter.lap("data")
            state.gradients.begin_backward(micro_batch)
            self._forward_backward(micro_batch, inputs, targets)
            state.meter.lap("compute")
        if self.stop_requested():
            state.gradients.vote()
        state.gradients.end_slot()

    def update(self, settings: StepSettings) -> None:
        """Clip the gradient and update the weights."""
        state = self.state
        self._apply(settings, state.scaler)
        state.scaler.update()
        if state.gradients.shard is not None:
            self.report_phase("exchange", state.step)
            state.gradients.shard.gather_weights()
            self.report_phase("update", state.step)
        if self.experiment.train.ema is not None:
            state.update_ema(self.experiment.train.ema)
        state.step += 1
        state.meter.lap("compute")

    def _apply(self, settings: StepSettings, scaler: torch.amp.GradScaler) -> None:
        optimizer = self.state.optimizer
        max_norm = self.experiment.optim.max_grad_norm
        if max_norm:
            self.state.gradients.clip(max_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * group["lr_scale"]
            group["weight_decay"] = settings.weight_decay * group["full_weight_decay"]
            if "momentum" in group:
                group["momentum"] = settings.momentum
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
        of an update of the smallest parameter of each group, and of which matrices Muon updates
        together: the same code, on the same weights, as in the step.

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
        if gradients.shard is not None:  # the moments come from all ranks
            self.report_phase("exchange", self.state.step)
        updated = self._updated_copies()
        digest = hashlib.sha256()
        # One after another: together, they would take the memory of a gradient.
        for tensor in (*gradients.current.views, gradients.tail[:1], norm, *updated):
            digest.update(tensor.reshape(-1).cpu().numpy().data)
        for group in self.state.optimizer.param_groups:
            if group.get("muon"):
                digest.update(repr(_together(group)).encode())
        return digest.hexdigest()

    @torch.no_grad()
    def _updated_copies(self) -> list[Tensor]:
        """Update copies of some parameters of each group; return the copies, flat.

        The smallest one is enough where each number is updated by itself. Matrices that Muon
        updates meet other kernels if they have another shape, so there is one of each shape; also
        for an optimizer of the user.
        """
        optimizer = self.state.optimizer
        groups = optimizer.param_groups
        copies = []
        trial = []
        for group in groups:
            params = group.get("whole", group["params"])  # of a sharded run
            chosen = list({param.shape: i for i, param in enumerate(params)}.values())
            if not (group.get("muon") or is_own(self.experiment.optim.kind)):
                chosen = sorted(range(len(params)), key=lambda i: params[i].numel())[:1]
            updated = [self._copy_with_state(params[i]) for i in chosen]
            copies += updated
            names = group.get("names", ())
            names = [names[i] for i in chosen if i < len(names)]
            trial.append({**group, "params": updated, "names": names})
        optimizer.param_groups = trial
        try:
            scaler = torch.amp.GradScaler(self.state.gradients.device.type, enabled=False)
            self._apply(self._proof_settings(), scaler)
        finally:
            optimizer.param_groups = groups
            for copy in copies:
                del optimizer.state[copy]
        return [copy.view(-1) for copy in copies]

    def _proof_settings(self) -> StepSettings:
        """Return the settings of the last update, with a fixed learning rate.

        They are the same for all trials that start from this state; those of the next update may
        differ between them.
        """
        return replace(self.steps(max(0, self.state.step - 1)), lr=PROOF_LR)

    def _copy_with_state(self, param: Tensor) -> Tensor:
        """Return a copy that has the gradient and a copy of the optimizer's state."""
        found = self.state.optimizer_state(param)
        copy = param.clone()
        copy.__dict__.update(param.__dict__)  # such as `row_parts`
        copy.grad = param.grad
        self.state.optimizer.state[copy] = {key: value.clone() for key, value in found.items()}
        return copy

    def _forward_backward(self, micro_batch: int, inputs: Tensor, targets: Tensor) -> None:
        """Add the gradient of one micro-batch of this step."""
        state = self.state
        model = self.experiment.model
        if is_own(model.kind) or getattr(model, "dropout", None) != 0:
            seed = self.experiment.train.seed
            key = keyed_seed(seed, state.step, micro_batch)
            seed_device(key, str(state.gradients.device))
        with self.autocast:
            loss = state.forward(inputs, targets)
        state.gradients.record_loss(micro_batch, loss)
        state.scaler.scale(loss).backward()


def _together(group: dict[str, Any]) -> list[list[int]]:
    """Return which matrices Muon updates together: their places in the group, of each list.

    Bits may depend on it. The numbers of slots do not matter.
    """
    from model.muon import batches

    params = group.get("whole", group["params"])  # of a sharded run
    places = {param: place for place, param in enumerate(params)}
    return sorted([places[param] for param in batch] for batch in batches(params))


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
    items = (
        (step, micro_batch)
        for step in steps
        for slot in gradients.my_slots(batches.micro_batches(step))
        for micro_batch in slot
    )

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
