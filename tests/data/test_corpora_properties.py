"""The tokens of any corpus decode to its text, document by document, and the counts are right.

Most examples run the tasks in this process, in random order; one runs them on Ray.
"""

import contextlib
import itertools
import json
import random
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.config.sections import Data
from orchestrator.data.batches import TokenStream
from orchestrator.data.corpus import CorpusFile
from orchestrator.data.documents import Span, read_pieces
from orchestrator.data.input import kinds
from orchestrator.data.prepare import prepare
from orchestrator.data.tasks import plan_chunks
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from tests.helpers.here import here

MARKS = 400_000
ODD = [
    "",
    "\0",
    "\ufeff",
    "\ufeffmark first",
    "a\r\nb\rc\n",
    "<|endoftext|>",
    "x<|endoftext|><|fim_prefix|>",
    "!" * 300,
    " " * 90,
    "\u2028\x85\x1c",
    "e\u0301中文😀",
    "\ufffd",
    "'s 'LL",
    "\r\n\r\n",
]
INVALID = [
    b"\xff",
    b"\xc3",
    b"\xe4\xb8",
    b"\xf0\x9f\x98",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\x80\x80",
    b"\xf5\x80",
    b" \xe4 x",
    b"\xef\xbb",
]
TOKENIZERS = ["byte", "char", "gpt2", "bpe:257"]  # too little text for more tokens
# JSON can escape an unpaired surrogate; UTF-8 cannot encode it.
HALVES = st.text(
    st.sampled_from([*'a"\\\n ', "\ud800", "\udc00", "\ude00", "\ud83d", "😀", "\0", "\ufeff"]),
    max_size=12,
)
texts = st.lists(st.sampled_from(ODD) | st.text(max_size=20), max_size=6).map("".join)
# First bytes of files that are refused, which hypothesis finds in our sources.
NOT_TEXT = (*kinds._PACKED, b"\xff\xfe", b"\xfe\xff", b"version https://git-lfs")
blobs = (
    st.lists(st.sampled_from(INVALID) | texts.map(str.encode) | st.binary(max_size=9), max_size=6)
    .map(b"".join)
    .filter(lambda raw: not raw.startswith(NOT_TEXT))
)
lines = (HALVES | texts).map(lambda text: json.dumps({"text": text}).encode()) | blobs.map(
    lambda raw: b'{"text": "' + re.sub(rb'[\x00-\x1f"\\]', b"?", raw) + b'"}'
)
corpora = st.lists(
    st.tuples(st.just("txt"), blobs)
    | st.tuples(st.just("jsonl"), st.lists(lines, max_size=8).map(b"\n".join)),
    min_size=1,
    max_size=7,
)
relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)


def written(folder: Path, files: list[tuple[str, bytes]]) -> list[str]:
    """Write a corpus and return its documents, read by Python.

    Invalid UTF-8 and unpaired surrogates are U+FFFD.
    """
    documents = []
    for number, (kind, content) in enumerate(files):
        (folder / f"{number:04d}.{kind}").write_bytes(content)
        text = content.decode("utf-8", "replace")
        if kind == "txt":
            documents.append(text)
        else:
            read = (
                json.loads(line.removeprefix("\ufeff"))["text"]
                for line in text.split("\n")
                if line.strip()
            )
            documents += [re.sub("[\ud800-\udfff]", "\ufffd", text) for text in read]
    return documents


def check(
    folder: Path, files: list[tuple[str, bytes]], name: str, chunk_bytes: int, ran=here
) -> None:
    """Prepare a corpus and compare the whole dataset with its text."""
    (folder / "c").mkdir()
    documents = written(folder / "c", files)
    whole = "".join(documents)
    data = Data(
        corpus=[f"{folder}/c/{number:04d}.*" for number in range(len(files))],
        tokenizer=name,
        append_eot=name != "char",
        val_fraction=0.5,
        invalid_utf8="replace",
    )
    with ran():
        if len(whole) < 2:
            with pytest.raises(UserError, match=r"holds no text|without a token|no character"):
                prepare(data, folder / "d", progress=lambda *_: None, chunk_bytes=chunk_bytes)
            return
        made = prepare(data, folder / "d", progress=lambda *_: None, chunk_bytes=chunk_bytes)
    tokenizer = load_tokenizer(name, folder / "d")
    streams = {split: TokenStream(folder / "d", split) for split in ("train", "val")}
    ids = {split: np.array(stream.read(0, stream.tokens)) for split, stream in streams.items()}
    both = np.concatenate(list(ids.values()))
    # The whole text, on both sides of the cut.
    cut = len(whole) - -(-len(whole) // 2)
    plain = {
        split: tokenizer.decode(i for i in found.tolist() if i != tokenizer.eot_id)
        for split, found in ids.items()
    }
    assert plain == {"train": whole[:cut], "val": whole[cut:]}
    # Document by document: the end-of-text id follows each document, and occurs nowhere else.
    if tokenizer.eot_id is not None:
        ends = np.flatnonzero(both == tokenizer.eot_id)
        assert [
            tokenizer.decode(both[a + 1 : b]) for a, b in itertools.pairwise([-1, *ends])
        ] == documents
        assert ends[-1] == len(both) - 1
    # The counts.
    assert {split: made.splits[split].tokens for split in ids} == {
        split: len(found) for split, found in ids.items()
    }
    assert {s: made.splits[s].bytes for s in ids} == {
        s: len(text.encode()) for s, text in plain.items()
    }
    assert sum(tokenizer.byte_lengths[found].sum() for found in ids.values()) == len(whole.encode())
    inside = cut not in itertools.accumulate(map(len, documents), initial=0)
    assert sum(s.documents for s in made.splits.values()) == len(documents) + inside
    assert [(s["name"], s["size"]) for s in made.sources] == [
        (f"c/{n:04d}.{kind}", len(content)) for n, (kind, content) in enumerate(files)
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_any_corpus_decodes_to_its_text(gpt2_ranks, name):
    @relaxed
    @given(files=corpora, chunks=st.integers(1, 7))
    @example(files=[("txt", b"")], chunks=1)
    @example(files=[("txt", "\ufeff".encode()), ("jsonl", b""), ("txt", b"\0")], chunks=4)
    @example(
        files=[
            (
                "jsonl",
                b'\xef\xbb\xbf{"text": "\\ud800"}\n\n{"text": ""}\r\n{"text": "\\ud83d\\ude00"}',
            )
        ],
        chunks=7,
    )
    def reads_back(files, chunks):
        with tempfile.TemporaryDirectory() as folder:
            check(
                Path(folder), files, name, sum(len(content) for _, content in files) // chunks + 1
            )

    reads_back()


@pytest.mark.parametrize(("name", "ray"), [("byte", False), ("char", False), ("gpt2", True)])
def test_odd_corpus_decodes_to_its_text(gpt2_ranks, tmp_path, request, name, ray):
    if ray:
        request.getfixturevalue("ray_cluster")
    odd = [text.encode() for text in ODD]
    both = [left + right for left, right in itertools.product(INVALID, odd)]
    lines = [json.dumps({"text": text}).encode() for text in [*ODD, "\ud800", "a\ude00 \ud83d"]]
    files = [*[("txt", content) for content in both], ("jsonl", b"\n".join(lines))]
    check(tmp_path, files, name, 400, contextlib.nullcontext if ray else here)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_runs_huge_and_tiny_documents_decode(gpt2_ranks, tmp_path, name):
    """A run of one mark is one match for tiktoken and cannot be cut."""
    huge = "".join(
        random.Random(0).choices(["word ", "中文。", "\r\n", "!?", "\0", "😀 "], k=200_000)
    )
    tiny = b"\n".join(json.dumps({"text": "<|endoftext|>"[: n % 14]}).encode() for n in range(3000))
    files = [
        ("txt", b"^" * MARKS),
        ("txt", huge.encode()),
        ("txt", b"say" + b"!" * MARKS + b"\xff"),
        ("jsonl", tiny),
        *[("txt", bytes([n])) for n in range(100)],
    ]
    check(tmp_path, files, name, 300_000)


@relaxed
@given(content=blobs, chunk_bytes=st.integers(1, 30))
def test_invalid_utf8_is_replaced_alike_wherever_the_text_is_cut(content, chunk_bytes):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.txt"
        file.write_bytes(content)
        source = CorpusFile("t.txt", file, len(content))
        chunks = plan_chunks([source], chunk_bytes, Data(invalid_utf8="replace"))
        found = [p.text for spans in chunks for span in spans for p in read_pieces(span)]
        assert "".join(found) == content.decode("utf-8", "replace")


@relaxed
@given(files=corpora)
def test_invalid_utf8_is_refused_by_default(files):
    """Invalid UTF-8 is an error with file and byte; other text has the same tokens either way."""
    with tempfile.TemporaryDirectory() as folder, here():
        (Path(folder) / "c").mkdir()
        written(Path(folder) / "c", files)
        names = [f"{folder}/c/{number:04d}.*" for number in range(len(files))]
        data = Data(corpus=names, tokenizer="byte", val_fraction=0.5)
        try:
            made = prepare(data, Path(folder) / "d", progress=lambda *_: None, chunk_bytes=60)
        except UserError as error:
            if "is not UTF-8" in str(error):
                name, at = re.match(r"c/(\d{4})\.\w+: byte (\d+) ", str(error)).groups()
                with pytest.raises(UnicodeDecodeError) as caught:
                    files[int(name)][1].decode()
                assert int(at) >= caught.value.start
            return
        for _, content in files:
            content.decode()
        replaced = prepare(
            data.replace(invalid_utf8="replace"),
            Path(folder) / "r",
            progress=lambda *_: None,
        )
        assert made.splits["train"].stream_sha256 == replaced.splits["train"].stream_sha256


@pytest.mark.parametrize("raw", [b"\xff", b"\xe4\xb8", b"\xed\xa0\x80"])
def test_invalid_utf8_in_parquet_is_replaced(tmp_path, raw):
    import pyarrow as pa
    import pyarrow.parquet as pq

    offsets = pa.py_buffer(np.array([0, len(raw) + 2], "<i4"))
    column = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"a" + raw + b"z")])
    pq.write_table(pa.table({"text": column}), tmp_path / "p.parquet")
    size = (tmp_path / "p.parquet").stat().st_size
    for replace in (True, False):
        span = Span(str(tmp_path / "p.parquet"), "p.parquet", size, 0, size, replace=replace)
        if replace:
            assert [p.text for p in read_pieces(span)] == [
                (b"a" + raw + b"z").decode("utf-8", "replace")
            ]
        else:
            with pytest.raises(UserError, match="row 0, byte 1 of 'text' is not UTF-8"):
                list(read_pieces(span))
