"""The base of all tokenizers: a table of tokens, and a pattern.

The SHA-256 of both is stored in `tokenizer.json` beside the ids, so that ids are never read with
another table. Text that looks like a special token is ordinary text.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from orchestrator.files import write_atomically

Stored = Mapping[str, Any]  # content of tokenizer.json
TOKENIZER_FILE = "tokenizer.json"


class TokenizerFacts(TypedDict, total=False):
    """What a manifest says about its tokenizer."""

    name: str
    n_vocab: int
    eot_id: int | None  # end of text
    sha256: str
    trained_characters: int  # only of a trained one: characters that it was trained on


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
