"""The state of a run: weights, moments, the step and a few numbers; built fresh, saved whole, restored to the last bit."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model import optim
from model.gpt import GPT, GPTConfig
from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import Experiment
from orchestrator.data.dataset import Manifest, data_identity
from orchestrator.errors import UserError
from orchestrator.train.gradients import Gradients
from orchestrator.train.meter import Meter
from orchestrator.train.numerics import Worker, fingerprint


@dataclass
class TrainState:
    """`step` counts updates done, `grad_norm` is the last one's norm before clipping.

    `skipped`: updates left out because something was not finite; `nonfinite_in_a_row`: steps just now that were not.
    `line_due`: the run was asked to stop before it had measured what is due at this step. `model` is the plain module;
    `forward` is what the loop calls (maybe compiled).
    """

    model: GPT
    forward: torch.nn.Module
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


def build(experiment: Experiment, model: GPT, worker: Worker) -> TrainState:
    """A fresh state around `model`, moved to the worker's device."""
    model = model.to(worker.device).train()
    o = experiment.optim
    settings = optim.OptimizerSettings(experiment.schedule.max_lr, o.beta1, o.beta2, o.weight_decay)
    optimizer = optim.build(o.kind, model, settings)
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
    forward = torch.compile(model) if experiment.train.compile else model
    meter = Meter(last_step_only=experiment.train.log_interval is None)
    return TrainState(model, forward, optimizer, scaler, gradients, meter)


def snapshot(
    state: TrainState,
    experiment: Experiment,
    dataset: Manifest,
    worker: Worker,
    metrics: dict[str, float],
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str], dict[str, Any]]:
    """(tensors, texts, facts) of a checkpoint that also says what it is: experiment, model shape, tokenizer, fingerprints.

    The tensors are the state's own: the next step changes them.
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
    texts = {
        "experiment.yaml": experiment.to_yaml(),
        "model.json": json.dumps(asdict(state.model.config), indent=1),
        "state.json": json.dumps(numbers, indent=1),
        "tokenizer.json": (dataset.directory / "tokenizer.json").read_text("utf-8"),
    }
    facts = {
        "generation": worker.attempt,
        "metrics": {name: value for name, value in metrics.items() if name.startswith("val/")},
        "fingerprints": {
            "data": data_identity(dataset),
            "numerics": fingerprint(experiment, worker),
        },
    }
    return {"model": dict(state.model.state_dict()), "optimizer": _moments(state)}, texts, facts


def restore(state: TrainState, path: Path) -> None:
    """Fill `state` from a verified checkpoint of the same experiment."""
    numbers = json.loads((path / "state.json").read_text("utf-8"))
    state.model.load_state_dict(checkpoint.load_tensors(path, "model"))
    device = next(state.model.parameters()).device
    moments = checkpoint.load_tensors(path, "optimizer", device)
    parameters = dict(state.model.named_parameters())
    for key, value in moments.items():
        name, _, moment = key.rpartition("/")
        state.optimizer.state[parameters[name]][moment] = value
    state.step, state.grad_norm, state.best_val_loss = (
        numbers[k] for k in ("step", "grad_norm", "best_val_loss")
    )
    state.skipped, state.nonfinite_in_a_row = (
        numbers.get("skipped", 0),
        numbers.get("nonfinite_in_a_row", 0),
    )
    state.line_due = numbers.get("line_due", False)
    state.meter.losses = numbers["open_losses"]
    if numbers["scaler"]:
        state.scaler.load_state_dict(numbers["scaler"])


def _moments(state: TrainState) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name, parameter in state.model.named_parameters()
        for key, value in state.optimizer.state.get(parameter, {}).items()
    }


def load_model(path: Path) -> GPT:
    """The model of a verified checkpoint, on the CPU, in evaluation mode."""
    config, tensors = shape_of(path), checkpoint.load_tensors(path, "model")
    with _explained(path):
        with torch.device("meta"):
            model = GPT(config)
        model.load_state_dict(tensors, assign=True)
    return model.eval()


def shape_of(path: Path) -> GPTConfig:
    """The shape of a verified checkpoint's model: what model.json says, if its tensors say so too. Builds and loads nothing.

    Raises:
        UserError: they differ, or it is no shape.
    """
    with _explained(path):
        config = GPTConfig(**json.loads((path / "model.json").read_text("utf-8")))
        with safe_open(path / "model.safetensors", framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no dictionary
        blocks = {name.split(".")[2] for name in shapes if name.startswith("transformer.h.")}
        told = [
            [config.vocab_size, config.n_embd],
            [config.block_size, config.n_embd],
            config.n_layer,
        ]
        found = [shapes["transformer.wte.weight"], shapes["transformer.wpe.weight"], len(blocks)]
        if told != found:
            raise ValueError(
                f"model.json tells of a vocabulary, positions and blocks of {told}, the tensors of {found}"
            )
        return config


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A checkpoint whose hashes are right and whose content is not: somebody forged it, or another version wrote it."""
    try:
        yield
    except (
        AttributeError,
        FileNotFoundError,
        LookupError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(
            f"{path}: no model of this program ({' '.join(str(error).split())[:400]}); use another"
        ) from None
