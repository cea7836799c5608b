"""A corpus in a bucket gives the dataset of a local copy, also through faults of the store."""

import contextlib
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

from orchestrator.data import tasks
from orchestrator.data.corpus import resolve
from orchestrator.data.input import objects
from orchestrator.data.prepare import prepare
from orchestrator.errors import UserError
from orchestrator.objects import cache, s3
from orchestrator.objects.address import parse
from orchestrator.objects.store import Content, Info, StoreAwayError, open_store
from tests.helpers import forked
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


def test_node_without_the_copies_gets_them(mixed, monkeypatch):
    _, entries = mixed
    listing = resolve(entries)
    chunks = tasks.plan_chunks(listing, 1 << 20, data(entries))
    contents = [source.path.read_bytes() for source in listing]
    for source in listing:
        source.path.unlink()
    made_room = []
    monkeypatch.setattr(objects.cache, "make_room", lambda *_: made_room.append(1))
    tasks._here([vars(span) for span in chunks[0]])
    assert [source.path.read_bytes() for source in listing] == contents
    assert made_room == [1], "the cache is measured once, not for each object"
    span = vars(chunks[0][0])
    with pytest.raises(UserError, match="XDG_CACHE_HOME to the same folder on all nodes"):
        tasks._here([{**span, "path": "/other/cache/x.txt"}])
    for source in listing:
        source.check_unchanged()


@pytest.mark.parametrize(
    "pattern", ["", "/*", "/**", "/**/*.md", "/sub/*.txt", "/s*/b.txt", "/a.txt", "/[[]g].txt"]
)
def test_folders_and_globs_take_what_they_take_locally(bucket, tmp_path, pattern, monkeypatch):
    monkeypatch.setattr(s3, "PAGE", 2)  # a listing has several answers
    folder = tmp_path / "c"
    names = "a.txt [g].txt x.md sub/b.txt sub/deep/d.md .hidden/e.txt sub/.f.txt"
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}")
    upload(bucket, folder, "p/c")
    bucket.put("p/c/", b"")  # the mark of a folder
    bucket.put("p/c2/a.txt", b"of another folder")
    here = resolve(f"{folder}{pattern}")
    there = resolve(f"{bucket.address}/p/c{pattern}")
    assert [s.name for s in there] == [s.name for s in here]
    assert [s.path.read_bytes() for s in there] == [s.path.read_bytes() for s in here]


@pytest.mark.parametrize("bytes_of_archive", [3, 300])
def test_objects_that_their_names_rule_out_are_not_copied(bucket, tmp_path, bytes_of_archive):
    """A folder may have terabytes beside the texts."""
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "a.txt").write_text("x" * 30)
    (folder / "b.zip").write_bytes(b"x" * bytes_of_archive)
    (folder / "c.csv").write_text("1,2")
    upload(bucket, folder, "c")

    def resolved(entry):
        try:
            listing = resolve(entry)
        except UserError as error:
            return str(error).rpartition("/")[2]
        return [source.name for source in listing], listing.left_out

    there = resolved(f"{bucket.address}/c")
    assert there == resolved(str(folder))
    assert not [path for _, path in bucket.proxy.requests[-4:] if "b.zip" in path or ".csv" in path]


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


def test_names_that_a_disk_has_are_taken_and_longer_ones_left_out(bucket):
    names = ["model\u3000v2.txt", "notes\u200b.txt", "n" * 231 + ".txt"]
    for name in [*names, "n" * 244]:
        bucket.put(f"c/{name}", b"text")
    listing = resolve(f"{bucket.address}/c")
    assert sorted(source.path.name for source in listing) == sorted(names)
    assert listing.left_out["key that is no path"] == ["n" * 244]
    with pytest.raises(UserError, match="longer than 235 bytes"):
        resolve(f"{bucket.address}/c/{'n' * 244}")


def test_object_that_would_be_a_file_and_a_folder_is_refused(bucket):
    for name in ("a.txt", "a.txt/b.txt"):
        bucket.put(f"c/{name}", b"text")
    before = bucket.proxy.count
    with pytest.raises(UserError, match="c/a.txt and .*c/a.txt/b.txt would be a file and a folder"):
        resolve(f"{bucket.address}/c")
    assert bucket.proxy.count == before + 1, "only the listing"


@pytest.mark.parametrize("names", [("a.txt", "a.txt/b.txt"), ("a.txt/b.txt", "a.txt")])
def test_earlier_copy_in_the_way_is_one_line(bucket, names):
    bucket.put(f"c/{names[0]}", b"text")
    resolve(f"{bucket.address}/c")
    bucket.delete(f"c/{names[0]}")
    bucket.put(f"c/{names[1]}", b"text")
    with pytest.raises(UserError, match=r"in the way of an earlier one; remove /\S*/corpus/\w+,"):
        resolve(f"{bucket.address}/c")


def test_changed_object_takes_the_room_of_its_earlier_copy(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(cache.VARIABLE, "0.0000015")  # 1,500 bytes
    for content in (b"a", b"b"):
        bucket.put("c/a.txt", content * 900)
        [source] = resolve(f"{bucket.address}/c")
        assert source.path.read_bytes() == content * 900


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
    monkeypatch.setattr(s3, "CREDENTIALS_S", 0.0)
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


def use_in_turn(job):
    """Use one folder after another, which the other processes use and remove too."""
    os.environ.update(job["environment"])
    for number in range(400):
        folder = cache.use("race", parse("m", f"s3://bucket/{number % 6}"))
        with contextlib.suppress(UserError):  # a process that goes on may seem to use two folders
            cache.make_room(folder, 100)
        (folder / "copies").mkdir(exist_ok=True)
        (folder / "copies" / job["name"]).write_bytes(b"x" * 100)
        cache._held.pop(folder).close()


def test_processes_use_and_remove_the_same_folders(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), cache.VARIABLE: "0.000001"}  # 1,000 bytes
    jobs = [{"name": str(number), "environment": environment} for number in range(3)]
    processes = forked.start(use_in_turn, jobs)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list(tmp_path.rglob(".*-*"))


def test_cache_that_was_removed_by_hand_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache.use("k", parse("m", "s3://bucket/a"))
    shutil.rmtree(tmp_path / "espalier")
    assert cache.use("k", parse("m", "s3://bucket/a")) == folder
    assert folder.is_dir()


def test_missing_boto3_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "orchestrator.objects.s3")
    monkeypatch.delattr("orchestrator.objects.s3")
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UserError, match=r"needs boto3; pip install 'espalier\[s3\]'"):
        resolve("s3://bucket/c")
