"""The files of a corpus: their names, order and downloads."""

import hashlib
import http.server
import os
import pwd
import tempfile
import threading
from pathlib import Path

import pytest

from orchestrator.data.corpus import fetch, resolve, root_name
from orchestrator.errors import UserError
from orchestrator.files import cache_folder


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
    """Serve `served/` on loopback. The fixture is (address, folder, paths of the requests)."""
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


def test_download_is_verified_and_cached(server, tmp_path):
    url, served, seen = server
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
    url, served, _ = server
    (served / "input.txt").write_text("tampered")
    with pytest.raises(UserError, match="SHA-256"):
        fetch(resolve(f"{url}/input.txt#sha256={'0' * 64}")[0], tmp_path)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_missing_address_is_a_user_error(server, tmp_path):
    with pytest.raises(UserError, match="cannot be downloaded"):
        fetch(resolve(f"{server[0]}/missing.txt#sha256={'0' * 64}")[0], tmp_path)


def test_cache_without_a_home_directory_is_a_folder_of_this_user(monkeypatch, tmp_path):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME")
    assert cache_folder() == tmp_path / f"espalier-cache-{os.getuid()}"
