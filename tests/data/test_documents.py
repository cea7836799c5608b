"""Documents do not depend on where files are cut; errors name file and byte."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.sections import Data
from orchestrator.data.corpus import CorpusFile
from orchestrator.data.documents import read_pieces
from orchestrator.data.tasks import plan_chunks
from orchestrator.errors import UserError


def spans_of(path: Path, chunk_bytes: int, **fields) -> list:
    found = path.stat()
    source = CorpusFile(path.name, path, found.st_size, modified=found.st_mtime_ns)
    return list(itertools.chain(*plan_chunks([source], chunk_bytes, Data(**fields))))


def read_all(path: Path, chunk_bytes: int, **fields) -> list:
    spans = spans_of(path, chunk_bytes, **fields)
    return [piece for span in spans for piece in read_pieces(span)]


@pytest.mark.parametrize("tokenizer", ["gpt2", "byte"])
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), chunk=st.integers(1, 70)
)
def test_pieces_of_a_text_are_the_text(tmp_path_factory, tokenizer, text, chunk):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_bytes(text.encode())
    found = read_all(path, chunk, tokenizer=tokenizer)
    assert "".join(p.text for p in found) == text
    assert [p.starts for p in found] == [True] + [False] * (len(found) - 1)
    assert [p.ends for p in found] == [False] * (len(found) - 1) + [True]


@pytest.mark.parametrize("chunk", [1, 7, 40, 10**6])
def test_every_json_line_is_read_once(tmp_path, chunk):
    texts = ["one", "", "two\r\nlines", "<|endoftext|>", "中文 😀", "x" * 100]
    path = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": t, "n": 1}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
    # A blank line after the first line, and no line end after the last one.
    path.write_bytes("\n".join([lines[0], "", *lines[1:]]).encode())
    found = read_all(path, chunk)
    assert [p.text for p in found] == texts
    data = path.read_bytes()
    for p in found:  # a document's name says where its line begins
        assert json.loads(data[int(p.document.split("@")[1]) :].split(b"\n")[0])["text"] == p.text


@pytest.mark.parametrize("chunk", [9, 40, 10**6])
@pytest.mark.parametrize("name", ["d.json", "d.json.gz", "d.jsonl.zst"])
def test_packed_lines_are_read_once(tmp_path, name, chunk):
    texts = ["one", "", "two\r\nlines", "中文 😀", "x" * 1000]
    data = "\n".join(json.dumps({"text": text}) for text in texts).encode()
    packed = {
        "d.json": data,
        "d.json.gz": gzip.compress(data[:9], mtime=0) + gzip.compress(data[9:]),
    }
    packed["d.jsonl.zst"] = bytes(pa.Codec("zstd").compress(data))
    (tmp_path / name).write_bytes(packed[name])
    found = read_all(tmp_path / name, chunk)
    assert [p.text for p in found] == texts
    for p in found:
        assert json.loads(data[int(p.document.split("@")[1]) :].split(b"\n")[0])["text"] == p.text


@pytest.mark.parametrize("chunk", [1, 300, 10**6])
def test_every_row_of_parquet_is_read_once(tmp_path, chunk):
    texts = [f"document {i} " * (i % 5) for i in range(50)]
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"id": list(range(50)), "text": texts}), path, row_group_size=7)
    found = read_all(path, chunk)
    assert [p.text for p in found] == texts
    assert [p.document for p in found] == [f"d.parquet#{i}" for i in range(50)]


def test_unpaired_surrogate_becomes_a_replacement_character(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert [p.text for p in read_all(path, 100)] == ["a\ufffdb 😀"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.txt", b"abc \xff def", r"t\.txt: byte 4 \(0xff\)"),
        ("t.txt", b"word " * 50 + b"\xe4\xb8", "byte 250"),
        ("d.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "byte 24"),
        ("d.jsonl", b'{"text": "a"}\n{"text": \n', "line at byte 14 is not JSON"),
        ("d.jsonl", b'{"body": "a"}\n', "no field 'text'.*body"),
        ("d.jsonl", b'{"text": null}\n', "not text but None"),
        ("d.jsonl", b"[1]\n", "not a JSON object"),
        ("d.parquet", b"PAR1 no", "cannot be read as Parquet"),
        (
            "d.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 999, mtime=0)[:-9],
            "cannot be read .*Truncated",
        ),
    ],
)
@pytest.mark.parametrize("chunk", [16, 10**6])
def test_error_names_file_and_byte(tmp_path, name, content, says, chunk):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_all(tmp_path / name, chunk)


@pytest.mark.parametrize(
    ("column", "says"),
    [
        ({"body": ["a"]}, "no column 'text'.*body"),
        ({"text": ["a", None]}, "row 1.*on_null=skip"),
        ({"text": [1]}, "is not text but"),
    ],
)
def test_parquet_without_text_is_explained(tmp_path, column, says):
    pq.write_table(pa.table(column), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=says):
        read_all(tmp_path / "d.parquet", 10**6)


def test_footer_of_a_parquet_file_is_read_once_for_all_spans(tmp_path, monkeypatch):
    read, seen = pq.read_metadata, []
    monkeypatch.setattr(pq, "read_metadata", lambda path: seen.append(path) or read(path))
    path = tmp_path / "d.parquet"
    for texts in (["one", "two"], ["three"]):  # the second one replaces the first one
        pq.write_table(pa.table({"text": texts}), path, row_group_size=1)
        assert [p.text for p in read_all(path, 20)] == texts
    assert len(seen) == 2


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(UserError, match="2 columns 'text'"):
        read_all(tmp_path / "d.parquet", 10**6)


def encoded(raw: list, kind: str) -> pa.Array:
    """Return a column of bytes that need not be UTF-8, as another type."""
    column = pa.array(raw, pa.large_binary() if kind == "large_string" else pa.binary())
    if kind == "dictionary":
        values = pa.array([b"", *raw], pa.binary()).view(pa.string())
        return pa.DictionaryArray.from_arrays(pa.array(range(1, len(raw) + 1), pa.int32()), values)
    return column.view(kind)


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "dictionary"])
def test_every_type_of_text_column_is_read(tmp_path, kind):
    raw = [b"a", b"", "中文".encode(), b"b\xffc"]
    pq.write_table(pa.table({"text": encoded(raw, kind)}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match="row 3, byte 1 of 'text' is not UTF-8"):
        read_all(tmp_path / "d.parquet", 10**6)
    found = read_all(tmp_path / "d.parquet", 10**6, invalid_utf8="replace")
    assert [p.text for p in found] == ["a", "", "中文", "b\ufffdc"]


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_null_texts_are_skipped_and_counted_on_request(tmp_path, name):
    texts = [None, "a", None, "", "b"]
    if name == "d.jsonl":
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / name).write_text("\n".join(lines))
    else:
        pq.write_table(pa.table({"text": texts}), tmp_path / name)
    with pytest.raises(UserError, match="data.on_null=skip"):
        read_all(tmp_path / name, 9)
    skipped: list[int] = []
    found = [
        piece.text
        for span in spans_of(tmp_path / name, 9, on_null="skip")
        for piece in read_pieces(span, lambda: skipped.append(1))
    ]
    assert (found, len(skipped)) == (["a", "", "b"], 2)


# ---- a file that changes while it is read ----
WORDS = b'{"text": "some words and more of them"}\n' * 400
CONTENTS = {
    "d.txt": WORDS,
    "d.jsonl": WORDS,
    "d.jsonl.gz": gzip.compress(WORDS * 50, mtime=0),
    "d.json.zst": bytes(pa.Codec("zstd").compress(WORDS * 50)),
    "d.parquet": b"",
}
CHANGES = {
    "shrinks": lambda path: os.truncate(path, path.stat().st_size // 2),
    "grows": lambda path: path.open("ab").write(b'{"text": "new"}\n'),
    "is emptied": lambda path: os.truncate(path, 0),
    "is deleted": lambda path: path.unlink(),
    "is replaced": lambda path: (path.rename(f"{path}.old"), path.write_bytes(b"x" * 999)),
}


@pytest.mark.parametrize("chunk", [1000, 10**7])
@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("change", CHANGES)
def test_file_that_changes_while_it_is_read_is_refused(tmp_path, name, change, chunk):
    path = tmp_path / name
    path.write_bytes(CONTENTS[name])
    if name == "d.parquet":
        texts = [os.urandom(30).hex() for _ in range(5000)]
        pq.write_table(pa.table({"text": texts}), path, row_group_size=500)
    spans = spans_of(path, chunk)
    pieces = read_pieces(spans[0])
    next(pieces)
    CHANGES[change](path)
    word = "deleted" if change == "is deleted" else "changed"
    for rest in (pieces, read_pieces(spans[-1])):
        with pytest.raises(UserError, match=f"{name} was {word} while it was prepared"):
            list(rest)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 60))
def test_spans_cover_every_byte_once_in_order(sizes, chunk_bytes):
    sources = [CorpusFile(f"{n:02d}", Path(f"{n:02d}"), size) for n, size in enumerate(sizes)]
    chunks = plan_chunks(sources, chunk_bytes, Data())
    spans = [span for chunk in chunks for span in chunk]
    assert [span.name for span in spans] == sorted(span.name for span in spans)
    for source in sources:
        mine = [(span.start, span.end) for span in spans if span.name == source.name]
        assert mine[0][0] == 0
        assert mine[-1][1] == source.size
        assert all(left[1] == right[0] for left, right in itertools.pairwise(mine))
    assert all(sum(span.end - span.start for span in chunk) <= chunk_bytes for chunk in chunks)
