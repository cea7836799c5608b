"""Encodes text with gigatoken, about ten times as fast as tiktoken, if its ids are the same.

tiktoken defines the ids, and encodes wherever gigatoken cannot be used. A dataset does not depend
on the encoder.
"""

import base64
import functools
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.data.tokenizer import Tokenizer
from orchestrator.errors import UserError

# Encodings that gigatoken has, and its name for their patterns.
PATTERNS = {
    "gpt2": "gpt2",
    "r50k_base": "gpt2",
    "cl100k_base": "gpt4",
    "o200k_base": "o200k",
    "o200k_harmony": "o200k",
}
# gigatoken 0.10 keeps each new word: ten bytes of memory for each byte of random words. Only a new
# object frees them, in a tenth of a second.
RENEW_BYTES = 32 << 20
# For less text, the comparison with tiktoken takes longer than gigatoken saves.
LEAST_BYTES = 4 << 20
# Each pair of these is compared: the ends of words, lines, numbers and characters.
_WORDS = (
    "a The 's 'LL ’ve ſ 7 12345 ² Ⅷ ٣ é e\u0301 中文 한국 हिन्दी ไทย 😀 👩‍👩‍👧 🇩🇪 . ... \"( // _ "
)
_SPACES = " |  |\t|\n|\r\n|\n\n  |\u00a0|\u3000|\x00|\x1c|\u200b|\ufeff|\ufffd"
_LONG = [" " * 70, "x" * 300, "!" * 99, "<|endoftext|>", "".join(map(chr, range(0x20, 0x250)))]
_PARTS = [*_WORDS.split(), *_SPACES.split("|"), *_LONG]


class GigatokenTokenizer(Tokenizer):
    """The ids of another tokenizer, made by gigatoken."""

    def __init__(self, exact: Tokenizer) -> None:
        super().__init__(exact.name, exact.tokens, exact.special, exact.eot_id, exact.pattern)
        # Special tokens are left out: text that looks like one is text.
        self._ranks = b"".join(
            b"%s %d\n" % (base64.b64encode(token), i)
            for i, token in enumerate(exact.tokens)
            if token and i not in exact.special
        )
        self._encoder = self._make()
        self._room = RENEW_BYTES

    def encode(self, text: str) -> np.ndarray:
        if self._room < 0:
            self._encoder = self._make()
            self._room = RENEW_BYTES
        data = text.encode()
        self._room -= len(data)
        ids: np.ndarray = self._encoder.encode(data)
        return ids.astype(self.dtype)

    def _make(self) -> Any:
        from gigatoken.gigatoken_rs import BPETokenizer

        with tempfile.NamedTemporaryFile(suffix=".tiktoken") as file:
            file.write(self._ranks)
            file.flush()
            return BPETokenizer.from_tiktoken(file.name, PATTERNS[self.name])


def is_possible(asked: str, name: str) -> bool:
    """Return whether gigatoken is here and has an encoding.

    Args:
        asked: Value of `data.encoder`.
        name: Value of `data.tokenizer`.

    Raises:
        UserError: It was asked for, and is not.
    """
    if asked == "tiktoken":
        return False
    if name not in PATTERNS:
        problem = f"gigatoken has no '{name}', but {', '.join(PATTERNS)}; use auto"
    elif importlib.util.find_spec("gigatoken") is None:
        problem = "gigatoken is not installed; use auto, or `pip install 'espalier[fast]'`"
    else:
        return True
    if asked == "gigatoken":
        raise UserError(f"data.encoder: {problem}")
    return False


def fast_tokenizer(exact: Tokenizer, sample: Sequence[str] = ()) -> Tokenizer | None:
    """Return a tokenizer that uses gigatoken; None if it is not here or its ids differ.

    Args:
        exact: The tokenizer that defines the ids.
        sample: Texts that are compared, besides the hard ones.
    """
    if not is_possible("auto", exact.name):
        return None
    try:
        fast = _fast_tokenizer(exact)
        _compare(fast, exact, sample)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        print(f"data.encoder: gigatoken is not used: {error!s:.200}", file=sys.stderr, flush=True)
        return None
    return fast


def forget() -> None:
    """Free the memory of gigatoken in this process."""
    _fast_tokenizer.cache_clear()


@functools.lru_cache(maxsize=2)
def _fast_tokenizer(exact: Tokenizer) -> Tokenizer:
    fast = GigatokenTokenizer(exact)
    _compare(fast, exact, [a + b + a for a in _PARTS for b in _PARTS])
    return fast


def _compare(fast: Tokenizer, exact: Tokenizer, texts: Sequence[str]) -> None:
    for text in texts:
        if not np.array_equal(fast.encode(text), exact.encode(text)):
            raise ValueError(f"it gives other ids for {text[:40]!r}")
