"""Evaluation: the loss over a fixed part of each split, and a sample of text.

The result has the same bits for any number of ranks: batch i belongs to rank i mod W, the losses
of each window are summed in float64, and the sums of the windows are added in window order.

Notation: B sequences per micro-batch, T tokens per sequence, W ranks.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.generate import generate
from orchestrator.config.experiment import Experiment
from orchestrator.data.batches import EvalBatches, TokenStream
from orchestrator.data.tokenizer import Tokenizer
from orchestrator.errors import NO_ROOM
from orchestrator.files import write_atomically
from orchestrator.folders import make_folder
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train.numerics import Worker, agree, autocast, keyed_seed
from orchestrator.train.state import TrainState

SAMPLE_PROMPT = 16  # tokens of val that the sample starts with
SAMPLE_TOKENS = 64  # tokens that the model adds, unless train.sample_tokens is set
SAMPLE_TEMPERATURE = 0.8

EvalBatch = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs, targets (B, T); window ids (B,)


class EvalBatchList(Protocol):
    """Batches of an evaluation, as `data.batches.EvalBatches` returns them."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> EvalBatch: ...


class StopRequested(Exception):  # noqa: N818
    """The run should stop now. All ranks raise it at the same point."""


@dataclass(frozen=True)
class EvalResult:
    """Result of an evaluation.

    Attributes:
        loss: Mean over all targets, in nats per token.
        bits_per_byte: The same loss in bits per UTF-8 byte of the targets.
        tokens: Number of targets.
    """

    loss: float
    bits_per_byte: float
    tokens: int


class EvalSet:
    """Batches of one split, and the number of their tokens and bytes.

    Args:
        batches: The batches. Targets of -1 and rows with a window id of -1 are padding.
        byte_lengths: Bytes of each token id, (n_vocab,).
    """

    def __init__(self, batches: EvalBatchList, byte_lengths: np.ndarray) -> None:
        self.batches = batches
        self.tokens = 0
        self.bytes = 0
        self.windows = 0
        for i in range(len(batches)):
            _, targets, window_ids = batches[i]
            real = targets[targets >= 0]
            self.tokens += real.size
            self.bytes += int(byte_lengths[real].sum())
            self.windows = max(self.windows, int(np.max(window_ids)) + 1)

    def evaluate(
        self,
        model: nn.Module,
        device: torch.device,
        autocast: AbstractContextManager,
        rank: int = 0,
        world_size: int = 1,
        may_continue: Callable[[], bool] = lambda: True,
        waiting: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    ) -> EvalResult:
        """Run the model on this rank's batches; all ranks return the same result.

        Args:
            model: A model; see `model.protocol`.
            device: Device of the model.
            autocast: Context of the forward pass.
            rank: This rank.
            world_size: Number of ranks, W.
            may_continue: Called before each batch, equally often on all ranks. It returns the same
                on all ranks.
            waiting: Context in which this rank waits for the others.

        Raises:
            StopRequested: `may_continue` returned False.
        """
        sums = torch.zeros(self.windows, dtype=torch.float64, device=device)
        was_training = model.training
        model.eval()
        try:
            for first in range(0, len(self.batches), world_size):
                if not may_continue():
                    raise StopRequested
                if first + rank < len(self.batches):
                    self._add(sums, self.batches[first + rank], model, device, autocast)
        finally:
            model.train(was_training)
        if world_size > 1:
            with waiting():
                # Exact: each window is nonzero on one rank only.
                dist.all_reduce(sums)
        loss = math.fsum(sums.tolist()) / self.tokens
        bits_per_byte = math.nan
        if self.bytes:
            bits_per_byte = loss * self.tokens / math.log(2) / self.bytes
        return EvalResult(loss, bits_per_byte, self.tokens)

    @staticmethod
    @torch.no_grad()
    def _add(
        sums: Tensor,
        batch: EvalBatch,
        model: nn.Module,
        device: torch.device,
        autocast: AbstractContextManager,
    ) -> None:
        """Store the summed losses (nats) of the windows of a batch in `sums`, (windows,)."""
        inputs, targets, window_ids = (torch.from_numpy(array).to(device) for array in batch)
        with autocast:
            losses = model(inputs, targets, reduction="window")  # (B,)
        real = window_ids >= 0
        sums[window_ids[real]] = losses[real]


class Evaluator:
    """Evaluates a run during training. Training has the same bits with and without it.

    Args:
        experiment: The configuration.
        folder: Folder of the run, for the samples.
        streams: Tokens of `train` and `val`.
        tokenizer: Tokenizer of the dataset.
        worker: This process.
        stop_requested: As for `Trainer`.
        report_phase: As for `Trainer`.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        streams: Mapping[str, TokenStream],
        tokenizer: Tokenizer,
        worker: Worker,
        stop_requested: Callable[[], bool] | None,
        report_phase: Callable[[str, int], None],
    ) -> None:
        self.experiment = experiment
        self.folder = folder
        self.val = streams["val"]
        self.tokenizer = tokenizer
        self.worker = worker
        self.stop_requested = stop_requested
        self.report_phase = report_phase
        self.device = torch.device(worker.device)
        self.autocast = autocast(experiment, worker.device)
        # Evaluate as many tokens of train as of val.
        limit = min(experiment.train.eval_tokens or self.val.tokens, self.val.tokens)
        self.sets: dict[str, EvalSet] = {}
        for split, stream in streams.items():
            batches = EvalBatches(
                stream,
                experiment.model.block_size,
                experiment.train.micro_batch_size,
                min(limit, stream.tokens),
            )
            self.sets[split] = EvalSet(batches, tokenizer.byte_lengths)

    def measure(self, state: TrainState) -> dict[str, float]:
        """Evaluate both splits on all ranks; rank 0 also writes a sample of text.

        Updates `state.best_val_loss`.

        Raises:
            StopRequested: The run should stop. The state is unchanged.
        """

        @contextlib.contextmanager
        def waiting() -> Iterator[None]:
            # The watchdog has to distinguish a rank that waits from a rank that hangs.
            self.report_phase("agreement", state.step)
            yield
            self.report_phase("evaluation", state.step)

        def may_continue() -> bool:
            with waiting():
                if self.stop_requested is None:
                    return True
                return not agree(int(self.stop_requested()), self.worker)

        models = {split: (self.sets[split], state.forward) for split in self.sets}
        if state.ema is not None:
            models["ema"] = (self.sets["val"], state.ema)
        results: dict[str, EvalResult] = {}
        for name, (eval_set, model) in models.items():
            results[name] = eval_set.evaluate(
                model,
                self.device,
                self.autocast,
                self.worker.rank,
                self.worker.world_size,
                may_continue,
                waiting,
            )
        val = results["val"]
        if state.best_val_loss is None or val.loss < state.best_val_loss:
            state.best_val_loss = val.loss
        if self.worker.is_main:
            try:
                self._write_sample(state)
            except Exception as error:  # a sample is never a reason to end the run
                message = f"no sample of step {state.step}: {type(error).__name__}: {error}"
                events.note(self.folder, "sample", message, step=state.step)
        metrics = {
            "val/loss": val.loss,
            "val/bits_per_byte": val.bits_per_byte,
            "val/best_loss": state.best_val_loss,
            "train/eval_loss": results["train"].loss,
        }
        if "ema" in results:
            metrics["val/ema_loss"] = results["ema"].loss
        return metrics

    def _write_sample(self, state: TrainState) -> None:
        """Write the text that the model generates after the prompt."""
        settings = self.experiment.train
        if settings.sample_prompt is None:
            prompt = self.val.read(0, min(SAMPLE_PROMPT, self.val.tokens))
        else:
            prompt = self.tokenizer.encode(settings.sample_prompt)
        tokens = torch.from_numpy(prompt.astype("int64"))[None].to(self.device)  # (1, T)
        with self.autocast, self._eagerly():
            generated = generate(
                state.model,
                tokens,
                settings.sample_tokens or SAMPLE_TOKENS,
                temperature=SAMPLE_TEMPERATURE,
                top_k=50,
                n_vocab=self.tokenizer.n_vocab,
                seed=keyed_seed(settings.seed, state.step),
            )
        file = self.folder.sample_file(state.step)
        try:
            make_folder(self.folder.samples)
            write_atomically(file, self.tokenizer.decode(generated[0].tolist()))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            message = f"{file}: the disk is full; this sample is not written"
            events.note(self.folder, "disk_full", message, step=state.step)

    def _eagerly(self) -> AbstractContextManager[None]:
        """Return a context without torch.compile, which would compile code for each length."""
        if not self.experiment.train.compile:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")
