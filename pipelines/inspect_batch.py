#!/usr/bin/env python3
"""Look at one batch as training sees it: shapes, ids, text, the documents it was cut from, logits and the first loss.

The batch is the first micro-batch of the update that takes the run from step N to N + 1, in the order of samples that
training uses; the model is the one that training begins with (`train.init_from=RUN` shows a trained one instead).
Missing tokens are prepared first.

  pipelines/inspect_batch.py
  pipelines/inspect_batch.py configs/shakespeare.yaml --step 9 --rows 1
"""

import json
import math

from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.data.dataset import Manifest
from orchestrator.data.index import documents_of
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import dataset_dir
from orchestrator.data.tokenizer import Tokenizer, load_tokenizer
from orchestrator.runs.storage import storage_root
from orchestrator.text import table
from orchestrator.train.inspect import Batch, Forward, batch_of, first_model, forward
from orchestrator.train.numerics import Worker, available_cpus
from orchestrator.train.trained import find_device
from pipelines.common import Options, at_least, guarded, split_words

LAST = 8  # ids shown of a row, from its end
LIKELIEST = 5


def options() -> Options:
    parser = Options(__doc__, epilog="fields of an experiment: pipelines/train.py --help")
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="EXPERIMENT.yaml | section.field=value",
        help=("an experiment (configs/quickstart.yaml) and what to change in it"),
    )
    parser.add_argument(
        "--step",
        metavar="N",
        type=at_least(0),
        default=0,
        help="updates done before this batch (0)",
    )
    parser.add_argument(
        "--rows", metavar="N", type=at_least(1), default=2, help="sequences of it to show (2)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (the first GPU if there is one), cpu, cuda:1 …"
    )
    return parser


def main(argv: list[str]) -> int:
    args = options().parse_intermixed_args(argv)
    experiment = load_experiment(*split_words(args.words))
    device = find_device(args.device)
    dataset = prepare(experiment.data, dataset_dir(experiment.data, storage_root(experiment)))
    tokenizer = load_tokenizer(experiment.data.tokenizer, dataset.directory)
    batch = batch_of(experiment, dataset.directory, args.step)
    show_batch(experiment, args.step, batch)
    for row in range(min(args.rows, len(batch.inputs))):
        show_row(row, batch, dataset, tokenizer)
    cpus = experiment.compute.cpus_per_worker
    worker = Worker(device=device, cpus=available_cpus() if cpus == "auto" else cpus)
    model = first_model(experiment, tokenizer.n_vocab, worker)
    result = forward(model, batch, experiment, device, tokenizer.n_vocab, LIKELIEST)
    show_model(experiment, model, tokenizer, result)
    for row in range(min(args.rows, len(batch.inputs))):
        show_next(row, result, tokenizer)
    return 0


def show_batch(experiment: Experiment, step: int, batch: Batch) -> None:
    """Shapes, and the one statement that makes a batch a batch."""
    shape = f"{batch.inputs.dtype}, (B, T): B sequences of T tokens"
    print(
        f"{experiment.name}, step {step} → {step + 1}: micro-batch 1 of {experiment.micro_batches}"
    )
    print(
        table(
            {
                "inputs": f"{batch.inputs.shape} {shape}",
                "targets": f"{batch.targets.shape} {shape}",
                "targets are the inputs moved by one": batch.moved_by_one,
            }
        )
    )


def show_row(row: int, batch: Batch, dataset: Manifest, tokenizer: Tokenizer) -> None:
    """Where a row lies in the stream, its last ids and text, and the documents that it was cut from."""
    start, length = int(batch.offsets[row]), batch.inputs.shape[1]
    print(f"\nrow {row}: inputs are tokens {start:,} to {start + length - 1:,} of train")
    for name, ids in (("inputs", batch.inputs[row]), ("targets", batch.targets[row])):
        last = ids[-LAST:]
        print(f"  {name:<7}  … {' '.join(map(str, last))}\n{'':11}… {quoted(tokenizer, last)}")
    for document, begins in documents_of(dataset.directory, "train", start, length + 1):
        print(f"  from     {document}, which begins at token {begins:,}")


def show_model(experiment: Experiment, model, tokenizer: Tokenizer, result: Forward) -> None:
    """The vocabulary, what goes in and comes out, and the loss beside that of a uniform guess."""
    rows, real, source = model.config.vocab_size, tokenizer.n_vocab, experiment.train.init_from
    padded, unpadded = (
        (" rows (padded)", f" (ln {real:,} = {math.log(real):.4f})")
        if rows != real
        else (" rows", "")
    )
    print(
        f"\nmodel ({'random weights' if source == 'scratch' else f'weights of {source}'})\n"
        + table(
            {
                "vocabulary": f"n_vocab {real:,} ids of {tokenizer.name}, vocab_size {rows:,}{padded}",
                "length": f"{model.config.block_size:,} tokens of context",
                "parameters": f"{model.num_parameters():,}",
                "logits with targets": f"{result.with_targets} (B, T, V): a guess at every position",
                "logits without": f"{result.without_targets} (B, 1, V): the last position alone",
                "loss at initialisation"
                if source == "scratch"
                else "loss": f"{result.loss:.4f} nats per token",
                "ln(vocab)": f"{math.log(rows):.4f} = ln {rows:,}, the loss of a uniform guess{unpadded}",
            }
        )
    )


def show_next(row: int, result: Forward, tokenizer: Tokenizer) -> None:
    """The likeliest tokens after a row's inputs."""
    print(
        f"\nlikeliest next tokens after row {row} (a uniform guess gives each {1 / tokenizer.n_vocab:.6f})"
    )
    for i, p in zip(result.next_ids[row], result.probabilities[row], strict=True):
        print(f"  {p:.6f}  {i:>6}  {quoted(tokenizer, [i])}")


def quoted(tokenizer: Tokenizer, ids) -> str:
    """The text of ids on one line."""
    return json.dumps(tokenizer.decode(ids), ensure_ascii=False)


if __name__ == "__main__":
    guarded(main)
