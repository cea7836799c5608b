"""Size of a dataset: read from its manifest, or estimated before it is prepared."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.config.experiment import Experiment
from orchestrator.cost import timing as cost
from orchestrator.cost.timing import Estimate, Timing
from orchestrator.data.dataset import Manifest
from orchestrator.data.estimate import estimate_tokens
from orchestrator.data.prepared import find_in, known_dir, list_sources
from orchestrator.data.split import tail_cut
from orchestrator.data.tokenizer import kind_of
from orchestrator.runs.storage import storage_root


@dataclass(frozen=True)
class TokenCounts:
    """Size of a dataset. None: unknown until the dataset is prepared.

    Attributes:
        n_vocab: Size of the vocabulary.
        train: Tokens of the split `train`.
        val: Tokens of the split `val`.
        directory: Folder of the token shards, which may not exist yet; None if the corpus was not
            hashed yet.
        is_exact: False if `train` and `val` are estimates.
        corpus: Line that says which files would be prepared; none if they are prepared.
    """

    n_vocab: int | None
    train: int | None
    val: int | None
    directory: Path | None
    is_exact: bool = True
    corpus: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: Manifest) -> "TokenCounts":
        """Return the counts of a prepared dataset."""
        n_vocab = dataset.tokenizer["n_vocab"]
        splits = dataset.splits
        return cls(n_vocab, splits["train"].tokens, splits["val"].tokens, dataset.directory)

    def expected(self, experiment: Experiment, timing: Timing) -> Estimate:
        """Return the cost of a whole run on these tokens. An unknown count is taken as 0."""
        return cost.expected(experiment, self.val or 0, self.train or 0, timing)


def token_counts(experiment: Experiment) -> TokenCounts:
    """Read the size of the dataset from its manifest, or estimate it from the corpus."""
    data = experiment.data
    sources = list_sources(data)
    storage = storage_root(experiment)
    manifest = find_in(data, storage, read=False, sources=sources)
    if manifest is not None:
        return TokenCounts.of(manifest)
    directory = known_dir(data, storage, sources=sources)
    guess = estimate_tokens(data, sources)
    files = () if guess.bytes is None else (f"corpus: {sources}",)
    if guess.tokens is None:
        return TokenCounts(guess.n_vocab, None, None, directory, is_exact=False, corpus=files)
    val = guess.tokens - tail_cut(guess.tokens, data.val_fraction)
    # The split cuts characters or documents, which need not be tokens.
    counts = kind_of(data.tokenizer).counts
    is_exact = guess.exact and counts == "characters" and data.split == "tail"
    return TokenCounts(guess.n_vocab, guess.tokens - val, val, directory, is_exact, files)
