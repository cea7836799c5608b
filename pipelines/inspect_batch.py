#!/usr/bin/env python3
"""Show one training batch: shapes, ids, text, source documents, logits and the first loss.

The batch is the first micro-batch that training uses for the update from step N to N + 1. The model
is the one that training starts with; for a trained one, set train.init_from=RUN. Missing tokens are
prepared first.

  pipelines/inspect_batch.py
  pipelines/inspect_batch.py configs/shakespeare.yaml --step 9 --rows 1
"""

from pipelines import starting

starting.end_on_ctrl_c(__name__)

from argparse import Namespace

from pipelines.common import parse_first, run_command, split_words
from pipelines.options import Options


def options() -> Options:
    """Return the parser of the command's arguments."""
    parser = Options(__doc__, epilog="fields of an experiment: pipelines/train.py --help")
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="EXPERIMENT.yaml | section.field=value",
        help="an experiment (default: configs/quickstart.yaml) and overrides",
    )
    parser.add_number("--step", "N", 0, 0, "updates before this batch")
    parser.add_number("--rows", "N", 1, 2, "sequences of the batch to show")
    parser.add_device()
    return parser


def check(args: Namespace) -> None:
    """Raise UserError if the experiment, or the run of its first weights, is wrong."""
    from orchestrator.config.experiment import load_experiment
    from orchestrator.train.init_from import require_init_from_exists

    require_init_from_exists(load_experiment(*split_words(args.words)))


parse_first(__name__, options().parse_intermixed_args, check)

import json
import math
from collections.abc import Iterable

from model.protocol import LanguageModel
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.data.dataset import Manifest
from orchestrator.data.index import documents_of
from orchestrator.data.prepare import prepare_in
from orchestrator.data.tokenizer import Tokenizer, load_tokenizer
from orchestrator.errors import EXIT_DONE
from orchestrator.machine import available_cpus
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import storage_root
from orchestrator.text import table
from orchestrator.train.inspect import Batch, Forward, batch_of, first_model, forward
from orchestrator.train.numerics import Worker, resolve_auto
from orchestrator.train.trained import find_device

LAST = 8  # how many ids are shown from the end of a row
LIKELIEST = 5  # how many next tokens are shown


def main(argv: list[str]) -> int:
    """Print one batch and the output of the model for it."""
    args = options().parse_intermixed_args(argv)
    device = find_device(args.device)
    experiment = load_experiment(*split_words(args.words))
    folder = RunFolder(storage_root(experiment) / experiment.name)
    cpus = experiment.compute.cpus_per_worker
    worker = Worker(device=device, cpus=available_cpus() if cpus == "auto" else cpus)
    experiment = resolve_auto(experiment, folder, worker)
    dataset = prepare_in(experiment.data, storage_root(experiment))
    tokenizer = load_tokenizer(experiment.data.tokenizer, dataset.directory)
    batch = batch_of(experiment, dataset.directory, args.step)
    rows = range(min(args.rows, len(batch.inputs)))
    show_batch(experiment, args.step, batch)
    for row in rows:
        show_row(row, batch, dataset, tokenizer)

    model = first_model(experiment, tokenizer.n_vocab, worker)
    result = forward(model, batch, experiment, device, tokenizer.n_vocab, LIKELIEST)
    show_model(experiment, model, tokenizer, result)
    for row in rows:
        show_next(row, result, tokenizer)
    return EXIT_DONE


def show_batch(experiment: Experiment, step: int, batch: Batch) -> None:
    """Print the shapes, and whether the targets are the inputs moved by one."""
    count = experiment.batch_sizes.at(step) // experiment.train.micro_batch_size
    print(f"{experiment.name}, step {step} → {step + 1}: micro-batch 1 of {count}")
    legend = f"{batch.inputs.dtype}, (B, T): B sequences of T tokens"
    rows = {
        "inputs": f"{batch.inputs.shape} {legend}",
        "targets": f"{batch.targets.shape} {legend}",
        "targets are the inputs moved by one": batch.moved_by_one,
    }
    print(table(rows))


def show_row(row: int, batch: Batch, dataset: Manifest, tokenizer: Tokenizer) -> None:
    """Print the position of a row in the token stream, its last ids and text, and its documents."""
    start = int(batch.offsets[row])
    length = batch.inputs.shape[1]
    print(f"\nrow {row}: inputs are tokens {start:,} to {start + length - 1:,} of train")
    for name, ids in (("inputs", batch.inputs[row]), ("targets", batch.targets[row])):
        last = ids[-LAST:]
        print(f"  {name:<7}  … {' '.join(map(str, last))}")
        print(f"           … {quoted(tokenizer, last)}")
    for document, begins in documents_of(dataset.directory, "train", start, length + 1):
        print(f"  from     {document}, which begins at token {begins:,}")


def show_model(
    experiment: Experiment, model: LanguageModel, tokenizer: Tokenizer, result: Forward
) -> None:
    """Print the vocabulary, the shapes, and the loss of the model and of a uniform guess."""
    vocab_size = model.config.vocab_size
    n_vocab = tokenizer.n_vocab
    vocabulary = f"n_vocab {n_vocab:,} ids of {tokenizer.name}, vocab_size {vocab_size:,} rows"
    uniform = f"{math.log(vocab_size):.4f} = ln {vocab_size:,}, the loss of a uniform guess"
    if vocab_size != n_vocab:
        vocabulary += " (padded)"
        uniform += f" (ln {n_vocab:,} = {math.log(n_vocab):.4f})"
    source = experiment.train.init_from
    is_new = source == "scratch"
    rows = {
        "vocabulary": vocabulary,
        "length": f"{model.config.block_size:,} tokens of context",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "logits": f"{result.logits} (B, 1, V): of the last position",
        "loss at initialization" if is_new else "loss": f"{result.loss:.4f} nats per token",
        "ln(vocab)": uniform,
    }
    print(f"\nmodel ({'random weights' if is_new else f'weights of {source}'})")
    print(table(rows))


def show_next(row: int, result: Forward, tokenizer: Tokenizer) -> None:
    """Print the most probable tokens after the inputs of a row."""
    uniform = 1 / tokenizer.n_vocab
    print(f"\nlikeliest next tokens after row {row} (a uniform guess gives each {uniform:.6f})")
    for i, p in zip(result.next_ids[row], result.probabilities[row], strict=True):
        print(f"  {p:.6f}  {i:>6}  {quoted(tokenizer, [i])}")


def quoted(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Return the text of ids on one line."""
    return json.dumps(tokenizer.decode(ids), ensure_ascii=False)


if __name__ == "__main__":
    run_command(main)
