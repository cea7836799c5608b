"""State of a run: weights, optimizer state, the step and a few numbers.

This module builds a new state, stores it in a checkpoint, and restores it to the last bit. Nothing
here depends on the kind of optimizer: all tensors that it keeps per parameter are stored.
"""

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
from orchestrator.checkpoint.format import reading
from orchestrator.code_hashes import module_hashes
from orchestrator.config.experiment import Experiment
from orchestrator.data.dataset import Manifest, data_identity
from orchestrator.errors import UserError
from orchestrator.train.gradients import Gradients
from orchestrator.train.meter import Meter
from orchestrator.train.numerics import Worker, environment, fingerprint

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
        forward: The module that the training loop calls: the model, or its compiled version.
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


def build(experiment: Experiment, model: LanguageModel, worker: Worker) -> TrainState:
    """Return the state of step 0. The model is moved to the device of `worker`."""
    model = model.to(worker.device).train()
    forward: nn.Module = model
    if experiment.train.compile:
        forward = torch.compile(model)  # type: ignore[assignment]
    scaler = torch.amp.GradScaler(
        torch.device(worker.device).type, enabled=experiment.train.dtype == "float16"
    )
    gradients = Gradients(
        list(model.parameters()),
        experiment.micro_batches,
        experiment.slots,
        worker.rank,
        worker.world_size,
    )
    return TrainState(
        model,
        forward,
        optim.build(experiment.optim.kind, model, experiment.optimizer_settings()),
        scaler,
        gradients,
        Meter(last_step_only=experiment.train.log_interval is None),
    )


def snapshot(
    state: TrainState,
    experiment: Experiment,
    dataset: Manifest,
    worker: Worker,
    metrics: dict[str, float],
    proof: str | None = None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str], dict[str, Any]]:
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
    tensors = {"model": dict(state.model.state_dict()), "optimizer": _optimizer_tensors(state)}
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


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    """Return what the optimizer keeps, by "<parameter>/<name>"; nothing before the first update."""
    tensors = {}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = value
    return tensors


def restore(experiment: Experiment, path: Path, worker: Worker) -> TrainState:
    """Return the state that a verified checkpoint of the same experiment holds.

    Raises:
        UserError: Another version of this program wrote the checkpoint.
    """
    state = build(experiment, load_model(path), worker)
    parameters = dict(state.model.named_parameters())
    for name, value in store.load_tensors(path, "optimizer", state.gradients.device).items():
        parameter, _, key = name.rpartition("/")
        state.optimizer.state[parameters[parameter]][key] = value

    numbers = json.loads(_read_text(path, "state.json"))
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


def load_model(path: Path) -> LanguageModel:
    """Load the model of a verified checkpoint on the CPU, in evaluation mode.

    Raises:
        UserError: Another version of this program wrote the checkpoint.
    """
    kind, config = stored_config(path)
    tensors = store.load_tensors(path, "model")
    try:
        # Tensors are copied, not assigned: tied weights stay tied, and buffers are real.
        model = models.empty_model(kind, config, "cpu")
        model.load_state_dict(tensors)
    except NOT_LOADABLE as error:
        raise _of_another_version(path, error) from None
    return model.eval()


def stored_config(path: Path) -> tuple[str, Config]:
    """Return kind and settings of the model of a verified checkpoint, without its weights.

    Raises:
        UserError: Another version of this program wrote the checkpoint.
    """
    text = _read_text(path, "model.json")
    try:
        fields = json.loads(text)
        return models.kind_of(fields), models.new_config(fields)
    except NOT_LOADABLE as error:
        raise _of_another_version(path, error) from None


def _read_text(path: Path, name: str) -> str:
    return reading(path, lambda: (path / name).read_text("utf-8"))


def _of_another_version(path: Path, error: BaseException) -> UserError:
    reason = " ".join(str(error).split())[:400]
    return UserError(f"{path}: its model cannot be loaded ({reason}); use another checkpoint")
