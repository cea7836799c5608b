"""A corpus in a bucket gives the dataset of a local copy, also through faults of the store."""

import random
import sys
from pathlib import Path

import pytest

from orchestrator.data import tasks
from orchestrator.data.corpus import resolve
from orchestrator.data.input import objects
from orchestrator.data.prepare import prepare
from orchestrator.errors import UserError
from orchestrator.objects import cache, s3
from orchestrator.objects.store import Content, Info, StoreAwayError, open_store
from tests.helpers.bucket import FAULTS
from tests.helpers.datasets import data, hashes_of, quiet, write_mixed


def upload(bucket, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            bucket.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture
def mixed(bucket, tmp_path):
    """The corpus of `write_mixed`, here and in a bucket; its globs there."""
    folder = tmp_path / "corpus"
    write_mixed(folder)
    upload(bucket, folder, "deep/corpus")
    globs = ("[ab]*.txt", "*.jsonl", "*.parquet", "[e-z]*.txt")
    return folder, [f"{bucket.address}/deep/corpus/{pattern}" for pattern in globs]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_dataset_of_a_bucket_is_that_of_the_local_files(mixed, bucket, tmp_path, fault):
    folder, entries = mixed
    prepare(data(folder), tmp_path / "local", progress=quiet)
    draw = random.Random(fault)
    bucket.proxy.decide = lambda *_: fault if draw.random() < 0.3 else ""
    prepare(data(entries), tmp_path / "remote", progress=quiet)
    assert hashes_of(tmp_path / "remote") == hashes_of(tmp_path / "local")


def test_node_without_the_copies_gets_them(mixed):
    _, entries = mixed
    listing = resolve(entries)
    chunks = tasks.plan_chunks(listing, 1 << 20, data(entries))
    contents = [source.path.read_bytes() for source in listing]
    for source in listing:
        source.path.unlink()
    tasks._here([vars(span) for span in chunks[0]])
    assert [source.path.read_bytes() for source in listing] == contents
    span = vars(chunks[0][0])
    with pytest.raises(UserError, match="XDG_CACHE_HOME to the same folder on all nodes"):
        tasks._here([{**span, "path": "/other/cache/x.txt"}])
    for source in listing:
        source.check_unchanged()


@pytest.mark.parametrize(
    "pattern", ["", "/*", "/**", "/**/*.md", "/sub/*.txt", "/s*/b.txt", "/a.txt"]
)
def test_folders_and_globs_take_what_they_take_locally(bucket, tmp_path, pattern, monkeypatch):
    monkeypatch.setattr(s3, "PAGE", 2)  # a listing has several answers
    folder = tmp_path / "c"
    for name in ("a.txt", "x.md", "sub/b.txt", "sub/deep/d.md", ".hidden/e.txt", "sub/.f.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    upload(bucket, folder, "p/c")
    bucket.put("p/c/", b"")  # the mark of a folder
    bucket.put("p/c2/a.txt", b"of another folder")
    here = resolve(f"{folder}{pattern}")
    there = resolve(f"{bucket.address}/p/c{pattern}")
    assert [s.name for s in there] == [s.name for s in here]
    assert [s.path.read_bytes() for s in there] == [s.path.read_bytes() for s in here]


def test_unchanged_object_is_copied_once_and_a_changed_one_again(bucket):
    bucket.put("c/a.txt", b"first")
    entry = f"{bucket.address}/c/a.txt"
    first = resolve(entry)[0]
    before = bucket.proxy.count
    assert resolve(entry)[0] == first
    assert bucket.proxy.count == before + 1, "only the listing"
    bucket.put("c/a.txt", b"other")
    assert resolve(entry)[0].path.read_bytes() == b"other"
    assert resolve(entry)[0].sha256 != first.sha256


def test_key_that_is_no_path_leads_nowhere(bucket, monkeypatch):
    class Listing:
        def list(self, prefix):
            for name in ("../../evil.txt", "/twice.txt", "a\nb.txt", ".", "good.txt"):
                yield Info(f"{prefix}/{name}", 4, "v", 0.0)

        def get(self, *_):
            return Content(b"text", "v")

    monkeypatch.setattr(objects, "open_store", lambda _: Listing())
    listing = resolve(f"{bucket.address}/c")
    assert [source.name for source in listing] == ["c/good.txt"]
    assert len(listing.left_out["key that is no path"]) == 4


# ---- refusals: one line each ----


@pytest.mark.parametrize(
    ("entry", "fault", "error", "says"),
    [
        ("{}/nowhere/*.txt", "", UserError, "matches no object"),
        ("{}-other/c", "", UserError, "there is no such bucket"),
        ("{}/c", "403 ExpiredToken", UserError, "credentials have expired"),
        ("{}/c", "403 InvalidAccessKeyId", UserError, "credentials are wrong"),
        ("{}/c", "403 AccessDenied", UserError, "may not do this"),
        ("{}/c", "503 SlowDown", StoreAwayError, "does not answer.*run the same command again"),
        ("{}/c", "reset", StoreAwayError, "does not answer.*run the same command again"),
    ],
)
def test_store_that_refuses_is_one_line(bucket, monkeypatch, entry, fault, error, says):
    bucket.put("c/a.txt", b"text")
    bucket.proxy.decide = lambda *_: fault
    monkeypatch.setattr(objects, "open_store", lambda address: open_store(address, 0.3))
    with pytest.raises(error, match=says) as caught:
        resolve(entry.format(bucket.address))
    assert "\n" not in str(caught.value)
    assert "secret-of-the-tests" not in str(caught.value)


def test_no_credentials_are_one_line(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError, match="there are no credentials"):
        resolve(f"{bucket.address}/c")


# ---- the cache ----


def test_cache_is_bounded_and_removes_what_was_used_longest_ago(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in "abcd":
        bucket.put(f"{name}/x.txt", name.encode() * 1000)
    monkeypatch.setenv(cache.VARIABLE, "0.0000025")  # 2,500 bytes
    monkeypatch.setattr(cache, "_held", {})  # as if each entry was used by another process
    paths = {}
    for name in "abc":
        paths[name] = resolve(f"{bucket.address}/{name}")[0].path
        for file in cache._held.values():
            file.close()
        cache._held.clear()
    assert [path.exists() for path in paths.values()] == [False, True, True]
    resolve(f"{bucket.address}/b")  # stays in use
    resolve(f"{bucket.address}/d")
    assert paths["b"].exists()
    assert not paths["c"].exists()
    with pytest.raises(UserError, match=f"no room.*{cache.VARIABLE}"):
        resolve(f"{bucket.address}/c")


def test_missing_boto3_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "orchestrator.objects.s3")
    monkeypatch.delattr("orchestrator.objects.s3")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UserError, match=r"needs boto3; pip install 'espalier\[s3\]'"):
        resolve("s3://bucket/c")
