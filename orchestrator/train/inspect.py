"""Shows one batch: what a training step reads, and what a new model predicts for it.

Notation: B sequences per micro-batch, T tokens per sequence, V rows of the vocabulary (padded).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.protocol import LanguageModel
from orchestrator.config.experiment import Experiment
from orchestrator.data.batches import Batches, TokenStream
from orchestrator.train.init_from import initial_model
from orchestrator.train.numerics import Worker, autocast, prepare_process


@dataclass(frozen=True)
class Batch:
    """First micro-batch of a step.

    Attributes:
        inputs, targets: Token ids, (B, T) int64.
        offsets: Position in the train split at which each row starts, (B,).
        following: Token after the inputs of each row, read from the split once more, (B,).
    """

    inputs: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    following: np.ndarray

    @property
    def moved_by_one(self) -> bool:
        """Whether each target is the token that follows its input in the text."""
        within = np.array_equal(self.targets[:, :-1], self.inputs[:, 1:])
        return within and np.array_equal(self.targets[:, -1], self.following)


@dataclass(frozen=True)
class Forward:
    """Result of a forward pass.

    Attributes:
        logits: Shape of the logits.
        loss: Mean loss in nats per token.
        next_ids: Most probable next tokens of each row, (B, k), the most probable first.
        probabilities: Their probabilities, (B, k).
    """

    logits: tuple[int, ...]
    loss: float
    next_ids: np.ndarray
    probabilities: np.ndarray


def batch_of(experiment: Experiment, directory: Path, step: int) -> Batch:
    """Return the first micro-batch of the update from `step` to `step + 1`.

    Args:
        experiment: The configuration.
        directory: Folder of the dataset.
        step: Number of updates before.
    """
    config = experiment.train
    length = experiment.model.block_size
    stream = TokenStream(directory, "train")
    batches = Batches(stream, length, experiment.batch_sizes, config.micro_batch_size, config.seed)
    inputs, targets = batches.micro_batch(step, 0)
    offsets = batches.offsets(step)[: config.micro_batch_size]
    following = [stream.read(offset + length, 1)[0] for offset in offsets.tolist()]
    return Batch(inputs, targets, offsets, np.array(following, np.int64))


def first_model(experiment: Experiment, n_vocab: int, worker: Worker) -> LanguageModel:
    """Return the model that training starts with, in evaluation mode, on the device of `worker`."""
    prepare_process(experiment, worker)
    return initial_model(experiment, n_vocab).to(worker.device).eval()


@torch.no_grad()
def forward(
    model: LanguageModel,
    batch: Batch,
    experiment: Experiment,
    device: str,
    n_vocab: int,
    k: int,
) -> Forward:
    """Run the model on a batch, with targets as in training and without as in sampling.

    Args:
        model: The model, on `device`.
        batch: The batch.
        experiment: The configuration.
        device: Device of the model.
        n_vocab: Number of tokens of the tokenizer. Padding rows are not predicted.
        k: Number of next tokens to return for each row.
    """
    inputs = torch.from_numpy(batch.inputs).to(device)  # (B, T)
    targets = torch.from_numpy(batch.targets).to(device)  # (B, T)
    with autocast(experiment, device):
        loss = model(inputs, targets)
        last = model(inputs)  # (B, 1, V)
    probabilities, ids = _most_probable(last[:, -1, :n_vocab], min(k, n_vocab))
    return Forward(tuple(last.shape), loss.item(), ids, probabilities)


def _most_probable(logits: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k highest probabilities and their ids, (B, k) each, the highest first."""
    best = F.softmax(logits.float(), dim=-1).topk(k)
    return best.values.cpu().numpy(), best.indices.cpu().numpy()
