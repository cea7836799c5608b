"""Byte-pair encodings: those of tiktoken, and those that are trained on a corpus.

tiktoken encodes with both.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from orchestrator.data.tokenizers.base import Stored, Tokenizer, TokenizerFacts
from orchestrator.data.tokenizers.merges import PATTERN, learn_merges
from orchestrator.errors import UserError

END_OF_TEXT = "<|endoftext|>"
TRAINED = "bpe:"  # the name of a trained encoding goes on with its size
SMALLEST = 257  # the bytes, and end of text
LARGEST = 1 << 18


class TiktokenTokenizer(Tokenizer):
    """A byte-pair encoding: a `tiktoken.Encoding`."""

    def __init__(self, encoding: Any):
        # tiktoken has no public names for these three tables.
        special = encoding._special_tokens
        tokens = [b""] * encoding.n_vocab
        for token, rank in encoding._mergeable_ranks.items():
            tokens[rank] = token
        for text, i in special.items():
            tokens[i] = text.encode()
        eot_id = special.get(END_OF_TEXT)
        ids = frozenset(special.values())
        super().__init__(encoding.name, tokens, ids, eot_id, encoding._pat_str)
        self.encoding = encoding

    def encode(self, text: str) -> np.ndarray:
        try:
            # The same as encode_ordinary, without a list of Python integers.
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:
            # An overflow raises a ValueError or a Rust panic, which is not an Exception.
            panic = type(error).__name__ == "PanicException"
            if panic or (isinstance(error, ValueError) and "Regex" in str(error)):
                raise UserError(
                    "a run of whitespace too long for tiktoken (about 1,000,000 characters); "
                    "shorten it in the corpus, or use data.tokenizer=byte"
                ) from None
            raise
        return ids.astype(self.dtype)


def load_encoding(name: str, _stored: Stored | None) -> Tokenizer:
    """Return an encoding of tiktoken.

    Raises:
        UserError: Its ranks are not on this machine and cannot be downloaded.
    """
    return _encoding(name)


@functools.cache
def _encoding(name: str) -> Tokenizer:
    import tiktoken

    try:
        return TiktokenTokenizer(tiktoken.get_encoding(name))
    except Exception as error:  # of the network, of the cache, or a wrong hash
        raise UserError(
            f"data.tokenizer: the ranks of '{name}' are not on this machine and cannot be "
            f"downloaded ({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that holds "
            f"them (on a machine with a network, tiktoken.get_encoding('{name}') fills it and "
            "replaces a damaged file), or use data.tokenizer=byte"
        ) from error


def has_encoding(name: str) -> bool:
    """Return whether tiktoken, or a plugin of it, has an encoding."""
    import tiktoken

    return name in tiktoken.list_encoding_names()


@contextlib.contextmanager
def no_download() -> Iterator[None]:
    """Raise a UserError where tiktoken would download ranks."""
    import tiktoken.load

    def refuse(_path: str) -> bytes:
        raise UserError("not on this machine")

    # tiktoken has no function for this.
    download = tiktoken.load.read_file
    tiktoken.load.read_file = refuse
    try:
        yield
    finally:
        tiktoken.load.read_file = download


# ---- trained on a corpus ----


class TrainedTokenizer(TiktokenTokenizer):
    """A byte-pair encoding of `bpe:SIZE` ids: the bytes, tokens merged of them, and end of text."""

    def __init__(self, name: str, merged: list[bytes], trained_characters: int) -> None:
        import tiktoken

        self.merged = merged
        self.trained_characters = trained_characters
        tokens = [*(bytes([i]) for i in range(256)), *merged]
        ranks = {token: i for i, token in enumerate(tokens)}
        special = {END_OF_TEXT: len(tokens)}
        super().__init__(
            tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        )

    def facts(self) -> TokenizerFacts:
        return {**super().facts(), "trained_characters": self.trained_characters}

    def stored(self) -> dict[str, Any]:
        # Each byte as the character U+0000 to U+00FF
        merged = [token.decode("latin-1") for token in self.merged]
        return {**super().stored(), "regex": version("regex"), "merged": merged}


def trained_size(name: str) -> int:
    """Return the number of ids of `bpe:SIZE`.

    Raises:
        UserError: It is not a number, too small or too large.
    """
    digits = name.removeprefix(TRAINED)
    if re.fullmatch("[1-9][0-9]{2,5}", digits) and SMALLEST <= int(digits) <= LARGEST:
        return int(digits)
    raise UserError(
        f"data.tokenizer: '{name:.60}': the size must be a number from {SMALLEST} (the bytes and "
        f"end of text) to {LARGEST}, as in bpe:1024"
    )


def train(
    name: str, words: Mapping[str, int], progress: Callable[[float], object] = lambda _: None
) -> Tokenizer:
    """Train `bpe:SIZE` on how often each word occurs.

    Args:
        name: Value of `data.tokenizer`.
        words: The words, see `merges.count_words`.
        progress: Called with the share that is done, 0 to 1.

    Raises:
        UserError: The words are too few for so many tokens.
    """
    size = trained_size(name)
    merged = learn_merges(words, size - SMALLEST, progress)
    if SMALLEST + len(merged) < size:
        raise UserError(
            f"data.tokenizer: train has too little text for '{name}': no two tokens occur side by "
            f"side twice any more; use bpe:{SMALLEST + len(merged)} or less, or more text"
        )
    return TrainedTokenizer(name, merged, sum(len(word) * n for word, n in words.items()))


def load_trained(name: str, stored: Stored | None) -> Tokenizer:
    """Return the tokenizer that `stored()` wrote."""
    if stored is None:
        raise UserError(f"data.tokenizer: {name} is trained on a corpus that is prepared first")
    merged = [bytes(token, "latin-1") for token in stored["merged"]]
    return TrainedTokenizer(name, merged, stored["trained_characters"])
