"""State of a run: weights, optimizer state, the step and a few numbers.

This module builds a new state, stores it in a checkpoint, and restores it to the last bit. Nothing
here depends on the kind of optimizer: all tensors that it keeps per parameter are stored.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from model import models, optim
from model.protocol import Config, LanguageModel
from orchestrator.checkpoint import store
from orchestrator.checkpoint.tensor_file import TensorsOrSlices
from orchestrator.code_hashes import module_hashes
from orchestrator.config.checks import is_sharded
from orchestrator.config.experiment import Experiment
from orchestrator.config.steps import Steps
from orchestrator.data.dataset import Manifest, data_identity
from orchestrator.errors import UserError
from orchestrator.machine import node_digest
from orchestrator.own_files import load_copies
from orchestrator.train.gradients import Gradients
from orchestrator.train.meter import Meter
from orchestrator.train.numerics import Worker, environment, fingerprint, gather
from orchestrator.train.ranks.exchange import Exchange
from orchestrator.train.ranks.layout import deal_matrices
from orchestrator.train.ranks.slots import adds_pairs, is_overlapped, rounds_of

NOT_LOADABLE = (
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)  # errors of torch, safetensors and json for a file of another kind or version


@dataclass
class TrainState:
    """State of a run.

    Attributes:
        model: The model, whose parameters are float32.
        forward: The module that the training loop calls: the model, compiled or not.
        optimizer: The optimizer of the model's parameters.
        scaler: Loss scale of float16; disabled for other types.
        gradients: Gradient buffers of this rank.
        meter: Losses and times since the last log line.
        step: Number of steps done.
        grad_norm: L2 norm of the last gradient, before clipping.
        best_val_loss: Lowest val loss so far.
        skipped: Number of updates that were skipped because a value was not finite.
        nonfinite_in_a_row: Number of such steps up to the current one.
        line_due: A stop request came before the journal line of this step was measured.
        ema: A model whose parameters are the moving average of the weights, and whose buffers are
            those of `model`; None: `train.ema` is off.
    """

    model: LanguageModel
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    gradients: Gradients
    meter: Meter
    step: int = 0
    grad_norm: float = 0.0
    best_val_loss: float | None = None
    skipped: int = 0
    nonfinite_in_a_row: int = 0
    line_due: bool = False
    ema: LanguageModel | None = None

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the average towards the weights, after an update."""
        if self.ema is not None:
            averages: list[Tensor] = list(self.ema.parameters())
            weights: list[Tensor] = list(self.model.parameters())
            torch._foreach_lerp_(averages, weights, 1.0 - decay)

    def optimizer_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return what the optimizer keeps of a parameter. All ranks must call this function."""
        shard = self.gradients.shard
        return self.optimizer.state.get(param, {}) if shard is None else shard.state_of(param)


def build(
    experiment: Experiment, model: LanguageModel, worker: Worker, steps: Steps | None = None
) -> TrainState:
    """Return the state of step 0. The model is moved to the device of `worker`.

    Args:
        experiment: The configuration.
        model: The model.
        worker: This process.
        steps: Settings of every step. None: the configured ones.
    """
    sizes = experiment.batch_sizes if steps is None else steps.batch_sizes
    largest = max(size for _, size in sizes.stretches)
    model = model.to(worker.device).train()
    ema = None
    if experiment.train.ema is not None:
        shared = {id(buffer): buffer for buffer in model.buffers()}
        ema = copy.deepcopy(model, shared).eval().requires_grad_(False)
    if experiment.train.activation_checkpointing:
        models.checkpoint_activations(model)
    forward: nn.Module = model
    if experiment.train.compile:
        forward = models.compiled(model, worker.device)
    scaler = torch.amp.GradScaler(
        torch.device(worker.device).type, enabled=experiment.train.dtype == "float16"
    )
    optimizer = optim.build(experiment.optim.kind, model, experiment.optimizer_settings())
    rounds = rounds_of(experiment, worker.world_size)
    nodes = gather(node_digest(), worker)
    gradients = Gradients(
        list(model.parameters()),
        largest // experiment.train.micro_batch_size,
        Exchange(experiment.slots, worker.rank, nodes, rounds=rounds),
        deal_matrices(optimizer, experiment.slots),
        optimizer if is_sharded(experiment, worker.world_size) else None,
        adds_pairs(experiment),
        is_overlapped(experiment, len(set(nodes)), worker.device),
    )
    meter = Meter(last_step_only=experiment.train.log_interval is None)
    return TrainState(model, forward, optimizer, scaler, gradients, meter, ema=ema)


def snapshot(
    state: TrainState,
    experiment: Experiment,
    dataset: Manifest,
    worker: Worker,
    metrics: dict[str, float],
    proof: str | None = None,
) -> tuple[dict[str, TensorsOrSlices], dict[str, str], dict[str, Any]]:
    """Return (tensors, texts, facts) as `Checkpointer.save` takes them.

    The tensors are not copied: the next step changes them.

    Args:
        state: The state.
        experiment: Configuration of the run.
        dataset: Dataset of the run. Its tokenizer becomes a part of the checkpoint.
        worker: This process.
        metrics: Metrics of the current step. Those of `val/` decide which checkpoint is the best.
        proof: Result of `begin.prove`; None: a resume compares only the fingerprint.
    """
    numbers = {
        "step": state.step,
        "grad_norm": state.grad_norm,
        "best_val_loss": state.best_val_loss,
        "open_losses": state.meter.losses,
        "scaler": state.scaler.state_dict(),
        "skipped": state.skipped,
        "nonfinite_in_a_row": state.nonfinite_in_a_row,
        "line_due": state.line_due,
    }
    tensors: dict[str, TensorsOrSlices] = {
        "model": dict(state.model.state_dict()),
        "optimizer": _optimizer_tensors(state),
    }
    if state.ema is not None:
        tensors["ema"] = dict(state.ema.state_dict())
    texts = {
        "experiment.yaml": experiment.to_yaml(),
        "model.json": json.dumps(
            models.stored_config(experiment.model.kind, state.model.config), indent=1
        ),
        "state.json": json.dumps(numbers, indent=1),
        "tokenizer.json": (dataset.directory / "tokenizer.json").read_text("utf-8"),
    }
    fingerprints: dict[str, Any] = {
        "data": data_identity(dataset),
        "numerics": fingerprint(experiment, worker),
    }
    if proof is not None:
        fingerprints |= {
            "proof": proof,
            "environment": environment(),
            "code": module_hashes(experiment.model.kind, experiment.optim.kind),
        }
    facts = {
        "generation": worker.attempt,
        "metrics": {name: value for name, value in metrics.items() if name.startswith("val/")},
        "fingerprints": fingerprints,
    }
    return tensors, texts, facts


def _optimizer_tensors(state: TrainState) -> TensorsOrSlices:
    """Return what the optimizer keeps, by "<parameter>/<name>"; nothing before the first update.

    With shards, these are the slices in the shard of this rank.
    """
    shard = state.gradients.shard
    parameters = dict(state.model.named_parameters())
    if shard is not None:
        return shard.own_state(parameters)
    return {
        f"{name}/{key}": value
        for name, param in parameters.items()
        for key, value in state.optimizer.state.get(param, {}).items()
    }


def restore(
    experiment: Experiment, content: store.Content, worker: Worker, steps: Steps | None = None
) -> TrainState:
    """Return the state that a verified checkpoint of the same experiment holds.

    Raises:
        UserError: Another version of this program wrote the checkpoint.
    """
    state = build(experiment, load_model(content, experiment.model.kind), worker, steps)
    parameters = dict(state.model.named_parameters())
    shard = state.gradients.shard
    wanted = None if shard is None else shard.wanted(parameters)
    for name, value in content.tensors("optimizer", state.gradients.device, wanted).items():
        parameter, _, key = name.rpartition("/")
        if shard is None:
            state.optimizer.state[parameters[parameter]][key] = value
        else:
            shard.set_state(parameters[parameter], key, value)

    if state.ema is not None:
        state.ema.load_state_dict(content.tensors("ema"))

    numbers = json.loads(content.text("state.json"))
    state.step = numbers["step"]
    state.grad_norm = numbers["grad_norm"]
    state.best_val_loss = numbers["best_val_loss"]
    state.meter.losses = numbers["open_losses"]
    # Checkpoints of earlier versions do not have these three.
    state.skipped = numbers.get("skipped", 0)
    state.nonfinite_in_a_row = numbers.get("nonfinite_in_a_row", 0)
    state.line_due = numbers.get("line_due", False)
    if numbers["scaler"]:
        state.scaler.load_state_dict(numbers["scaler"])
    return state


def load_model(
    content: store.Content, wanted: str | None = None, part: str = "model"
) -> LanguageModel:
    """Load the model of a verified checkpoint on the CPU, in evaluation mode.

    Args:
        content: The checkpoint.
        wanted: Kind of the model; None: as stored. A user's file may have been edited since.
        part: "model", or "ema" for the moving average of the weights.

    Raises:
        UserError: Another version of this program wrote the checkpoint.
    """
    kind, config = stored_config(content, wanted)
    tensors = content.tensors(part)
    try:
        # Tensors are copied, not assigned: tied weights stay tied, and buffers are real.
        model = models.empty_model(kind, config, "cpu")
        model.load_state_dict(tensors)
    except NOT_LOADABLE as error:
        raise _of_another_version(content.path, error) from None
    return model.eval()


def stored_config(content: store.Content, wanted: str | None = None) -> tuple[str, Config]:
    """Return kind and settings of the model of a verified checkpoint; see `load_model`.

    Raises:
        UserError: Another version of this program wrote the checkpoint.
    """
    text = content.text("model.json")
    try:
        fields = json.loads(text)
        if wanted is None:
            load_copies({"model": fields}, content.path)
        kind = wanted or models.kind_of(fields)
        return kind, models.new_config({**fields, "kind": kind})
    except UserError:
        raise
    except NOT_LOADABLE as error:
        raise _of_another_version(content.path, error) from None


def _of_another_version(path: Path, error: BaseException) -> UserError:
    reason = " ".join(str(error).split())[:400]
    return UserError(f"{path}: its model cannot be loaded ({reason}); use another checkpoint")
