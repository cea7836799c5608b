"""Encodes text with gigatoken, about ten times as fast as tiktoken, if its ids are the same.

tiktoken defines the ids, and encodes wherever gigatoken cannot be used. A dataset does not depend
on the encoder.
"""

import base64
import functools
import importlib.metadata
import importlib.util
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from orchestrator.data.tokenizers.base import Tokenizer
from orchestrator.data.tokenizers.pairs import TRAINED
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
INSTALL = "`pip install 'espalier[fast]'`"
# Each pair of these is compared: the ends of words, lines, numbers and characters.
_WORDS = (
    "a The 's 'LL ’ve ſ 7 12345 ² Ⅷ ٣ é e\u0301 中文 한국 हिन्दी ไทย 😀 👩‍👩‍👧 🇩🇪 . ... \"( // _ "
)
_SPACES = " |  |\t|\n|\r\n|\n\n  |\u00a0|\u3000|\x00|\x1c|\u200b|\ufeff|\ufffd"
_LONG = [" " * 70, "x" * 300, "!" * 99, "<|endoftext|>", "".join(map(chr, range(0x20, 0x250)))]
_PARTS = [*_WORDS.split(), *_SPACES.split("|"), *_LONG]


def _pattern(name: str) -> str:
    """Return gigatoken's name for a pattern; none if it does not have it."""
    return "gpt2" if name.startswith(TRAINED) else PATTERNS.get(name, "")


class GigatokenTokenizer(Tokenizer):
    """The ids of another tokenizer, made by gigatoken until it fails."""

    def __init__(self, exact: Tokenizer) -> None:
        super().__init__(exact.name, exact.tokens, exact.special, exact.eot_id, exact.pattern)
        self._exact = exact
        self._failed = False
        # Special tokens are left out: text that looks like one is text.
        self._ranks = b"".join(
            b"%s %d\n" % (base64.b64encode(token), i)
            for i, token in enumerate(exact.tokens)
            if token and i not in exact.special
        )
        self._encoder = self._make()
        self._room = RENEW_BYTES

    def encode(self, text: str) -> np.ndarray:
        if not self._failed:
            try:
                return self.ids(text)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a Rust panic is not an Exception
                self._failed = True
                _say(error)
        return self._exact.encode(text)

    def ids(self, text: str) -> np.ndarray:
        """Return what `encode` returns; raises what gigatoken raises."""
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
            return BPETokenizer.from_tiktoken(file.name, _pattern(self.name))


def _say(problem: object) -> None:
    print(f"data.encoder: gigatoken is not used: {problem!s:.200}", file=sys.stderr, flush=True)


def check_encoder(asked: str, name: str) -> None:
    """Refuse `data.encoder=gigatoken` where it cannot be used.

    Args:
        asked: Value of `data.encoder`.
        name: Value of `data.tokenizer`.

    Raises:
        UserError: It is not installed, or does not have the encoding.
    """
    if asked != "gigatoken":
        return
    if not _pattern(name):
        problem = f"gigatoken has no '{name}', but {', '.join(PATTERNS)}"
    elif not _is_installed():
        problem = f"gigatoken is not installed; {INSTALL}"
    else:
        return
    raise UserError(f"data.encoder: {problem}; or use auto")


def _is_installed() -> bool:
    return importlib.util.find_spec("gigatoken") is not None


def choose_encoder(asked: str, exact: Tokenizer, total: int, sample: Iterable[str]) -> bool:
    """Return whether gigatoken encodes a corpus, and print which encoder does.

    Args:
        asked: Value of `data.encoder`.
        exact: The tokenizer that defines the ids.
        total: Bytes of the corpus.
        sample: Texts of it, which are compared.
    """
    if asked == "auto" and total < LEAST_BYTES or not _pattern(exact.name):
        return False
    if asked == "tiktoken" or not _is_installed():
        advice = "" if asked == "tiktoken" else f"; for a faster one, {INSTALL}"
        print(f"encoder: tiktoken{advice}", flush=True)
        return False
    if fast_tokenizer(exact, sample) is None:
        return False
    print(f"encoder: gigatoken {importlib.metadata.version('gigatoken')}", flush=True)
    return True


def fast_tokenizer(exact: Tokenizer, sample: Iterable[str] = ()) -> Tokenizer | None:
    """Return a tokenizer that uses gigatoken; None if it does not work here or its ids differ.

    Args:
        exact: The tokenizer that defines the ids.
        sample: Texts that are compared, besides the hard ones.
    """
    try:
        fast = _fast_tokenizer(exact)
        _compare(fast, exact, sample)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        _say(error)
        return None
    return fast


def forget() -> None:
    """Free the memory of gigatoken in this process."""
    _fast_tokenizer.cache_clear()


@functools.lru_cache(maxsize=2)
def _fast_tokenizer(exact: Tokenizer) -> GigatokenTokenizer:
    fast = GigatokenTokenizer(exact)
    _compare(fast, exact, [a + b + a for a in _PARTS for b in _PARTS])
    return fast


def _compare(fast: GigatokenTokenizer, exact: Tokenizer, texts: Iterable[str]) -> None:
    for text in texts:
        if not np.array_equal(fast.ids(text), exact.encode(text)):
            raise ValueError(f"it gives other ids for {text[:40]!r}")
