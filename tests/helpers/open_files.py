"""Opens malicious files as the program would, and prints the outcome and its cost.

Input, on stdin: JSON lines `[kind, path]`. Output: JSON lines `[outcome, message, seconds, bytes]`.
The outcome is `refused` (a `UserError`), `opened`, or the name of another exception. `bytes` is by
how much the memory of the process grew at its peak.
"""

import json
import resource
import sys
from pathlib import Path

import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.data.batches import TokenStream
from orchestrator.data.dataset import load_manifest
from orchestrator.data.documents import Span, read_pieces
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.train import init_from, trained

SHAPE = [
    "model.block_size=16",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=8",
    "model.bias=true",
    "model.pad_vocab_to=1",
]


def open_weights(path: Path) -> None:
    overrides = [*SHAPE, f"train.init_from={json.dumps(str(path))}"]
    init_from.initial_model(load_experiment(None, overrides), 61)


def open_latest(path: Path) -> None:
    if checkpoint.latest_valid(path, lambda _: None) is None:
        raise UserError("no checkpoint is valid")


def open_dataset(path: Path) -> None:
    found = load_manifest(path)
    load_tokenizer(found.tokenizer["name"], path)
    for split in found.splits:
        stream = TokenStream(path, split)
        stream.read(0, min(stream.tokens, 100))


def open_lines(path: Path) -> None:
    size = path.stat().st_size
    list(read_pieces(Span(str(path), path.name, size, 0, size)))


OPEN = {
    "weights": open_weights,
    "checkpoint": checkpoint.verify,
    "latest": open_latest,
    "trained": lambda path: trained.open_checkpoint(path, "cpu"),
    "dataset": open_dataset,
    "tokenizer": lambda path: load_tokenizer("char", path),
    "lines": open_lines,
    "experiment": lambda path: load_experiment(path, []),
}


def resident(key: str) -> int:
    """Return bytes of memory of this process: VmRSS is now, VmHWM the peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise LookupError(key)


if __name__ == "__main__":
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = size + 8 * 2**30  # protects the machine; the test itself compares resident bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        kind, path = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = resident("VmRSS")
        try:
            OPEN[kind](Path(path))
            outcome = ["opened", ""]
        except UserError as error:
            outcome = ["refused", str(error)]
        except BaseException as error:
            outcome = [type(error).__name__, str(error)[:500]]
        print(json.dumps([*outcome, resident("VmHWM") - before]), flush=True)
