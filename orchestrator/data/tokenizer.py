"""Converts text to token ids and back: tiktoken's encodings, bytes, or characters of a corpus.

A tokenizer is a table of tokens and a pattern. The SHA-256 of both is stored in `tokenizer.json`
beside the ids, so that ids are never read with another table. Text that looks like a special token
is ordinary text.

To add a kind of tokenizer, write a class and one entry of `TOKENIZERS`.
"""

import difflib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from orchestrator.errors import UserError
from orchestrator.files import read_json, write_atomically

TOKENIZER_FILE = "tokenizer.json"


class TokenizerFacts(TypedDict, total=False):
    """What a manifest says about its tokenizer."""

    name: str
    n_vocab: int
    eot_id: int | None  # end of text
    sha256: str


@dataclass(eq=False)
class Tokenizer:
    """Base of all tokenizers. An id is the number of a row in `tokens`."""

    name: str  # value of `data.tokenizer`
    tokens: list[bytes]  # bytes of each id, (n_vocab,); empty for unused ids
    special: frozenset[int] = frozenset()  # ids that encode no text
    eot_id: int | None = None  # end of text
    pattern: str = ""  # regular expression that splits a text before its bytes are merged

    @property
    def n_vocab(self) -> int:
        """Number of ids."""
        return len(self.tokens)

    @property
    def dtype(self) -> np.dtype:
        """Type of the ids: two bytes if they are enough, else four; little-endian."""
        return np.dtype("<u2" if self.n_vocab <= 65536 else "<u4")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each id, (n_vocab,) int64; 0 for special ids."""
        lengths = np.array([len(token) for token in self.tokens], np.int64)
        lengths[list(self.special)] = 0
        return lengths

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of the tokenizer, in hexadecimal digits."""
        rules = json.dumps([self.pattern, sorted(self.special), self.eot_id])
        digest = hashlib.sha256(rules.encode())
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, (tokens,) of `dtype`, without an end-of-text id.

        Raises:
            UserError: The text cannot be encoded.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Invalid UTF-8 and ids outside of the vocabulary become U+FFFD."""
        table = self.tokens
        data = (table[i] if 0 <= i < len(table) else b"\xff" for i in map(int, ids))
        return b"".join(data).decode("utf-8", "replace")

    def facts(self) -> TokenizerFacts:
        """Return what a manifest says about this tokenizer."""
        return {
            "name": self.name,
            "n_vocab": self.n_vocab,
            "eot_id": self.eot_id,
            "sha256": self.sha256,
        }

    def stored(self) -> dict[str, Any]:
        """Return the content of `tokenizer.json`."""
        return {**self.facts()}

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` into `directory`."""
        text = json.dumps(self.stored(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(Path(directory) / TOKENIZER_FILE, text, durable=True)


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and the end-of-text id 256."""

    def __init__(self) -> None:
        tokens = [bytes([i]) for i in range(256)] + [b"<|endoftext|>"]
        super().__init__("byte", tokens, frozenset([256]), eot_id=256)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)


class CharacterTokenizer(Tokenizer):
    """The characters of one corpus, ordered by code point, as in nanoGPT."""

    def __init__(self, characters: str):
        if not characters:
            raise UserError("data.tokenizer: char finds no character in an empty corpus")
        self.characters = "".join(sorted(set(characters)))
        self.code_points = _code_points(self.characters)
        super().__init__("char", [character.encode() for character in self.characters])

    def encode(self, text: str) -> np.ndarray:
        wanted = _code_points(text)
        ids = np.minimum(np.searchsorted(self.code_points, wanted), self.n_vocab - 1)
        unknown = wanted[self.code_points[ids] != wanted]
        if unknown.size > 0:
            raise UserError(
                f"character {chr(unknown[0])!r} is not among the {self.n_vocab} of the corpus; "
                "leave it out"
            )
        return ids.astype(self.dtype)

    def stored(self) -> dict[str, Any]:
        return {**super().stored(), "characters": self.characters}


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


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
        eot_id = special.get("<|endoftext|>")
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


# ---- the table of tokenizers ----

Stored = Mapping[str, Any]  # content of tokenizer.json


@dataclass(frozen=True)
class TokenizerKind:
    """How one kind of tokenizer is built.

    Attributes:
        load: Builds it from its name and the content of tokenizer.json, if there is one.
        n_vocab: Number of ids; None if it is not known beforehand.
        learn: Builds it from the characters of a corpus; None if it needs no corpus.
        counts: What it makes one token of, if it encodes each character alone.
    """

    load: Callable[[str, Stored | None], Tokenizer]
    n_vocab: int | None = None
    learn: Callable[[str], Tokenizer] | None = None
    counts: Literal["bytes", "characters"] | None = None


def _load_characters(_name: str, stored: Stored | None) -> Tokenizer:
    if stored is None:
        problem = f"char takes its characters from a prepared corpus; there is no {TOKENIZER_FILE}"
        raise UserError(f"data.tokenizer: {problem}")
    return CharacterTokenizer(stored["characters"])


def _load_tiktoken(name: str, _stored: Stored | None) -> Tokenizer:
    return _tiktoken(name)


@functools.cache
def _tiktoken(name: str) -> Tokenizer:
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


TOKENIZERS: dict[str, TokenizerKind] = {
    "byte": TokenizerKind(lambda name, stored: ByteTokenizer(), 257, counts="bytes"),
    "char": TokenizerKind(_load_characters, learn=CharacterTokenizer, counts="characters"),
    # The sizes of tiktoken's encodings are for the dry run, which downloads nothing.
    "gpt2": TokenizerKind(_load_tiktoken, 50257),
    "r50k_base": TokenizerKind(_load_tiktoken, 50257),
    "p50k_base": TokenizerKind(_load_tiktoken, 50281),
    "p50k_edit": TokenizerKind(_load_tiktoken, 50284),
    "cl100k_base": TokenizerKind(_load_tiktoken, 100277),
    "o200k_base": TokenizerKind(_load_tiktoken, 200019),
    "o200k_harmony": TokenizerKind(_load_tiktoken, 201088),
}


def kind_of(name: str) -> TokenizerKind:
    """Return the entry of `TOKENIZERS`. An unknown name is a UserError."""
    if name in TOKENIZERS:
        return TOKENIZERS[name]
    import tiktoken

    if name in tiktoken.list_encoding_names():  # of a plugin or a later version of tiktoken
        return TokenizerKind(_load_tiktoken)
    near = difflib.get_close_matches(name, TOKENIZERS, 3, 0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(TOKENIZERS)}"
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
    """Return whether a tokenizer can be loaded without a network."""
    import tiktoken.load

    def refuse(_path: str) -> bytes:
        raise UserError("not on this machine")

    # tiktoken has no function for this. Its download function is replaced during the attempt.
    download = tiktoken.load.read_file
    tiktoken.load.read_file = refuse
    try:
        load_tokenizer(name)
        return True
    except UserError:
        return False
    finally:
        tiktoken.load.read_file = download
