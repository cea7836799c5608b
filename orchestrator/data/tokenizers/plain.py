"""Tokenizers that encode each byte, or each character, alone."""

from typing import Any

import numpy as np

from orchestrator.data.tokenizers.base import Tokenizer
from orchestrator.errors import UserError


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
