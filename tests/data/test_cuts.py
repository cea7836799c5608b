"""A text that is cut at safe places has the same tokens as the whole text.

Proved by brute force with tiktoken's own regular expressions.
"""

import io
import itertools
import re
import sys

import pytest
import regex
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from orchestrator.data.documents import Span, read_pieces
from orchestrator.data.input import cuts
from orchestrator.data.input.cuts import SAFE, character_cut, safe_cut, safe_pieces
from orchestrator.data.tokenizer import load_tokenizer

PATTERNS = ["gpt2", "cl100k_base", "o200k_base"]
# Characters that the patterns distinguish: letters of both cases, a contraction, two kinds of
# digits, spaces, line ends, marks that are matched together with line ends, a combining mark, an
# ideograph, and a control character that only Python's \s matches.
SYMBOLS = [
    "a",
    "L",
    "s",
    "'",
    "1",
    "Ⅷ",
    " ",
    "\t",
    "\n",
    "\r",
    ".",
    "/",
    "\u0301",
    "中",
    "\u00a0",
    "\x1c",
]
LENGTH = 4
# Wrong rules that look right, and the patterns for which they are wrong. They show that the test of
# every cut can fail.
NOT_SAFE = {
    r"(?= )": {"gpt2", "cl100k_base", "o200k_base"},
    r"(?<=\S)(?=\n)": {"cl100k_base", "o200k_base"},
    r"(?<=\n)(?=\S)": {"gpt2", "o200k_base"},
    r"(?<=[^\W_])(?=')": {"o200k_base"},
    r"(?<=\w)(?=\u0301)": {"o200k_base"},
}


def encoding_of_pieces(name: str, monkeypatch) -> tiktoken.Encoding:
    """The pattern of `name`; every string of up to LENGTH symbols is one token.

    The tokens of a text are then the matches of the pattern.
    """
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {})
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    ranks = {bytes([i]): i for i in range(256)}
    for n in range(1, LENGTH + 1):
        for symbols in itertools.product(SYMBOLS, repeat=n):
            ranks.setdefault("".join(symbols).encode(), len(ranks))
    pattern = openai_public.ENCODING_CONSTRUCTORS[name]()["pat_str"]
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


@pytest.fixture(scope="module", params=PATTERNS)
def exhaustive(request):
    """(encoding, {string: tokens}) over all strings up to LENGTH symbols."""
    with pytest.MonkeyPatch.context() as patch:
        encoding = encoding_of_pieces(request.param, patch)
    strings = [
        "".join(s) for n in range(1, LENGTH + 1) for s in itertools.product(SYMBOLS, repeat=n)
    ]
    return request.param, encoding, {s: encoding.encode_ordinary(s) for s in strings}


def failures(rule: re.Pattern, tokens: dict[str, list[int]]) -> int:
    return sum(
        tokens[s] != tokens[s[:c]] + tokens[s[c:]]
        for s in tokens
        for c in (m.start() for m in rule.finditer(s))
        if 0 < c < len(s)
    )


def test_every_cut_of_every_short_string_is_safe(exhaustive):
    assert failures(SAFE, exhaustive[2]) == 0


def test_unsafe_rules_are_found(exhaustive):
    name, _, tokens = exhaustive
    for rule, where in NOT_SAFE.items():
        assert bool(failures(re.compile(rule), tokens)) == (name in where), rule


def test_letters_and_digits_of_python_are_those_of_the_tokenizers():
    """The Unicode tables of Python 3.11 to 3.13 differ. Those of tiktoken and regex are newer."""
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    alone = {bytes([i]): i for i in range(256)}
    pattern = r"[\p{L}\p{N}]"
    encoding = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=alone, special_tokens={})
    found = set(re.findall(r"[^\W_]", every))
    assert len(found) > 130_000
    # Characters without a match have no token.
    assert found <= set(encoding.decode(encoding.encode_ordinary(every)))
    assert found <= set(regex.findall(pattern, every))


@given(
    text=st.text(
        st.sampled_from([*SYMBOLS, *"😀ſ’_", "\u200d", "\u0bcd", "\v", "\u2028", "\x85"]),
        max_size=80,
    )
)
def test_cuts_of_long_strings_are_safe(exhaustive, text):
    encode = exhaustive[1].encode_ordinary
    at = [0, *(m.start() for m in SAFE.finditer(text)), len(text)]
    assert sum((encode(text[a:b]) for a, b in itertools.pairwise(at)), []) == encode(text)


@given(
    text=st.text(st.sampled_from("ab \n.1中😀\u0301'"), max_size=60),
    window=st.sampled_from([1, 5, 4096]),
)
def test_safe_cut_is_the_first_one_at_or_after_a_byte(text, window):
    data = text.encode()
    safe = [len(text[: m.start()].encode()) for m in SAFE.finditer(text) if m.start() > 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "PROBE", window)
        found = [safe_cut(io.BytesIO(data), p, len(data)) for p in range(len(data) + 2)]
    assert found == [0] + [
        min((c for c in safe if c >= p), default=len(data)) for p in range(1, len(data) + 2)
    ]


@pytest.mark.parametrize(
    "run", ["a" * 20000, "中" * 9000, " " * 20000, "😀" * 6000, "e\u0301" * 5000]
)
def test_run_without_a_cut_stays_whole(run):
    data = f"before {run} after".encode()
    position = len(data) // 2
    cut = safe_cut(io.BytesIO(data), position, len(data))
    assert cut >= len(data) - len(" after")
    assert data[cut:].decode() in (" after", "")


@pytest.mark.parametrize("text", ["ACGT" * 40_000, "中" * 50_000, "so many words " * 10_000])
def test_spans_of_a_text_read_it_a_few_times_however_many_they_are(tmp_path, text, monkeypatch):
    (tmp_path / "t").write_text(text)
    size = len(text.encode())
    read = []
    monkeypatch.setattr(cuts, "read_at", lambda *of, real=cuts.read_at: note(real(*of)))

    def note(data: bytes) -> bytes:
        read.append(len(data))
        return data

    found = []
    for start in range(0, size, 5000):
        span = Span(str(tmp_path / "t"), "t", size, start, min(size, start + 5000))
        found += [piece.text for piece in read_pieces(span)]
    assert "".join(found) == text
    assert sum(read) < 4 * size


@given(st.binary(max_size=12) | st.text(max_size=9).map(str.encode))
def test_pieces_between_characters_decode_as_the_whole(data):
    found = [character_cut(io.BytesIO(data), p, len(data)) for p in range(len(data) + 1)]
    assert all(p <= cut <= p + 3 for p, cut in enumerate(found))
    at = sorted({0, *found})
    pieces = [data[a:b].decode("utf-8", "replace") for a, b in itertools.pairwise(at)]
    assert "".join(pieces) == data.decode("utf-8", "replace")


@given(st.text(st.sampled_from([*SYMBOLS, "b"]), max_size=60), st.integers(1, 20))
def test_pieces_of_a_text_end_at_the_first_safe_cut_after_their_length(text, length):
    pieces = list(safe_pieces(text, length))
    assert "".join(pieces) == text
    starts = list(itertools.accumulate(map(len, pieces[:-1])))
    cuts = [match.start() for match in SAFE.finditer(text)]
    for before, start in zip([0, *starts], starts, strict=False):
        assert start == min(cut for cut in cuts if cut >= before + length)


def test_cuts_of_real_text_are_safe(gpt2_ranks, shakespeare):
    text = shakespeare.read_text("utf-8")[:60000]
    data, encode = text.encode(), load_tokenizer("gpt2").encode
    at = [
        0,
        *(safe_cut(io.BytesIO(data), p, len(data)) for p in range(997, len(data), 997)),
        len(data),
    ]
    pieces = [encode(data[a:b].decode()).tolist() for a, b in itertools.pairwise(at)]
    assert sum(pieces, []) == encode(text).tolist()
