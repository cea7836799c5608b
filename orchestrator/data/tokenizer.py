"""Text to ids and back: every tiktoken encoding by name, plain bytes, or the characters of one corpus.

Eats a name, and the folder of a dataset or checkpoint whose `tokenizer.json` says what it was made with; yields a
`Tokenizer`. A tokenizer is its table of tokens and its pattern; their SHA-256 goes wherever its ids go, so that ids are
never read with another table. Text that looks like a special token is text.
"""

import difflib
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from orchestrator.errors import UserError
from orchestrator.files import write_atomically


class TokenizerFacts(TypedDict, total=False):
    """What a manifest says of its tokenizer."""

    name: str
    n_vocab: int
    eot_id: int | None
    sha256: str


FILE = "tokenizer.json"
MAX_BYTES = 16 << 20  # of that file: all characters of Unicode are 11 MB
# Known without a download, for the dry run.
N_VOCAB = {
    "gpt2": 50257,
    "r50k_base": 50257,
    "p50k_base": 50281,
    "p50k_edit": 50284,
    "cl100k_base": 100277,
    "o200k_base": 200019,
    "o200k_harmony": 201088,
    "byte": 257,
}


class Tokenizer:
    """Common to all: ids are row numbers of `tokens`, a table of bytes; special tokens have a text but no length.

    Args:
        tokens: bytes of each id, (n_vocab,); unused ids are empty.
        special: ids that stand for no text of the corpus.
        pattern: what splits text before it is merged, if anything.
    """

    def __init__(
        self,
        name: str,
        tokens: list[bytes],
        special: frozenset[int],
        eot_id: int | None,
        pattern: str = "",
    ):
        self.name, self.tokens, self.special, self.eot_id, self.pattern = (
            name,
            tokens,
            special,
            eot_id,
            pattern,
        )

    @property
    def n_vocab(self) -> int:
        return len(self.tokens)

    @property
    def dtype(self) -> np.dtype:
        """Of encoded text: two little-endian bytes per id where they are enough, else four."""
        return np.dtype("<u2" if self.n_vocab <= 65536 else "<u4")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, (n_vocab,) int64; 0 for special ones."""
        return np.array(
            [0 if i in self.special else len(t) for i, t in enumerate(self.tokens)], np.int64
        )

    @functools.cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(
            json.dumps([self.pattern, sorted(self.special), self.eot_id]).encode()
        )
        for token in self.tokens:
            digest.update(len(token).to_bytes(4, "little") + token)
        return digest.hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, (tokens,) of `dtype`; never the end-of-text id."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """Text of `ids`; bytes that are no UTF-8 and ids beyond the vocabulary become U+FFFD."""
        table = self.tokens
        return b"".join(table[i] if 0 <= i < len(table) else b"\xff" for i in map(int, ids)).decode(
            "utf-8", "replace"
        )

    def describe(self) -> dict[str, Any]:
        """What a manifest and `tokenizer.json` keep."""
        return {
            "name": self.name,
            "n_vocab": self.n_vocab,
            "eot_id": self.eot_id,
            "sha256": self.sha256,
        }

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json` into `directory`; a reader sees all of it or none."""
        text = json.dumps(self.describe(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(Path(directory) / FILE, text, durable=True)


class _Bytes(Tokenizer):
    def __init__(self):
        super().__init__(
            "byte", [bytes([i]) for i in range(256)] + [b"<|endoftext|>"], frozenset([256]), 256
        )

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)


class _Characters(Tokenizer):
    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        super().__init__("char", [c.encode() for c in self.characters], frozenset(), None)
        self.points = np.frombuffer(self.characters.encode("utf-32-le"), "<u4")

    def encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), "<u4")
        ids = np.minimum(np.searchsorted(self.points, points), len(self.points) - 1)
        unknown = points[self.points[ids] != points]
        if unknown.size:
            raise UserError(
                f"character {chr(unknown[0])!r} is not among the {self.n_vocab} of the corpus; leave it "
                f"out"
            )
        return ids.astype(self.dtype)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "characters": self.characters}


class _Tiktoken(Tokenizer):
    def __init__(self, encoding):
        special = encoding._special_tokens
        tokens = [b""] * encoding.n_vocab
        for token, rank in encoding._mergeable_ranks.items():
            tokens[rank] = token
        for text, i in special.items():
            tokens[i] = text.encode()
        super().__init__(
            encoding.name,
            tokens,
            frozenset(special.values()),
            special.get("<|endoftext|>"),
            encoding._pat_str,
        )
        self.encoding = encoding

    def encode(self, text: str) -> np.ndarray:
        # disallowed_special=() and no allowed ones: encode_ordinary, without a list of Python integers.
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)


def char_tokenizer(characters: str) -> Tokenizer:
    """The tokenizer of a corpus that has these `characters`: ids by code point, no end-of-text, as nanoGPT's."""
    if not characters:
        raise UserError("data.tokenizer: char finds no character in an empty corpus")
    return _Characters(characters)


def load_tokenizer(name: str, directory: Path | None = None) -> Tokenizer:
    """A tokenizer by name, and the one that `directory` was made with where that has a `tokenizer.json`.

    Args:
        name: a tiktoken encoding, `byte` or `char`.
        directory: folder of a dataset or checkpoint; `char` needs one, for its characters.

    Raises:
        UserError: unknown name, no ranks and no network, or the folder was made with another tokenizer.
    """
    stored = _stored(directory)
    if stored and stored["name"] != name:
        raise UserError(
            f"{directory}: made with tokenizer {stored['name']!r:.60}, not '{name}'; set data.tokenizer to "
            f"that, or another data.dir"
        )
    if name == "char":
        if not stored:
            raise UserError(
                f"data.tokenizer: char takes its characters from a prepared corpus, and {directory} has no "
                f"{FILE}"
            )
        tokenizer = _Characters(stored["characters"])
    else:
        tokenizer = _named(name)
    if stored and stored["sha256"] != tokenizer.sha256:
        raise UserError(
            f"{directory / FILE}: its ids were made with another '{name}' than this one (SHA-256 of ranks and "
            f"pattern {stored['sha256'][:12]}, here {tokenizer.sha256[:12]}; another version of tiktoken?)"
        )
    return tokenizer


@functools.cache
def _named(name: str) -> Tokenizer:
    if name == "byte":
        return _Bytes()
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        near = difflib.get_close_matches(name, [*names, "byte", "char"], 3, 0.4)
        raise UserError(
            f"data.tokenizer: '{name}' is unknown; "
            + (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"use byte, char or one of {', '.join(names)}"
            )
        )
    cached = _cached()
    try:
        return _Tiktoken(tiktoken.get_encoding(name))
    except Exception as error:  # requests' many, OSError of the cache, a wrong hash: all mean that there are no ranks
        if damaged := sorted(cached - _cached()):
            raise UserError(
                f"data.tokenizer: the ranks of '{name}' in {damaged[0]} were not what their SHA-256 says; "
                f"tiktoken removed the file and cannot download it again; put a good copy there, or use "
                f"data.tokenizer=byte"
            ) from error
        raise UserError(
            f"data.tokenizer: the ranks of '{name}' are not on this machine and cannot be downloaded "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that holds them (filled by "
            f"tiktoken.get_encoding('{name}') where there is a network), or use data.tokenizer=byte"
        ) from error


def _cached() -> set[str]:
    """Files of tiktoken's cache, which removes those that are not what it expects."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR")
    return (
        {os.path.join(folder, name) for name in os.listdir(folder)}
        if folder and os.path.isdir(folder)
        else set()
    )


def _stored(directory: Path | None) -> dict[str, Any] | None:
    file = Path(directory) / FILE if directory else None
    if not file or not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text("utf-8")) if file.stat().st_size <= MAX_BYTES else {}
        kept = {
            key: stored[key]
            for key in ("name", "sha256", "characters")[: 2 + (stored["name"] == "char")]
        }
        "".join(kept.values()).encode()  # texts, and such that UTF-8 has
        return kept
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{file}: no tokenizer of this program; prepare the dataset again"
        ) from None


def has_ranks(name: str) -> bool:
    """Whether tiktoken finds the ranks of `name` without a network; it cannot be asked, so its reader is muted."""
    import tiktoken.load

    def no_network(_path: str) -> bytes:
        raise UserError("not on this machine")

    reader, tiktoken.load.read_file = tiktoken.load.read_file, no_network
    try:
        load_tokenizer(name)
        return True
    except UserError:
        return False
    finally:
        tiktoken.load.read_file = reader
