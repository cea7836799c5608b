"""CPU time and bits per byte of configurations on one corpus, whatever their tokenizers.

  benchmarks/quickstart.py configs/quickstart.yaml old.yaml --seeds 1 2 3

The steps, evaluations and checkpoints of each run are those of its command, in this process,
without Ray. The bits per byte are those of the first bytes of val, by `pipelines/evaluate.py`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.data.batches import TokenStream
from orchestrator.data.dataset import Manifest
from orchestrator.data.prepare import prepare_in
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.train.trained import open_checkpoint
from pipelines.evaluate import measure


def tokens_of_bytes(dataset: Manifest, size: int) -> int:
    """Return the number of tokens at the beginning of val that have `size` bytes of text."""
    lengths = load_tokenizer(dataset.tokenizer["name"], dataset.directory).byte_lengths
    ids = TokenStream(dataset.directory, "val").read(0, min(size, dataset.splits["val"].tokens))
    return int(np.searchsorted(np.cumsum(lengths[ids]), size)) + 1


def run(experiment: Experiment, storage: Path, threads: int, size: int) -> str:
    """Train one run, and return a row of the table."""
    started = time.process_time()
    dataset = prepare_in(experiment.data, storage)
    prepared = time.process_time()
    folder = RunFolder(Path(tempfile.mkdtemp(dir=storage)))
    wall = time.monotonic()
    train(experiment, folder, dataset.directory, Worker(cpus=threads))
    cpu_s = time.process_time() - prepared
    wall_s = time.monotonic() - wall
    trained = open_checkpoint(folder.checkpoint(experiment.train.max_steps), "cpu")
    result = measure(trained, dataset, "val", tokens_of_bytes(dataset, size)).result
    return (
        f"| {experiment.name} | {experiment.train.seed} | {threads} | {prepared - started:.1f} | "
        f"{cpu_s:.1f} | {wall_s:.0f} | {result.bits_per_byte:.4f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="experiments")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bytes", type=int, default=65536, help="of val that are evaluated")
    parser.add_argument("--set", action="append", default=[], help="an override")
    args = parser.parse_args()
    storage = Path(tempfile.gettempdir()) / "espalier-quickstart"
    storage.mkdir(exist_ok=True)
    torch.set_num_threads(args.threads)
    print("| run | seed | threads | prepare, CPU s | train, CPU s | train, s | bits per byte |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for seed in args.seeds:
        for file in args.files:
            words = [f"train.seed={seed}", f"storage={storage}", *args.set]
            print(run(load_experiment(file, words), storage, args.threads, args.bytes), flush=True)


if __name__ == "__main__":
    main()
