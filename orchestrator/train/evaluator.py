"""A run's evaluations: the same tokens of val and of train each time, and a sample of text to look at.

Eats a state; yields the metrics of its line and `samples/step-….txt`. Everything is keyed by the step, so that an
evaluation changes nothing in the training around it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from model.generate import generate
from orchestrator.config.experiment import Experiment
from orchestrator.data.batches import TokenStream, eval_batches
from orchestrator.errors import NO_ROOM
from orchestrator.files import write_atomically
from orchestrator.runs import events
from orchestrator.train.evaluate import EvalSet
from orchestrator.train.numerics import Worker, autocast, keyed_seed
from orchestrator.train.state import TrainState

SAMPLE_PROMPT, SAMPLE_TOKENS = (
    16,
    64,
)  # of the text that every evaluation writes: tokens of val, then of the model


class Evaluator:
    """`go_on`, `waiting`: see `EvalSet.evaluate`."""

    def __init__(
        self,
        experiment: Experiment,
        run_dir: Path,
        streams: Mapping[str, TokenStream],
        tokenizer: Any,
        worker: Worker,
        go_on: Callable[[], bool],
        waiting: Callable[[], AbstractContextManager],
    ):
        self.experiment, self.run_dir, self.val, self.tokenizer = (
            experiment,
            run_dir,
            streams["val"],
            tokenizer,
        )
        self.worker, self.go_on, self.waiting = worker, go_on, waiting
        self.device, self.autocast = (
            torch.device(worker.device),
            autocast(experiment, worker.device),
        )
        e, limit = experiment, min(experiment.train.eval_tokens or self.val.tokens, self.val.tokens)
        # The fixed stretch of val, and as many tokens of train.
        self.sets = {
            split: EvalSet(
                eval_batches(
                    stream, e.model.block_size, e.train.micro_batch_size, min(limit, stream.tokens)
                ),
                tokenizer.byte_lengths,
            )
            for split, stream in streams.items()
        }

    def measure(self, state: TrainState) -> dict[str, float]:
        """Evaluate on all workers; rank 0 writes the sample. Updates `state.best_val_loss`."""
        w = self.worker
        results = {
            split: eval_set.evaluate(
                state.forward,
                self.device,
                self.autocast,
                w.rank,
                w.world_size,
                self.go_on,
                self.waiting,
            )
            for split, eval_set in self.sets.items()
        }
        val = results["val"]
        state.best_val_loss = (
            val.loss if state.best_val_loss is None else min(state.best_val_loss, val.loss)
        )
        if w.is_main:
            self._write_sample(state)
        return {
            "val/loss": val.loss,
            "val/bits_per_byte": val.bits_per_byte,
            "val/best_loss": state.best_val_loss,
            "train/eval_loss": results["train"].loss,
        }

    def _write_sample(self, state: TrainState) -> None:
        """What the model makes of the first tokens of val, drawn with a seed of its own for each step."""
        folder = self.run_dir / "samples"
        prompt = self.val.read(0, min(SAMPLE_PROMPT, self.val.tokens))
        tokens = torch.from_numpy(prompt.astype("int64"))[None].to(
            self.device
        )  # (1, SAMPLE_PROMPT)
        with self.autocast:
            drawn = generate(
                state.model,
                tokens,
                SAMPLE_TOKENS,
                top_k=50,
                n_vocab=self.tokenizer.n_vocab,
                seed=keyed_seed(self.experiment.train.seed, state.step),
            )
        file = folder / f"step-{state.step:08d}.txt"
        try:
            folder.mkdir(exist_ok=True)
            write_atomically(file, self.tokenizer.decode(drawn[0].tolist()))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            events.note(
                self.run_dir,
                "disk_full",
                f"{file}: no room; this sample is left out",
                step=state.step,
            )
