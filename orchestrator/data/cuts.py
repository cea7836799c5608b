"""Where a UTF-8 text may be cut so that its pieces, tokenized one by one, give the tokens of the whole.

Eats bytes at an offset; yields the next safe offset. A byte-pair encoding never merges across the pieces that its
pattern finds, so a cut is safe where every pattern ends a piece: after any non-space before a space or tab, after a
letter or digit before a line end or one of the listed marks. Held for the patterns of gpt2 (r50k, p50k), cl100k and
o200k, none of which looks behind. Not safe, though it looks so: after a line end (punctuation swallows it), before
an apostrophe or a combining mark (o200k's letters swallow both), between letters and other non-letters (Ⅷ, ²).
"""

import re
from collections.abc import Callable

# Python's \s has \x1c-\x1f beyond the engine's: stricter on the left, so they are taken out on the right.
SAFE = re.compile(
    r"""(?<=\S)(?=[^\S\r\n\x1c-\x1f])|(?<=[^\W_])(?=[\r\n])"""
    r"""|(?<=[^\W_])(?=[.,;:!?()\[\]{}"=+*…。、，．！？；：])"""
)
PROBE = 4096  # bytes of the first look; the mean distance between two cuts is 5 to 8 characters


def safe_cut(read: Callable[[int, int], bytes], position: int, size: int) -> int:
    """The first safe cut at or after byte `position` of a text of `size` bytes; `size` where there is none.

    It depends on the text around it alone and grows with `position`. A text that is no UTF-8 is cut somewhere;
    whoever decodes the pieces finds out.

    Args:
        read: `read(offset, n)` gives n bytes, fewer at the end.
    """
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    window = PROBE
    while True:
        first = max(0, position - 4)  # a whole character before the first candidate
        data = read(first, position - first + window)
        cut = _first_cut(data, position - first)
        if cut is not None:
            return first + cut
        if first + len(data) >= size:
            return size
        window *= 4


def _first_cut(data: bytes, start: int) -> int | None:
    # surrogateescape keeps one character per undecodable byte, so that offsets survive half characters at both ends.
    while start < len(data) and data[start] & 0xC0 == 0x80:
        start += 1
    before = data[:start].decode("utf-8", "surrogateescape")
    text = data[start:].decode("utf-8", "surrogateescape")
    match = SAFE.search(before + text, len(before))
    return (
        start + len(text[: match.start() - len(before)].encode("utf-8", "surrogateescape"))
        if match
        else None
    )
