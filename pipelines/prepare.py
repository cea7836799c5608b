#!/usr/bin/env python3
"""Prepare the tokens of an experiment: corpus -> Parquet token shards and a manifest. Training does it by itself."""

import functools
import time

from orchestrator.config.experiment import Experiment
from orchestrator.cost.estimate import show
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import dataset_dir
from orchestrator.errors import EXIT_DONE
from orchestrator.runs.storage import storage_root
from orchestrator.text import duration, table
from pipelines.common import experiment_command


def main(experiment: Experiment) -> int:
    """Prepare what `experiment.data` describes, unless it is there, and show it."""
    started = time.monotonic()
    directory = dataset_dir(experiment.data, storage_root(experiment))
    manifest = prepare(experiment.data, directory)
    rows = {
        "folder": directory,
        "tokenizer": f"{manifest.tokenizer['name']}, {manifest.tokenizer['n_vocab']:,} ids",
    }
    for name, split in manifest.splits.items():
        rows[name] = (
            f"{split.tokens:,} tokens, {split.documents:,} documents, "
            f"{split.bytes / split.tokens:.3f} bytes/token, {len(split.shards)} shards"
        )
    print(
        f"\ntokens\n{table({**rows, 'digest': manifest.digest[:16], 'time': duration(time.monotonic() - started)})}"
    )
    print("\nnext: pipelines/train.py with the same experiment and overrides")
    return EXIT_DONE


if __name__ == "__main__":
    experiment_command(__doc__, main, dry_run=functools.partial(show, timed=False))
