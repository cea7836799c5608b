"""Which split a piece of the corpus belongs to: `train` or `val`."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

from orchestrator.data.documents import Piece, Span, read_pieces, reader_of


def tail_cut(characters: int, val_fraction: float) -> int:
    """Return the number of characters that are train if `split` is `tail`.

    It is computed as an exact fraction: as a float, 1 − 0.9 is less than 0.1.
    """
    return int((1 - Fraction(str(val_fraction))) * characters)


def is_val(content_sha256: str, val_fraction: float) -> bool:
    """Return whether a document is val if `split` is `hash`.

    Only its content decides, so adding other documents never moves it to the other split.
    """
    return int(content_sha256[:16], 16) < val_fraction * 2**64


def split_pieces(
    spans: list[Span],
    train_characters: int | None,
    val_files: set[str],
    val_fraction: float,
    nulls: list[Span],
) -> Iterator[tuple[str, Piece, bool]]:
    """Yield (split, piece, begins): whether a document, or its val part, begins with the piece.

    The span of each null text that is left out is appended to `nulls`.
    """
    for span in spans:
        one_document = train_characters is None and reader_of(span.path).one_document
        for piece in read_pieces(span, functools.partial(nulls.append, span)):
            if train_characters is not None:
                yield from _cut(piece, train_characters)
                train_characters -= len(piece.text)
                continue
            if one_document:
                val = span.path in val_files
            else:
                val = is_val(hashlib.sha256(piece.text.encode()).hexdigest(), val_fraction)
            yield "val" if val else "train", piece, piece.starts


def _cut(piece: Piece, cut: int) -> Iterator[tuple[str, Piece, bool]]:
    """Cut a piece after `cut` characters, which are train. Yields as `split_pieces`."""
    text = piece.text
    if not text and not piece.starts:
        # The empty rest of a document, after which its end-of-text id follows. It belongs to the
        # split of the last character. A document that ends exactly at the cut: its end-of-text id
        # is train.
        yield "val" if cut < 0 else "train", piece, False
    elif cut <= 0:
        yield "val", piece, piece.starts or cut == 0
    elif cut >= len(text):
        yield "train", piece, piece.starts
    else:
        yield "train", replace(piece, text=text[:cut], ends=False), piece.starts
        yield "val", replace(piece, text=text[cut:], starts=False), True
