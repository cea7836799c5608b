#!/usr/bin/env python3
"""Measure a trained GPT: loss, perplexity and bits per byte over a whole split, every token of it once.

It is the evaluation that training makes: on the same device, with the same dtype and threads (all are the run's unless
you say otherwise), it gives the loss that was logged at that step, to the last bit; of a run with train.compile=true
the last digits differ. The tokens are those that the run was trained on: another dataset is refused.

  pipelines/evaluate.py quickstart
  pipelines/evaluate.py runs/quickstart --best --split train --tokens 1000000
  pipelines/evaluate.py copied/step-00001000 data.dir=/data/shakespeare
"""

import math
import sys
import time

import torch

from orchestrator.data.batches import EvalBatches, TokenStream
from orchestrator.data.dataset import Manifest
from orchestrator.errors import UserError
from orchestrator.text import duration, table
from orchestrator.train.evaluate import EvalResult, EvalSet
from orchestrator.train.numerics import autocast, device_name
from orchestrator.train.trained import (
    Trained,
    find_checkpoint,
    find_device,
    open_checkpoint,
    tokens_of,
)
from pipelines.common import Options, at_least, guarded

FREE = ("data.dir", "storage", "train.micro_batch_size", "compute.cpus_per_worker")


class Progress:
    """Batches that say on stderr how far they are read, once reading takes longer than a moment."""

    def __init__(self, batches, every_s: float):
        self.batches, self.every_s = batches, every_s
        self.started = self.said = time.monotonic()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int):
        now = time.monotonic()
        if i and now - self.said > self.every_s:
            self.said = now
            left = (now - self.started) / i * (len(self) - i)
            self._say(f"batch {i:,} of {len(self):,} ({i / len(self):.0%}), {duration(left)} left")
        if i == len(self) - 1 and self.said > self.started:
            self._say("all batches read")
        return self.batches[i]

    @staticmethod
    def _say(line: str) -> None:
        terminal = (
            sys.stderr.isatty()
        )  # there the line is written over, and gone before the table comes
        end = "\r" if terminal else "\n"
        print(f"{line:<60}" if terminal else line, end=end, file=sys.stderr, flush=True)


def options() -> Options:
    parser = Options(__doc__)
    parser.add_argument(
        "model",
        metavar="RUN_OR_CHECKPOINT",
        help=("a run's name or folder (its latest valid checkpoint), or a checkpoint's folder"),
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help=(f"what is another here: {', '.join(FREE)}"),
    )
    parser.add_argument(
        "--split", choices=("val", "train"), default="val", help="what to measure it on (val)"
    )
    parser.add_argument(
        "--tokens", metavar="N", type=at_least(2), help="only the first N tokens of it (all)"
    )
    parser.add_argument(
        "--best", action="store_true", help="of a run: the checkpoint with the lowest val loss"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (the first GPU if there is one), cpu, cuda:1 …"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of matrix products (the run's)"
    )
    return parser


def main(argv: list[str]) -> int:
    args = options().parse_intermixed_args(argv)
    for word in args.overrides:
        if word.partition("=")[0] not in FREE or "=" not in word:
            raise UserError(
                f"'{word}': an evaluation takes everything from the checkpoint but {', '.join(FREE)}"
            )
    overrides = args.overrides + ([f"train.dtype={args.dtype}"] if args.dtype else [])
    trained = open_checkpoint(
        find_checkpoint(args.model, best=args.best), find_device(args.device), overrides
    )
    dataset = tokens_of(trained)
    started = time.monotonic()
    result, size = measure(trained, dataset, args.split, args.tokens)
    print(table(rows(trained, dataset, args.split, result, size, time.monotonic() - started)))
    return 0


def measure(
    trained: Trained, dataset: Manifest, split: str, tokens: int | None
) -> tuple[EvalResult, int]:
    """The loss over the split's first `tokens` tokens (None: all), and the bytes of its targets."""
    stream = TokenStream(dataset.directory, split)
    limit = min(tokens or stream.tokens, stream.tokens)
    batches = EvalBatches(
        stream, trained.model.config.block_size, trained.experiment.train.micro_batch_size, limit
    )
    targets = EvalSet(batches, trained.tokenizer.byte_lengths)
    targets.batches = Progress(batches, every_s=0.5 if sys.stderr.isatty() else 30)
    result = targets.evaluate(
        trained.model, torch.device(trained.device), autocast(trained.experiment, trained.device)
    )
    return result, targets.bytes


def rows(
    trained: Trained, dataset: Manifest, split: str, result: EvalResult, size: int, seconds: float
) -> dict:
    """The table's lines; `size` in bytes."""
    n_vocab, step = trained.tokenizer.n_vocab, trained.manifest["step"]
    return {
        "checkpoint": f"{trained.checkpoint} (step {step:,})",
        "tokens of": f"{split}, in {dataset.directory}",
        "loss": f"{result.loss:.6f} nats per token (a uniform guess: {math.log(n_vocab):.4f})",
        "logged then": compared(trained, dataset, split, result),
        "perplexity": f"{math.exp(min(result.loss, 700)):,.4f}",
        "bits per byte": f"{result.bits_per_byte:.6f}",
        "targets": f"{result.tokens:,} tokens, {size:,} bytes",
        "computed": f"in {trained.experiment.train.dtype} on {device_name(trained.device)}, "
        f"{result.tokens / seconds:,.0f} tokens/s",
    }


def compared(trained: Trained, dataset: Manifest, split: str, result: EvalResult) -> str | None:
    """The val loss that training logged at this step, where it was measured on the same targets."""
    logged, there = (
        trained.manifest.get("metrics", {}).get("val/loss"),
        dataset.splits["val"].tokens,
    )
    measured = min(trained.experiment.train.eval_tokens or there, there) - 1
    if logged is None or split != "val" or result.tokens != measured:
        return None
    return f"{logged:.6f} ({'the same bits' if logged == result.loss else f'{result.loss - logged:+.1e} now'})"


if __name__ == "__main__":
    guarded(main)
