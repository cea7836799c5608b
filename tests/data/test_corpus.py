"""The files of a corpus: their names, order and downloads."""

import base64
import errno
import gzip
import hashlib
import http.server
import itertools
import os
import pwd
import tempfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.data.corpus import fetch, resolve, root_name
from orchestrator.data.input.kinds import kind_of
from orchestrator.errors import UserError
from orchestrator.paths import cache_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    base = tmp_path / "texts"
    for name in ("b.txt", "a.txt", "sub/c.md", ".hidden/x.txt", "sub/.y.txt", "empty.txt"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("" if name == "empty.txt" else name, "utf-8")
    return base


# ---- sources ----
def test_folder_has_its_visible_files_by_name(folder):
    assert [s.name for s in resolve(str(folder))] == [
        "texts/a.txt",
        "texts/b.txt",
        "texts/empty.txt",
        "texts/sub/c.md",
    ]


def test_list_keeps_its_order_and_glob_sorts(folder):
    names = [s.name for s in resolve([str(folder / "sub/c.md"), str(folder / "*.txt")])]
    assert names == ["c.md", "texts/a.txt", "texts/b.txt", "texts/empty.txt"]
    assert [s.name for s in resolve(str(folder / "**/*.md"))] == ["texts/sub/c.md"]


def test_names_do_not_depend_on_the_current_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert [s.name for s in resolve("sub")] == ["sub/c.md"]
    assert resolve("sub")[0].path == folder / "sub/c.md"


def test_file_whose_name_looks_like_a_glob_is_a_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    assert [s.name for s in resolve(str(tmp_path / "a[1].txt"))] == ["a[1].txt"]


def test_standard_library_has_no_tests_and_no_packages():
    names = [s.name for s in resolve("builtin:stdlib")]
    assert "stdlib/argparse.py" in names
    assert names == sorted(names)
    assert not [
        n for n in names if {"test", "tests", "site-packages", "idle_test"} & set(n.split("/"))
    ]


def test_names_begin_with_the_root_name(folder):
    for entry in (str(folder), str(folder / "*.txt"), str(folder / "a.txt"), "builtin:stdlib"):
        assert all(s.name.split("/")[0] == root_name(entry) for s in resolve(entry)), entry


# ---- links ----


@pytest.fixture
def linked(folder) -> Path:
    """The folder with links of every kind, which add one text and three names."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "d.txt").write_text("outside")
    (folder / "a-link").symlink_to(outside)
    (folder / "a-sub").symlink_to("sub")
    (folder / "sub" / "loop").symlink_to("..")
    (folder / "sub" / "loop2").symlink_to("../a-link")
    (folder / "0.txt").symlink_to("b.txt")
    os.link(folder / "a.txt", folder / "hard.txt")
    return folder


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*", "/**/**/*"])
def test_links_are_followed_and_every_file_is_taken_once(linked, pattern):
    listing = resolve(f"{linked}{pattern}")
    assert [s.name for s in listing] == [
        "texts/a-link/d.txt",
        "texts/a.txt",
        "texts/b.txt",
        "texts/empty.txt",
        "texts/sub/c.md",
    ]
    assert len(listing.left_out["another name of a file"]) == 2


def test_file_of_a_linked_folder_keeps_its_own_name(linked):
    assert [s.name for s in resolve(f"{linked}/*/c.md")] == ["texts/sub/c.md"]
    assert [s.name for s in resolve(f"{linked}/a-link")] == ["a-link/d.txt"]


@pytest.mark.parametrize("entry", ["", "/**/*.txt", "/*", "/sub/gone.txt", "/*/**/*"])
def test_link_that_leads_nowhere_is_refused(folder, entry):
    (folder / "sub" / "gone.txt").symlink_to("nowhere")
    (folder / "gone").symlink_to("gone")
    with pytest.raises(UserError, match="gone.* is a link to .*cannot be opened"):
        resolve(f"{folder}{entry}")


def test_file_by_two_names_in_two_entries_is_listed_twice(linked):
    with pytest.raises(UserError, match="listed twice"):
        resolve([str(linked / "a.txt"), str(linked / "hard.txt")])


@pytest.mark.parametrize("name", ["d[x]", "d*", "[a-z]", "q?"])
def test_name_that_exists_is_not_a_pattern(tmp_path, name):
    (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / "dx").mkdir()
    (tmp_path / "dx" / "other.txt").write_text("other")
    (tmp_path / name / "deep" / "a.txt").write_text("text")
    for pattern in ("*/*.txt", "**/*.txt", "deep", "**", "deep/a.txt"):
        found = resolve(f"{tmp_path}/{name}/{pattern}")
        assert [s.path for s in found] == [tmp_path / name / "deep" / "a.txt"], pattern


def test_patterns_find_the_files_that_python_finds(folder):
    import glob

    for name in ("sub/deep/x.txt", "sub/deep/x.md", ".hidden/y.txt", "sub/.hidden/z.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for pattern in (
        "**/*.txt",
        "**/x.*",
        "sub/**/*.txt",
        "*/**/*.md",
        "**/deep/**/*",
        "**/.hidden/*.txt",
        ".hidden/**/*.txt",
        "**/[a-b].txt",
        "*/*.md",
        ".*/*.txt",
        "*/deep/x.*",
        "[s]ub/*/x.txt",
        "*/.hidden/*",
    ):
        expected = glob.glob(str(folder / pattern), recursive=True)
        files = sorted({Path(path) for path in expected if os.path.isfile(path)})
        assert [s.path for s in resolve(str(folder / pattern))] == files, pattern


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt", "*/deep/*.txt"])
def test_folder_that_cannot_be_read_is_refused(folder, pattern, monkeypatch):
    scandir = os.scandir

    def refuse(path):  # the tests may run as root, for whom all folders can be read
        if str(path).endswith("sub/deep" if "deep" in pattern else "sub"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    (folder / "sub" / "deep").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"sub.* cannot be read \(Permission denied\)"):
        resolve(f"{folder}/{pattern}")


# ---- kinds of files ----
LINE = b'{"text": "a record", "n": 1}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 9\n" % 0


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("d.json", LINE * 3, "JSON lines"),
        ("d.json", b"\xef\xbb\xbf\n" + LINE, "JSON lines"),
        ("d.json", b'{"text": "' + b"x" * 100_000 + b'"}\n' + LINE, "JSON lines"),
        ("d.jl", LINE, "JSON lines"),
        ("d.jl", b"println(1)\n", "text"),
        ("d.data", LINE, "JSON lines"),
        ("d.jsonl-00000-of-00512", LINE, "JSON lines"),
        ("d.JSONL", b"nonsense", "JSON lines"),
        ("part-00000", LINE, "JSON lines"),
        ("part-00000", b"{ a text }\n", "text"),
        ("part-00000", b"[1]\n", "text"),
        ("d.txt", LINE, "text"),
        ("d.json.gz", gzip.compress(LINE, mtime=0), "JSON lines"),
        ("part-00000.gz", gzip.compress(LINE, mtime=0), "JSON lines"),
        ("d.jsonl.zst", bytes(pa.Codec("zstd").compress(LINE)), "JSON lines"),
        ("d.jsonl.zstd", bytes(pa.Codec("zstd").compress(LINE)), "JSON lines"),
        ("d.json-00000-of-00512.gz", gzip.compress(LINE, mtime=0), "JSON lines"),
        ("d.txt", gzip.compress(b"text", mtime=0), "compressed"),
        ("d.jsonl", gzip.compress(LINE, mtime=0), "compressed"),
        ("d.txt", b"PK\3\4 a file in a zip archive", "compressed"),
        ("d.json", b"[\n" + LINE + b"]", "JSON document"),
        ("d.json", b'{\n "text": "a"\n}\n', "JSON document"),
        ("d.json.gz", gzip.compress(b"[1]", mtime=0), "JSON document"),
        ("d.csv", b"text\na\n", "CSV"),
        ("d.txt.gz", gzip.compress(b"text", mtime=0), "compressed"),
        ("part-00000.gz", gzip.compress(b"text", mtime=0), "compressed"),
        ("d.tar.zst", b"x", "compressed"),
        ("d.jsonl", POINTER, "Git-LFS pointer"),
        ("d.parquet", POINTER, "Git-LFS pointer"),
        ("part-00000", b"PAR1...", "Parquet"),
        ("d.png", b"\x89PNG\r\n\0\0\0", "binary"),
        ("d.arrow", b"ARROW1", "binary"),
        ("d.bin", "中文".encode() + b"\0", "text"),
    ],
)
def test_kind_of_a_file(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    found = kind_of(tmp_path / name)
    assert found.name == kind
    assert bool(found.problem) == (kind not in ("text", "JSON lines", "Parquet"))
    if found.problem:
        with pytest.raises(UserError, match=f"{name} .*; "):
            resolve(str(tmp_path / name))


@pytest.mark.parametrize(
    ("text", "coding"),
    [
        *itertools.product(
            ["some text of the usual kind\n", "немного текста,\n"],
            ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le"],
        ),
        ("一些文字", "utf-16"),
    ],
)
@pytest.mark.parametrize("name", ["d.txt", "d.md", "d"])
def test_utf16_is_refused(tmp_path, name, coding, text):
    (tmp_path / name).write_text(text * 9, coding)
    with pytest.raises(UserError, match=f"{name} looks like UTF-16.*iconv"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["state.jsonl", "_part.jsonl", "README.parquet"])
def test_files_that_describe_data_are_taken_if_there_are_no_others(tmp_path, name):
    (tmp_path / name).write_bytes(LINE)
    assert [source.path.name for source in resolve(str(tmp_path))] == [name]


def test_control_characters_of_names_are_not_printed(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "b\n\x1b[2J.parquet").write_bytes(b"PAR1")
    line = str(resolve(str(tmp_path)))
    assert line == "1 text, 500 bytes; left out: 1 Parquet ('b\\n\\x1b[2J.parquet')"


def hub_folder(base: Path) -> None:
    """Files as on a hub of datasets and as Spark writes them."""
    (base / "data").mkdir(parents=True)
    (base / "README.md").write_text("about the data " * 1000)
    (base / "dataset_info.json").write_text('{"a": 1}')
    (base / "_SUCCESS").touch()
    (base / ".gitattributes").write_text("x")
    pq.write_table(pa.table({"text": ["a"] * 9}), base / "data" / "0.parquet")
    pq.write_metadata(pa.schema([("text", pa.string())]), base / "data" / "_metadata")


def code_folder(base: Path) -> None:
    """Source code with some data for its tests."""
    (base / "_tests").mkdir(parents=True)
    (base / "README.md").write_text("about the code")
    (base / "__init__.py").write_text("pass\n" * 100)
    (base / "_tests" / "few.jsonl").write_bytes(LINE)
    (base / "_tests" / "few.csv").write_text("a,b\n")


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*"])
@pytest.mark.parametrize(
    ("write", "taken", "left_out"),
    [
        (
            hub_folder,
            ["data/0.parquet"],
            {
                "text": ["README.md", "_SUCCESS"],
                "JSON lines": ["dataset_info.json"],
                "Parquet": ["data/_metadata"],
                "hidden": [".gitattributes"],
            },
        ),
        (
            code_folder,
            ["README.md", "__init__.py"],
            {"JSON lines": ["_tests/few.jsonl"], "CSV": ["_tests/few.csv"]},
        ),
    ],
)
def test_kind_that_holds_the_data_is_taken_and_the_rest_named(
    tmp_path, write, taken, left_out, pattern
):
    write(tmp_path / "c")
    listing = resolve(f"{tmp_path}/c{pattern}")
    assert [s.name for s in listing] == [f"c/{name}" for name in taken]
    assert {reason: sorted(names) for reason, names in listing.left_out.items()} == left_out
    for reason, names in left_out.items():
        assert f"{len(names)} {reason} ({', '.join(names)})" in str(listing)


def test_pointer_beside_data_is_refused(tmp_path):
    hub_folder(tmp_path / "c")
    (tmp_path / "c" / "data" / "1.parquet").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"1\.parquet is a Git-LFS pointer.*git lfs pull"):
        resolve(str(tmp_path / "c"))


# ---- mistakes ----
@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("hdfs:///corpus", "hdfs:///corpus.*only paths"),
        ("s3://Bucket/corpus", "is not s3://BUCKET/KEY"),
        ("S3://bucket/corpus", "is not s3://BUCKET/KEY"),
        ("gs://bucket/a/../b", "'..'"),
        ("s3://key:secret@bucket/corpus", r"s3://\[redacted\]@bucket.*user or a password"),
        ("hf://datasets/a/b", "only paths"),
        ("{}/nowhere.txt", "does not exist"),
        ("{}/*.xyz", "matches no file"),
        ("{}/nothing", "holds no files"),
        ("{}/texts/empty.txt", "holds no text"),
        ("builtin:wiki", "builtin:stdlib"),
        ("https://example.org/a.txt", "#sha256="),
        ("https://example.org/a.txt#sha256=12", "#sha256="),
        (f"https://example.org/a.zip#sha256={'0' * 64}", "unpack"),
        ("{}/packed.txt.gz", "unpack"),
        (["{}/texts", "{}/texts/a.txt"], "twice"),
    ],
)
def test_mistake_is_explained(folder, entry, says):
    base = folder.parent
    (base / "nothing").mkdir()
    (base / "packed.txt.gz").write_bytes(b"x")
    entries = [e.format(base) for e in ([entry] if isinstance(entry, str) else entry)]
    with pytest.raises(UserError, match=says):
        resolve(entries)


# ---- downloads ----
@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve `served/` on loopback. The fixture is (address, folder, paths of the requests,
    their passwords)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served, seen, sent = tmp_path / "served", [], []
    served.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(served))

        def log_message(self, *args):
            seen.append(self.path)
            sent.append(self.headers["Authorization"])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_address[1]}", served, seen, sent
        http_server.shutdown()


def test_download_is_verified_and_cached(server, tmp_path):
    url, served, seen, _ = server
    (served / "input.txt").write_text("some text")
    entry = f"{url}/input.txt#sha256={hashlib.sha256(b'some text').hexdigest()}"
    [source] = resolve(entry)
    assert (source.name, source.size) == ("input.txt", None)
    assert seen == [], "resolving downloads nothing"
    assert fetch(source, tmp_path).path.read_text() == "some text"
    [again] = resolve(entry)
    assert again.size == 9
    assert fetch(again, tmp_path).path.read_text() == "some text"
    assert len(seen) == 1


def test_download_with_another_hash_leaves_nothing(server, tmp_path):
    url, served, *_ = server
    (served / "input.txt").write_text("tampered")
    with pytest.raises(UserError, match="SHA-256"):
        fetch(resolve(f"{url}/input.txt#sha256={'0' * 64}")[0], tmp_path)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_missing_address_is_a_user_error(server, tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(resolve(f"{server[0]}/missing.txt#sha256={'0' * 64}")[0], tmp_path)


def test_cache_without_a_home_directory_is_a_folder_of_this_user(monkeypatch, tmp_path):
    def unknown_user(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME")
    assert cache_folder() == tmp_path / f"espalier-cache-{os.getuid()}"


def test_password_of_a_download_comes_from_variables(server, tmp_path, monkeypatch):
    url, served, seen, sent = server
    (served / "input.txt").write_text("some text")
    secret = url.replace("//", "//$WHO:${HIDDEN}@") + "/input.txt?token=$HIDDEN&v=1"
    [source] = resolve(f"{secret}#sha256={hashlib.sha256(b'some text').hexdigest()}")
    monkeypatch.setenv("WHO", "me")
    with pytest.raises(UserError, match=r"needs \$\{HIDDEN\}; set this environment variable"):
        fetch(source, tmp_path)
    monkeypatch.setenv("HIDDEN", "hunter2hunter2")
    assert fetch(source, tmp_path).path.read_text() == "some text"
    assert seen == ["/input.txt?token=hunter2hunter2&v=1"]
    assert base64.b64decode(sent[0].removeprefix("Basic ")) == b"me:hunter2hunter2"
    (served / "input.txt").unlink()
    with pytest.raises(UserError) as caught:
        fetch(source.__class__(**{**vars(source), "path": tmp_path / "other"}), tmp_path)
    assert "hunter2" not in str(caught.value)
