"""Converts text to token ids and back. The kinds of tokenizers are in the package `tokenizers`.

To add a kind, write a class there and one entry of `TOKENIZERS`.
"""

import difflib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.data.tokenizers.base import TOKENIZER_FILE, Stored, Tokenizer
from orchestrator.data.tokenizers.pairs import (
    TRAINED,
    has_encoding,
    load_encoding,
    load_trained,
    no_download,
    train,
    trained_size,
)
from orchestrator.data.tokenizers.plain import ByteTokenizer, CharacterTokenizer
from orchestrator.errors import UserError
from orchestrator.files import read_json


@dataclass(frozen=True)
class TokenizerKind:
    """How one kind of tokenizer is built.

    Attributes:
        load: Builds it from its name and the content of tokenizer.json, if there is one.
        n_vocab: Number of ids; None if it is not known beforehand.
        learn: Builds it from the characters of a corpus; None if it does not need them.
        train: Builds it from the words of train, with how often each occurs, and calls its second
            argument with the share that is done; None if it does not need them.
        counts: What it makes one token of, if it encodes each character alone.
    """

    load: Callable[[str, Stored | None], Tokenizer]
    n_vocab: int | None = None
    learn: Callable[[str], Tokenizer] | None = None
    train: Callable[[Mapping[str, int], Callable[[float], object]], Tokenizer] | None = None
    counts: Literal["bytes", "characters"] | None = None

    @property
    def needs_corpus(self) -> bool:
        """Whether a corpus must be read to build it."""
        return self.learn is not None or self.train is not None


def _load_characters(_name: str, stored: Stored | None) -> Tokenizer:
    if stored is None:
        problem = f"char takes its characters from a prepared corpus; there is no {TOKENIZER_FILE}"
        raise UserError(f"data.tokenizer: {problem}")
    return CharacterTokenizer(stored["characters"])


TOKENIZERS: dict[str, TokenizerKind] = {
    "byte": TokenizerKind(lambda name, stored: ByteTokenizer(), 257, counts="bytes"),
    "char": TokenizerKind(_load_characters, learn=CharacterTokenizer, counts="characters"),
    # The sizes of tiktoken's encodings are for the dry run, which downloads nothing.
    "gpt2": TokenizerKind(load_encoding, 50257),
    "r50k_base": TokenizerKind(load_encoding, 50257),
    "p50k_base": TokenizerKind(load_encoding, 50281),
    "p50k_edit": TokenizerKind(load_encoding, 50284),
    "cl100k_base": TokenizerKind(load_encoding, 100277),
    "o200k_base": TokenizerKind(load_encoding, 200019),
    "o200k_harmony": TokenizerKind(load_encoding, 201088),
}


def kind_of(name: str) -> TokenizerKind:
    """Return the entry of `TOKENIZERS`, or that of `bpe:SIZE`. An unknown name is a UserError."""
    if name in TOKENIZERS:
        return TOKENIZERS[name]
    if name.startswith(TRAINED):
        size = trained_size(name)
        return TokenizerKind(load_trained, size, train=functools.partial(train, name))
    if has_encoding(name):  # of a plugin or a later version of tiktoken
        return TokenizerKind(load_encoding)
    names = [*TOKENIZERS, "bpe:1024"]
    near = difflib.get_close_matches(name, names, 3, 0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(names)}"
    raise UserError(f"data.tokenizer: '{name}' is unknown; {hint}")


def load_tokenizer(name: str, directory: Path | None = None) -> Tokenizer:
    """Return a tokenizer by name.

    Args:
        name: Value of `data.tokenizer`.
        directory: Folder of a dataset or checkpoint, whose `tokenizer.json` must be the same.

    Raises:
        UserError: The name is unknown, the ranks cannot be downloaded, or the folder has another
            tokenizer.
    """
    stored = None if directory is None else read_json(directory / TOKENIZER_FILE)
    if directory is None or stored is None:
        return kind_of(name).load(name, None)
    made_with = stored.get("name")
    if made_with != name:
        raise UserError(
            f"{directory}: made with tokenizer {made_with!r:.60}, not '{name}'; set data.tokenizer "
            "to the former, or set another data.dir"
        )
    try:
        tokenizer = kind_of(name).load(name, stored)
    except (KeyError, TypeError, UnicodeError):
        raise UserError(f"{directory / TOKENIZER_FILE}: damaged; prepare it again") from None
    if stored.get("sha256") != tokenizer.sha256:
        raise UserError(
            f"{directory}: its ids were made with another '{name}', whose ranks or pattern differ "
            "from those here (another version of tiktoken?)"
        )
    return tokenizer


def has_ranks(name: str) -> bool:
    """Return whether a tokenizer can be loaded without a corpus or a network."""
    try:
        with no_download():
            load_tokenizer(name)
    except UserError:
        return False
    return True
