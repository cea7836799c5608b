"""Sources in an order of their own, documents out of them wherever they are cut, and mistakes told clearly."""

import hashlib
import http.server
import itertools
import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.experiment import Data
from orchestrator.data.corpus import Source, fetch, resolve, root_name
from orchestrator.data.documents import read_pieces
from orchestrator.data.tasks import plan_chunks
from orchestrator.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    base = tmp_path / "texts"
    for name in ("b.txt", "a.txt", "sub/c.md", ".hidden/x.txt", "sub/.y.txt", "empty.txt"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("" if name == "empty.txt" else name, "utf-8")
    return base


# ---- sources ----
def test_a_folder_is_its_visible_files_by_name(folder):
    assert [s.name for s in resolve(str(folder))] == [
        "texts/a.txt",
        "texts/b.txt",
        "texts/empty.txt",
        "texts/sub/c.md",
    ]


def test_a_list_keeps_its_order_and_a_glob_sorts(folder):
    names = [s.name for s in resolve([str(folder / "sub/c.md"), str(folder / "*.txt")])]
    assert names == ["c.md", "texts/a.txt", "texts/b.txt", "texts/empty.txt"]
    assert [s.name for s in resolve(str(folder / "**/*.md"))] == ["texts/sub/c.md"]


def test_names_do_not_depend_on_the_working_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [s.name for s in resolve("sub")] == ["sub/c.md"]
    assert resolve("sub")[0].path == folder / "sub/c.md"


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert [s.name for s in resolve(str(tmp_path / "a[1].txt"))] == ["a[1].txt"]


def test_the_standard_library_has_no_tests_and_no_packages():
    names = [s.name for s in resolve("builtin:stdlib")]
    assert "stdlib/argparse.py" in names
    assert names == sorted(names)
    assert not [
        n for n in names if {"test", "tests", "site-packages", "idle_test"} & set(n.split("/"))
    ]


def test_names_begin_with_the_root_name(folder):
    for entry in (str(folder), str(folder / "*.txt"), str(folder / "a.txt"), "builtin:stdlib"):
        assert all(s.name.split("/")[0] == root_name(entry) for s in resolve(entry)), entry


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("{}/nowhere.txt", "does not exist"),
        ("{}/*.xyz", "matches no file"),
        ("{}/nothing", "holds no files"),
        ("{}/texts/empty.txt", "holds no text"),
        ("builtin:wiki", "builtin:stdlib"),
        ("https://example.org/a.txt", "#sha256="),
        ("https://example.org/a.txt#sha256=12", "#sha256="),
        ("{}/packed.txt.gz", "unpack"),
        (["{}/texts", "{}/texts/a.txt"], "twice"),
    ],
)
def test_what_is_no_corpus_is_explained(folder, entry, says):
    base = folder.parent
    (base / "nothing").mkdir()
    (base / "packed.txt.gz").write_bytes(b"x")
    entries = [e.format(base) for e in ([entry] if isinstance(entry, str) else entry)]
    with pytest.raises(UserError, match=says):
        resolve(entries)


# ---- downloads ----
@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves `served/` on loopback; downloads are cached below tmp_path. Yields (url, folder, requests so far)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served, seen = tmp_path / "served", []
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, *args):
            seen.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}", served, seen
        http_server.shutdown()


def test_a_download_is_verified_once_and_then_cached(server, tmp_path):
    url, served, seen = server
    (served / "input.txt").write_text("some text")
    entry = f"{url}/input.txt#sha256={hashlib.sha256(b'some text').hexdigest()}"
    [source] = resolve(entry)
    assert (source.name, source.size, seen) == (
        "input.txt",
        None,
        [],
    )  # resolving downloads nothing
    assert fetch(source, tmp_path).path.read_text() == "some text"
    [again] = resolve(entry)
    assert again.size == 9
    assert fetch(again, tmp_path).path.read_text() == "some text"
    assert len(seen) == 1


def test_a_download_that_is_something_else_leaves_nothing(server, tmp_path):
    url, served, _ = server
    (served / "input.txt").write_text("tampered")
    with pytest.raises(UserError, match="SHA-256"):
        fetch(resolve(f"{url}/input.txt#sha256={'0' * 64}")[0], tmp_path)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_an_address_that_does_not_answer_is_a_users_error(server, tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(resolve(f"{server[0]}/missing.txt#sha256={'0' * 64}")[0], tmp_path)


# ---- documents ----
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
def test_every_json_line_is_read_once_wherever_the_file_is_cut(tmp_path, chunk):
    texts = ["one", "", "two\r\nlines", "<|endoftext|>", "中文 😀", "x" * 100]
    path = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": t, "n": 1}, ensure_ascii=i % 2 == 0) for i, t in enumerate(texts)]
    path.write_bytes(
        "\n".join([lines[0], "", *lines[1:]]).encode()
    )  # a blank line, and none at the end
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


def test_half_a_surrogate_pair_in_json_becomes_a_replacement_character(tmp_path):
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
def test_what_cannot_be_read_is_located(tmp_path, name, content, says, chunk):
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
