#!/usr/bin/env python3
"""Evaluate a trained GPT: loss, perplexity and bits per byte over a whole split.

With the device, dtype and number of threads of the run, the loss equals the one that training
logged at this step, to the last bit. With train.compile=true the last digits differ. The tokens
must be those that the run was trained on.

  pipelines/evaluate.py quickstart
  pipelines/evaluate.py runs/quickstart --best --split train --tokens 1000000
  pipelines/evaluate.py copied/step-00001000 data.dir=/data/shakespeare
"""

from pipelines import starting

starting.end_on_ctrl_c(__name__)

from pipelines.common import parse_first, require_model, run_command
from pipelines.options import Options

FREE = ("data.dir", "storage", "train.micro_batch_size", "compute.cpus_per_worker")


def options() -> Options:
    """Return the parser of the command's arguments."""
    parser = Options(__doc__)
    parser.add_model()
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help=f"fields that may differ from the run: {', '.join(FREE)}",
    )
    parser.add_argument(
        "--split", choices=("val", "train"), default="val", help="split to evaluate (default: val)"
    )
    parser.add_number(
        "--tokens", "N", 2, None, "evaluate only the first N tokens of the split (default: all)"
    )
    parser.add_best()
    parser.add_ema()
    parser.add_device()
    parser.add_dtype("that of the run")
    return parser


parse_first(__name__, options().parse_intermixed_args, require_model)

import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.checkpoint.format import CheckpointManifest
from orchestrator.data.batches import EvalBatches, TokenStream, check_unchanged
from orchestrator.data.dataset import Manifest
from orchestrator.errors import EXIT_DONE, UserError
from orchestrator.text import duration, table
from orchestrator.train.evaluate import EvalResult, EvalSet
from orchestrator.train.find import find_checkpoint
from orchestrator.train.numerics import autocast, device_name
from orchestrator.train.trained import Trained, find_device, open_checkpoint, tokens_of


@dataclass(frozen=True)
class Measured:
    """Result of an evaluation.

    Attributes:
        result: Loss and bits per byte.
        targets_bytes: Bytes of the text of all targets.
        seconds: Duration.
    """

    result: EvalResult
    targets_bytes: int
    seconds: float


class Progress:
    """A list of batches that prints its progress to stderr.

    Args:
        batches: The batches, by index.
        every_s: Seconds between two lines, and before the first one.
    """

    def __init__(self, batches: EvalBatches, every_s: float) -> None:
        self.batches = batches
        self.every_s = every_s
        self.started = time.monotonic()
        self.printed = self.started

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Any:
        now = time.monotonic()
        if i > 0 and now - self.printed > self.every_s:
            self.printed = now
            left = (now - self.started) / i * (len(self) - i)
            share = i / len(self)
            self._print(f"batch {i:,} of {len(self):,} ({share:.0%}), {duration(left)} left")
        if i == len(self) - 1 and self.printed > self.started:
            self._print("all batches read")
        return self.batches[i]

    @staticmethod
    def _print(line: str) -> None:
        if sys.stderr.isatty():
            # The next line overwrites this one.
            print(f"{line:<60}", end="\r", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Evaluate one checkpoint and print the result."""
    args = options().parse_intermixed_args(argv)
    for override in args.overrides:
        field, equals, _ = override.partition("=")
        if field not in FREE or not equals:
            raise UserError(
                f"'{override}': cannot be changed for an evaluation; only {', '.join(FREE)} can"
            )
    overrides = list(args.overrides)
    if args.dtype:
        overrides.append(f"train.dtype={args.dtype}")
    checkpoint = find_checkpoint(args.model, best=args.best, data=True)
    if "train.micro_batch_size=auto" in overrides:
        raise UserError("train.micro_batch_size: auto is only known to a run; give a number")
    trained = open_checkpoint(checkpoint, find_device(args.device), overrides, ema=args.ema)
    dataset = tokens_of(trained)
    measured = measure(trained, dataset, args.split, args.tokens)
    print(table(rows(trained, dataset, args.split, measured)))
    return EXIT_DONE


def measure(trained: Trained, dataset: Manifest, split: str, tokens: int | None) -> Measured:
    """Evaluate on the first `tokens` tokens of a split; None: on all of them."""
    started = time.monotonic()
    experiment = trained.experiment
    stream = TokenStream(dataset.directory, split)
    limit = min(tokens or stream.tokens, stream.tokens)
    batches = EvalBatches(
        stream, trained.model.config.block_size, experiment.train.micro_batch_size, limit
    )
    eval_set = EvalSet(batches, trained.tokenizer.byte_lengths)
    eval_set.batches = Progress(batches, every_s=0.5 if sys.stderr.isatty() else 30)
    result = eval_set.evaluate(
        trained.model, torch.device(trained.device), autocast(experiment, trained.device)
    )
    check_unchanged([stream])
    return Measured(result, eval_set.bytes, time.monotonic() - started)


def rows(trained: Trained, dataset: Manifest, split: str, measured: Measured) -> dict[str, Any]:
    """Return the table that the command prints."""
    result = measured.result
    uniform = math.log(trained.tokenizer.n_vocab)
    dtype = trained.experiment.train.dtype
    speed = result.tokens / measured.seconds
    perplexity = math.exp(min(result.loss, 700))  # exp(710) overflows
    return {
        "checkpoint": f"{trained.checkpoint} (step {_manifest(trained)['step']:,})",
        "split": f"{split}, in {dataset.directory}",
        "loss": f"{result.loss:.6f} nats per token (a uniform guess: {uniform:.4f})",
        "logged loss": compare_with_logged(trained, dataset, split, result),
        "perplexity": f"{perplexity:,.4f}",
        "bits per byte": f"{result.bits_per_byte:.6f}",
        "targets": f"{result.tokens:,} tokens, {measured.targets_bytes:,} bytes",
        "computed": f"in {dtype} on {device_name(trained.device)}, {speed:,.0f} tokens/s",
    }


def compare_with_logged(
    trained: Trained, dataset: Manifest, split: str, result: EvalResult
) -> str | None:
    """Return the val loss that training logged at this step, and the difference.

    None if training logged none, or measured it on other targets.
    """
    metric = "val/ema_loss" if trained.is_ema else "val/loss"
    logged = _manifest(trained).get("metrics", {}).get(metric)
    if logged is None or split != "val":
        return None
    all_tokens = dataset.splits["val"].tokens
    tokens_then = min(trained.experiment.train.eval_tokens or all_tokens, all_tokens)
    if result.tokens != tokens_then - 1:
        return None
    if logged == result.loss:
        return f"{logged:.6f} (the same bits)"
    return f"{logged:.6f} ({result.loss - logged:+.1e} now)"


def _manifest(trained: Trained) -> CheckpointManifest:
    assert trained.manifest is not None  # `find_checkpoint` returns a checkpoint of a run
    return trained.manifest


if __name__ == "__main__":
    run_command(main)
