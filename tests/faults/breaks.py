"""Ways to break the product. The campaign must notice each: see `test_breaks.py`.

A break replaces a function in every process of a command. It stands for a mistake in the code.
"""

import json
import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator import files, folders
from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint import store
from orchestrator.data import batches, corpus
from orchestrator.runs import identity
from orchestrator.runs.journal import Journal
from orchestrator.track import outbox
from orchestrator.train import begin, state, step
from orchestrator.train.ranks.exchange import Exchange
from orchestrator.train.ranks.reading import ReadTogether


@dataclass(frozen=True)
class Break:
    """A mistake.

    Attributes:
        title: What is wrong.
        install: Breaks this process.
        kinds: Kinds of `causes.CAUSES` or `CORPORA` that show it.
        shows: Category of the problem that is found; see `report.CATEGORIES`.
        tracked: MLflow is needed to see it.
    """

    title: str
    install: Callable[[], None]
    kinds: tuple[str, ...]
    shows: str = "bits"
    tracked: bool = False


def _hash_of_checkpoints() -> None:
    def verify_sizes(path: Any, parts: Any, *_: Any) -> None:
        for name in parts:
            assert (path / name).is_file()

    checkpoint_format._compare_sizes = verify_sizes
    checkpoint_format._compare_hashes = lambda *_: None


def _journal_of_crashed_run() -> None:
    Journal.rewind = lambda self, step, reduce=None: 0  # type: ignore[method-assign]


def _dropout_of_resume() -> None:
    calls = [0]

    def seed_of_process(seed: int, *key: int) -> int:
        calls[0] += 1
        return seed + calls[0]

    step.keyed_seed = seed_of_process


def _moments_of_optimizer() -> None:
    load = ReadTogether.tensors

    def without_moments(self: Any, name: str, *args: Any) -> Any:
        found = load(self, name, *args)
        if name == "optimizer":
            return {
                key: value * 0 if key.endswith("exp_avg") else value for key, value in found.items()
            }
        return found

    ReadTogether.tensors = without_moments  # type: ignore[method-assign]


def _open_losses() -> None:
    restore = begin.restore

    def without_losses(*args: Any) -> Any:
        found = restore(*args)
        found.meter.losses = []
        return found

    begin.restore = without_losses


def _order_of_batches() -> None:
    offsets = batches.Batches.offsets
    start: list[int] = []

    def counted_from_start(self: Any, step: int) -> Any:
        start.append(step)
        return offsets(self, step - start[0])

    batches.Batches.offsets = counted_from_start  # type: ignore[method-assign]


def _rank_sum() -> None:
    reduce_scatter = Exchange.reduce_scatter

    def inexact(self: Any, *args: Any) -> Any:
        chunk = reduce_scatter(self, *args)
        return chunk.mul_(1 + 1e-7) if self.world_size > 1 else chunk

    Exchange.reduce_scatter = inexact  # type: ignore[method-assign]


def _sent_twice() -> None:
    refresh = outbox.MetricQueue.refresh

    def again(self: Any, sent: Any) -> None:
        refresh(self, sent)
        for batch in list(self._waiting):
            rows = [row._replace(timestamp=row.timestamp + 1) for row in batch.rows]
            self._waiting.append(outbox.Batch(rows, batch.sent_step, batch.asides))

    outbox.MetricQueue.refresh = again  # type: ignore[method-assign]


def _half_sent() -> None:
    rows_of = outbox.rows_of
    outbox.rows_of = lambda line: [] if line["step"] % 2 else rows_of(line)


def _identity_of_data() -> None:
    identity.data_identity = lambda dataset: "same"
    state.data_identity = lambda dataset: "same"
    batches.verify = lambda path, sha256: None


def _order_of_files() -> None:
    resolve = corpus.resolve
    corpus.resolve = lambda entries: corpus.Listing(reversed(resolve(entries)))


def _fsync_of_checkpoints() -> None:
    names = {**vars(os), "fsync": lambda descriptor: None}
    store.os = types.SimpleNamespace(**names)


def _folder_that_was_moved() -> None:
    folders.is_at = lambda *_: True


def _message_for_users() -> None:
    def read_derived(path: Any, parse: Any) -> Any:
        return parse(json.loads(path.read_text())) if path.exists() else None

    files.read_derived = read_derived


BREAKS: dict[str, Break] = {
    "hash": Break("checkpoints are not hashed", _hash_of_checkpoints, ("checkpoint",), ""),
    "fsync": Break("checkpoints are not forced to disk", _fsync_of_checkpoints, ("power",), "loss"),
    "twice": Break("each line is sent twice", _sent_twice, ("driver-term",), "loss", tracked=True),
    "half": Break(
        "every second line is not sent", _half_sent, ("driver-term",), "loss", tracked=True
    ),
    "rewind": Break("a resume keeps later lines", _journal_of_crashed_run, ("driver-kill",)),
    "dropout": Break("dropout depends on the process", _dropout_of_resume, ("driver-kill",)),
    "moments": Break("a moment is not restored", _moments_of_optimizer, ("driver-kill",)),
    "window": Break("losses of the open window are lost", _open_losses, ("driver-kill",)),
    "order": Break("samples are counted from the restart", _order_of_batches, ("driver-kill",)),
    "sum": Break("the sum over ranks is inexact", _rank_sum, ("driver-kill",)),
    "data": Break("a changed shard is not noticed", _identity_of_data, ("shard",)),
    "moved": Break(
        "workers write where their folder was", _folder_that_was_moved, ("removed",), "loss"
    ),
    "traceback": Break(
        "a damaged file is a traceback", _message_for_users, ("run.json",), "traceback"
    ),
    "files": Break(
        "files are read in reverse", _order_of_files, ("brackets", "link-twice"), "silent"
    ),
}
