"""Finds the places where a text may be cut: safe cuts, or the beginnings of characters."""

import re
from collections.abc import Iterator
from typing import BinaryIO

# The pieces of a text, tokenized one by one, must give the tokens of the whole text. A byte-pair
# encoding never merges across two matches of its pattern, so a cut is safe where every pattern ends
# a match: after any non-space before a space or tab, after a letter or digit before a line end or a
# listed mark, and after a letter of ASCII before a digit of ASCII. This holds for the patterns of
# gpt2 (r50k, p50k), cl100k and o200k:
# - No pattern has a lookbehind, so the text after a cut is matched as in the whole text.
# - No match continues from a non-space to a space or tab, or from a letter or digit to a line end
#   or a listed mark.
# - The patterns have a lookahead only after whitespace, and a cut comes after a non-space.
#
# Python decides here what is a letter or a digit: its Unicode tables must not be newer than those
# of the tokenizer. tests/data/test_cuts.py compares all characters.
#
# These cuts look safe but are not: after a line end (punctuation is matched together with it),
# before an apostrophe or a combining mark (o200k matches both as parts of a word), and between
# letters and other non-letters (Ⅷ, ²).

# Python's \s also matches \x1c-\x1f, the \s of the patterns does not. No cut is made after these
# characters (\S, on the left) or before them (they are excluded on the right).
# The cut is before the character that matches. The expression begins with that character, and not
# with the lookbehind, because Python finds a set of characters ten times as fast.
_MARKS = r""".,;:!?()\[\]{}"=+*…。、，．！？；："""
SAFE = re.compile(rf"[\s0-9{_MARKS}](?<=\S[^\S\r\n\x1c-\x1f]|[^\W_][\r\n{_MARKS}]|[A-Za-z][0-9])")
PROBE = 4096  # bytes that are searched first; two cuts are 5 to 8 characters apart on average


def safe_cut(file: BinaryIO, position: int, size: int, stop: int | None = None) -> int:
    """Return the first safe cut at or after byte `position`; `size` if there is none.

    The result depends only on the text around it, and grows with `position`. Invalid UTF-8 may be
    cut anywhere; decoding the pieces reports it.

    Args:
        file: A text file, opened for reading bytes.
        position: Byte at which the search starts.
        size: Size of the file.
        stop: Byte at which the search ends, and which is the result if there is no cut before it.
            A search in every span of a file then reads the file once, also if it has no cut.

    Raises:
        EOFError: The file is shorter than `size`.
    """
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    stop = size if stop is None else stop
    first = max(0, position - 4)  # the longest character has 4 bytes
    probe = PROBE
    while True:
        data = read_at(file, first, min(size, stop + 4, position + probe) - first)
        cut = _first_cut(data, position - first)
        if cut is not None:
            return min(stop, first + cut)
        if first + len(data) >= min(size, stop + 4):
            return stop
        probe *= 4


def character_cut(file: BinaryIO, position: int, size: int) -> int:
    """Return the first byte at or after `position` at which a character begins, or `size`.

    A character has at most three bytes that continue it. More are invalid, one by one.
    """
    if position <= 0 or position >= size:
        return min(max(position, 0), size)
    first = max(0, position - 3)
    data = read_at(file, first, min(size, position + 3) - first)
    cut = position - first
    while cut < len(data) and _continues(data[cut]):
        if cut >= 3 and all(map(_continues, data[cut - 3 : cut])):
            break
        cut += 1
    return first + cut


def safe_pieces(text: str, length: int) -> Iterator[str]:
    """Cut a text at the first safe place after each `length` characters."""
    start = 0
    while start < len(text):
        match = SAFE.search(text, start + length)
        end = match.start() if match else len(text)
        yield text[start:end]
        start = end


def read_at(file: BinaryIO, offset: int, length: int) -> bytes:
    """Return bytes of a file.

    Raises:
        EOFError: The file ends before the last of them.
    """
    file.seek(offset)
    data = file.read(length)
    if len(data) < length:
        raise EOFError("it has become shorter")
    return data


def _continues(byte: int) -> bool:
    """Return whether a byte continues a character of UTF-8."""
    return byte & 0xC0 == 0x80


def _first_cut(data: bytes, start: int) -> int | None:
    while start < len(data) and _continues(data[start]):  # inside of a character
        start += 1
    # surrogateescape decodes each invalid byte as one character, also the bytes of incomplete
    # characters at both ends. Offsets therefore stay right.
    before = data[:start].decode("utf-8", "surrogateescape")
    text = data[start:].decode("utf-8", "surrogateescape")
    match = SAFE.search(before + text, len(before))
    if match is None:
        return None
    skipped = text[: match.start() - len(before)]
    return start + len(skipped.encode("utf-8", "surrogateescape"))
