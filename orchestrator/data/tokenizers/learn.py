"""Builds the tokenizers that need a corpus, from its characters or from the words of its train."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from orchestrator.data import tasks
from orchestrator.data.input.download import Progress
from orchestrator.data.split import tail_cut
from orchestrator.data.tasks import Job
from orchestrator.data.tokenizer import kind_of, load_tokenizer
from orchestrator.data.tokenizers import merges
from orchestrator.data.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from orchestrator.config.sections import Data

# Runs a task for each job; takes (stage, task, jobs, bytes of each).
Map = Callable[[str, Callable[..., Any], list[Job], list[int]], list[Any]]


def tokenizer_of(
    data: "Data", jobs: list[Job], sizes: list[int], run: Map, progress: Progress
) -> Tokenizer:
    """Load a tokenizer, or build it from the corpus.

    Args:
        data: The `data` section.
        jobs: The arguments of `tasks.tokenize` for each chunk.
        sizes: Bytes of each chunk.
        run: Runs the tasks.
        progress: Called with (stage, bytes done, bytes in all).

    Raises:
        UserError: The corpus has too little text, or the ranks cannot be downloaded.
    """
    kind = kind_of(data.tokenizer)
    if not kind.needs_corpus:
        return load_tokenizer(data.tokenizer)
    found = run("reading", tasks.survey, [{"spans": job["spans"]} for job in jobs], sizes)
    if kind.learn is not None:
        return kind.learn("".join(seen for _, seen in found))
    assert kind.train is not None
    words = _words(data, jobs, sizes, [count for count, _ in found], run)
    size = sum(sizes)
    return kind.train(words, lambda share: progress("merging", int(share * size), size))


def _words(
    data: "Data", jobs: list[Job], sizes: list[int], counts: list[int], run: Map
) -> Counter[str]:
    """Count the words of train, or of a sample of it; `counts` has the characters of each chunk."""
    total = sum(counts)
    if data.split == "tail":
        total = tail_cut(total, data.val_fraction)
    chosen = {}
    before = 0
    for i, job in enumerate(jobs):
        cut = total - before if data.split == "tail" else None
        if any(merges.windows(before, counts[i], total)) and (cut is None or cut > 0):
            chosen[i] = {
                "spans": job["spans"],
                "train_characters": cut,
                "val_files": job["val_files"],
                "before": before,
            }
        before += counts[i]
    task = functools.partial(tasks.count_words, total=total, val_fraction=data.val_fraction)
    words: Counter[str] = Counter()
    for found in run("counting", task, list(chosen.values()), [sizes[i] for i in chosen]):
        words.update(found)
    return words
