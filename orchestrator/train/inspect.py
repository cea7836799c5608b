"""One batch looked at closely: what a training step eats, where it came from, and what a fresh model makes of it.

Eats an experiment, its dataset and a step; yields the very arrays of that step's first micro-batch, the documents that
they were cut from, and the shapes, loss and probabilities of the experiment's first model. No Ray, no printing.

Legend: B sequences per micro-batch, T = block_size, V = vocab_size (padded).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.gpt import GPT
from orchestrator.config.experiment import Experiment
from orchestrator.data.batches import Batches, TokenStream
from orchestrator.train.init_from import initial_model
from orchestrator.train.numerics import Worker, autocast, prepare_process


@dataclass(frozen=True)
class Batch:
    """inputs, targets: (B, T) int64. offsets: where in the train stream each row begins, (B,). following: the token
    after each row's inputs, read from the stream once more, (B,)."""

    inputs: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    following: np.ndarray

    @property
    def moved_by_one(self) -> bool:
        """Is each target the input after it, and the last one the token that follows in the text?"""
        within = np.array_equal(self.targets[:, :-1], self.inputs[:, 1:])
        return within and np.array_equal(self.targets[:, -1], self.following)


@dataclass(frozen=True)
class Forward:
    """What the model gave: shapes of its logits with and without targets, the mean loss in nats per token, and for
    each row the likeliest next ids and their probabilities, (B, k) each."""

    with_targets: tuple[int, ...]
    without_targets: tuple[int, ...]
    loss: float
    next_ids: np.ndarray
    probabilities: np.ndarray


def batch_of(experiment: Experiment, directory: Path, step: int) -> Batch:
    """The first micro-batch of the update that takes a run from `step` to `step + 1`."""
    t, length = experiment.train, experiment.model.block_size
    stream = TokenStream(directory, "train")
    batches = Batches(stream, length, t.global_batch_size, t.micro_batch_size, t.seed)
    inputs, targets = batches.micro_batch(step, 0)
    offsets = batches.offsets(step)[: t.micro_batch_size]
    following = np.array([stream.read(int(o) + length, 1)[0] for o in offsets], np.int64)
    return Batch(inputs, targets, offsets, following)


def first_model(experiment: Experiment, n_vocab: int, worker: Worker) -> GPT:
    """The model that training would begin with, in a process set up as a worker's; dropout is off."""
    prepare_process(experiment, worker)
    return initial_model(experiment, n_vocab).to(worker.device).eval()


@torch.no_grad()
def forward(
    model: GPT, batch: Batch, experiment: Experiment, device: str, n_vocab: int, k: int
) -> Forward:
    """Run the model on the batch with targets, as training does, and without, as sampling does."""
    inputs, targets = (
        torch.from_numpy(a).to(device) for a in (batch.inputs, batch.targets)
    )  # (B, T)
    with autocast(experiment, device):
        logits, loss = model(inputs, targets)  # (B, T, V)
        with_targets = tuple(logits.shape)
        del logits  # a gigabyte and more for a GPT-2
        last, _ = model(inputs)  # (B, 1, V)
    probabilities, ids = _likeliest(last[:, -1, :n_vocab], min(k, n_vocab))
    return Forward(with_targets, tuple(last.shape), loss.item(), ids, probabilities)


def _likeliest(logits: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and ids of the k likeliest, (B, k) each, the likeliest first."""
    best = F.softmax(logits.float(), dim=-1).topk(k)
    return best.values.cpu().numpy(), best.indices.cpu().numpy()
