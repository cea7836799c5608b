#!/usr/bin/env python3
"""Prepare the tokens of an experiment: turn a corpus into token shards and a manifest.

Training also does this if the tokens are missing.
"""

from pipelines import starting

starting.end_on_ctrl_c(__name__)

import functools
import time

from orchestrator.config.experiment import Experiment
from orchestrator.cost.estimate import show
from orchestrator.errors import EXIT_DONE
from orchestrator.jobs import restart
from orchestrator.mirror.session import prepare
from orchestrator.mirror.upload import upload_dataset
from orchestrator.objects.store import open_store
from orchestrator.runs.storage import mirror_of, storage_root
from orchestrator.text import duration, table
from pipelines.common import experiment_command


def main(experiment: Experiment) -> int:
    """Prepare the dataset unless it exists, and print its size."""
    started = time.monotonic()
    with restart.watching():
        storage = storage_root(experiment)
        mirror = mirror_of(experiment)
        wait_s = experiment.compute.wait_for_nodes_s
        manifest = prepare(experiment.data, storage, mirror, wait_s=wait_s)
        if mirror is not None and manifest.directory.parent == storage / "data":
            place = mirror / "data" / manifest.directory.name
            upload_dataset(open_store(mirror), place, manifest.directory)
    rows = {
        "folder": str(manifest.directory),
        "tokenizer": f"{manifest.tokenizer['name']}, {manifest.tokenizer['n_vocab']:,} ids",
    }
    for name, split in manifest.splits.items():
        rows[name] = (
            f"{split.tokens:,} tokens, {split.documents:,} documents, "
            f"{split.bytes / split.tokens:.3f} bytes/token, {len(split.shards)} shards"
        )
    rows["digest"] = manifest.digest[:16]
    rows["time"] = duration(time.monotonic() - started)
    print(f"\ntokens\n{table(rows)}")
    print("\nnext: pipelines/train.py with the same experiment and overrides")
    return EXIT_DONE


if __name__ == "__main__":
    experiment_command(__doc__, main, dry_run=functools.partial(show, timed=False))
