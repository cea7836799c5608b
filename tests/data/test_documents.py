"""Documents do not depend on where files are cut; errors name file and byte."""

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.sections import Data
from orchestrator.data.corpus import Source
from orchestrator.data.documents import read_pieces
from orchestrator.data.tasks import plan_chunks
from orchestrator.errors import UserError


def read_all(path: Path, chunk_bytes: int) -> list:
    source = Source(path.name, path, path.stat().st_size)
    chunks = plan_chunks([source], chunk_bytes, Data())
    return [piece for spans in chunks for span in spans for piece in read_pieces(span)]


@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60), chunk=st.integers(1, 70)
)
def test_pieces_of_a_text_are_the_text(tmp_path_factory, text, chunk):
    path = tmp_path_factory.mktemp("t") / "t.txt"
    path.write_bytes(text.encode())
    found = read_all(path, chunk)
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
        ({"text": ["a", None]}, "row 1"),
        ({"text": [1]}, "no text"),
    ],
)
def test_parquet_without_text_is_explained(tmp_path, column, says):
    pq.write_table(pa.table(column), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=says):
        read_all(tmp_path / "d.parquet", 10**6)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 60))
def test_spans_cover_every_byte_once_in_order(sizes, chunk_bytes):
    sources = [Source(f"{n:02d}", Path(f"{n:02d}"), size) for n, size in enumerate(sizes)]
    chunks = plan_chunks(sources, chunk_bytes, Data())
    spans = [span for chunk in chunks for span in chunk]
    assert [span.name for span in spans] == sorted(span.name for span in spans)
    for source in sources:
        mine = [(span.start, span.end) for span in spans if span.name == source.name]
        assert mine[0][0] == 0
        assert mine[-1][1] == source.size
        assert all(left[1] == right[0] for left, right in itertools.pairwise(mine))
    assert all(sum(span.end - span.start for span in chunk) <= chunk_bytes for chunk in chunks)
