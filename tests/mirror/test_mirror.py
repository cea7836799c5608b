"""A mirror: copying and removing, faults of the store, and commands that read."""

import fcntl
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.mirror import download, manifest, remote, upload
from orchestrator.mirror.download import DamagedCopyError
from orchestrator.mirror.manifest import Manifest, Part
from orchestrator.objects import cache, store
from orchestrator.objects.address import parse
from orchestrator.objects.store import open_store
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from tests.helpers.bucket import FAULTS
from tests.helpers.mirrored import add_checkpoint, content, copy, elsewhere, mirrored
from tests.helpers.wait import wait_until

pytestmark = pytest.mark.usefixtures("fast")


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_folder_is_made_again_elsewhere_through_faults(run, bucket, tmp_path, fault, monkeypatch):
    monkeypatch.setattr(manifest, "PART_BYTES", 700)
    run.journal_file.write_text('{"step": 1}\n' * 500)
    (run.path / "trials" / "a").mkdir(parents=True)
    (run.path / "trials" / "a" / "checkpoints").symlink_to("../../checkpoints")
    (run.path / "out").symlink_to("../..")
    bucket.proxy.decide = lambda number, *_: fault if number % 4 == 3 else ""
    copy(run, bucket)
    other = elsewhere(run, tmp_path)
    copy(other, bucket)
    (run.path / "out").unlink()  # leads out of the folder
    assert [event["kind"] for event in events.read(other)] == ["restored"]
    other.events_file.unlink()
    assert content(other.path) == content(run.path)


def test_what_grows_is_sent_in_parts_and_what_was_removed_leaves_the_bucket(run, bucket):
    with mirrored(run, bucket) as uploader:
        uploader.sync()
        before = set(bucket.names("m/run/"))
        for step in (5, 6, 7):
            with open(run.journal_file, "a") as file:
                file.write(f'{{"step": {step}}}\n')
            uploader.sync()
        add_checkpoint(run, 8)
        shutil.rmtree(run.checkpoint(4))
        uploader.sync()
        after = set(bucket.names("m/run/"))
        journal = [key for key in after if "metrics" in key]
        assert len(journal) == 4
        assert {key for key in before if "metrics" in key} < set(journal)
        assert not [key for key in after if "step-00000004" in key]
        assert [key for key in after if "step-00000008" in key]
        named = {f"m/run/{name}" for name in uploader.last.objects()}
        assert after == named | {"m/run/mirror.json", "m/run/lock.json"}


def test_journal_that_grows_faster_than_it_is_sent_is_copied(run, bucket):
    sizes = []

    def grow(_, verb, path):
        if verb == "PUT" and "metrics" in path and len(sizes) < 20:
            sizes.append(run.journal_file.stat().st_size)
            with open(run.journal_file, "a") as file:
                file.write(f'{{"step": {len(sizes)}}}\n')
        return ""

    with mirrored(run, bucket) as uploader:
        bucket.proxy.decide = grow
        uploader.sync()
        (part,) = uploader.last.files[run.journal_file.name]
        assert part.size == sizes[0]


def test_many_small_parts_become_one(run, bucket, monkeypatch):
    monkeypatch.setattr(manifest, "MOST_SMALL", 3)
    with mirrored(run, bucket) as uploader:
        for step in range(12):
            with open(run.journal_file, "a") as file:
                file.write(f'{{"step": {step}}}\n')
            uploader.sync()
            assert len(uploader.last.files[run.journal_file.name]) <= 5


@pytest.mark.parametrize("fault", ["503", "403 AccessDenied"])
def test_removal_that_fails_is_tried_again_and_keeps_nothing_else_back(
    run, bucket, monkeypatch, fault
):
    monkeypatch.setattr(store, "PATIENCE_S", 0.2)
    with mirrored(run, bucket) as uploader:
        uploader.sync()
        add_checkpoint(run, 8)
        shutil.rmtree(run.checkpoint(4))
        bucket.proxy.decide = lambda _, method, __: fault if method == "DELETE" else ""
        uploader.sync()
        uploader.sync()
        assert uploader.problem is None
        assert run.events_file.read_text().count("stays in the bucket") == 1
        bucket.proxy.decide = lambda *_: ""
        assert any("step-00000004" in name for name in bucket.names())
        uploader.sync()
        assert not any("step-00000004" in name for name in bucket.names())


def test_leftovers_of_a_killed_process_leave_the_bucket(run, bucket):
    bucket.put("m/run/checkpoints/step-00000099/x@0123", b"left")
    bucket.put("m/run/stages/s/checkpoints/step-00000099/x@0123", b"left")
    others = ["m/other/x@0123", "m/run/other/checkpoints/step-00000099/x@0123", "m/run2/x@0123"]
    for other in others:
        bucket.put(other, b"of another run")
    copy(run, bucket)
    assert not [name for name in bucket.names("m/run/") if "99/x" in name and name not in others]
    assert set(others) < set(bucket.names())


# ---- a store that is away, damaged or slow ----


def test_run_goes_on_without_the_store_and_catches_up(run, bucket, monkeypatch):
    monkeypatch.setattr(upload, "POLL_S", 0.02)
    with mirrored(run, bucket) as uploader:
        uploader.store.patience_s = 0.1
        bucket.proxy.decide = lambda *_: "403 ExpiredToken"
        add_checkpoint(run, 8)
        wait_until(lambda: uploader.problem)
        bucket.proxy.decide = lambda *_: ""
        wait_until(lambda: not uploader.problem)
        assert uploader.finish(20)
    messages = [event["message"] for event in events.read(run) if event["kind"] == "mirror"]
    assert ["credentials have expired" in messages[0], "everything again" in messages[1]] == [
        True,
        True,
    ]


def test_end_does_not_wait_longer_than_it_may_for_a_store_that_is_away(run, bucket):
    with mirrored(run, bucket) as uploader:
        add_checkpoint(run, 8)
        bucket.proxy.decide = lambda *_: "503"
        assert not uploader.finish(0.5)
        assert uploader.problem
        bucket.proxy.decide = lambda *_: ""


def test_any_error_is_noted_once_and_tried_again(run, bucket, monkeypatch):
    monkeypatch.setattr(upload, "POLL_S", 0.02)
    with mirrored(run, bucket) as uploader:
        sync = uploader.sync
        tries = []

        def fail():
            tries.append(None)
            raise ValueError("a mistake\nof two lines")

        monkeypatch.setattr(uploader, "sync", fail)
        wait_until(lambda: len(tries) > 2)
        assert uploader.problem == "ValueError: a mistake of two lines"
        monkeypatch.setattr(uploader, "sync", sync)
        assert uploader.finish(20), uploader.problem
    messages = [event["message"] for event in events.read(run) if event["kind"] == "mirror"]
    assert ["a mistake" in messages[0], "everything again" in messages[1]] == [True, True]
    assert len(messages) == 2


def test_end_without_a_copy_is_not_whole(run, bucket, monkeypatch):
    with mirrored(run, bucket) as uploader:
        monkeypatch.setattr(uploader, "sync", lambda: 1 / 0)
        assert not uploader.finish(20)
        assert uploader.problem == "ZeroDivisionError: division by zero"


def test_hashing_what_the_copy_has_is_progress(run, bucket):
    copy(run, bucket)
    with mirrored(run, bucket) as uploader:
        uploader._progress = 0.0
        uploader.sync()
        assert uploader._progress > 0


def test_checkpoint_that_is_removed_while_it_is_sent_is_sent_whole_or_not(run, bucket, monkeypatch):
    with mirrored(run, bucket) as uploader:
        put = uploader.store.put

        def remove_first(key, data, sha256):
            shutil.rmtree(run.checkpoint(4), ignore_errors=True)
            put(key, data, sha256)

        monkeypatch.setattr(uploader.store, "put", remove_first)
        uploader.sync()
        names = [path for path in uploader.last.files if "step-00000004" in path]
        assert len(names) in (0, 2)


def test_damaged_object_is_named(run, bucket, tmp_path):
    copy(run, bucket)
    [key] = [key for key in bucket.names() if "model.safetensors" in key]
    bucket.put(key, bucket.get(key)[:-1] + b"x")
    with pytest.raises(DamagedCopyError, match=r"model\.safetensors@.*SHA-256 differs"):
        copy(elsewhere(run, tmp_path), bucket)
    assert elsewhere(run, tmp_path).checkpoint_steps() == []


EVIL = (Part(1, "0"),)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-5],
        lambda data: data.replace(b"run.json", b"run.jsom"),
        lambda data: b"{}",
        *(
            Manifest(**content)
            for content in (
                {"files": {"../evil": EVIL}},
                {"files": {"/tmp/evil": EVIL}},
                {"files": {"checkpoints/../../evil": EVIL}},
                {"files": {"evil\0": EVIL}},
                {"files": {"evil\ud800": EVIL}},
                {"files": {"e" * 300: EVIL}},
                {"files": {".mirror.json": EVIL}},
                {"files": {"a": EVIL, "a/evil": EVIL}},
                {"files": {"a/evil": EVIL}, "links": {"a": "checkpoints"}},
                {"files": {"a": EVIL}, "links": {"a": "checkpoints"}},
                {"links": {"/evil": "x"}},
                {"links": {"../evil": "x"}},
                {"links": {"evil\0": "x"}},
                {"links": {"evil": "/etc"}},
                {"links": {"evil": ".."}},
                {"links": {"evil": "a/../../.."}},
                {"links": {"evil": "x\0"}},
                {"links": {"evil": 5}},
                {"links": {"evil": "evil"}},
                {"links": {"evil": "evil/x"}},
                {"links": {"evil": "b/c", "b/c": "../evil"}},
                {"links": {"evil": "x", "evil/y": "x"}},
                {"data": ["../../evil"]},
                {"data": ["/evil"]},
                {"data": 5},
            )
        ),
    ],
)
def test_damaged_or_malicious_manifest_is_refused(run, bucket, tmp_path, change):
    copy(run, bucket)
    old = bucket.get("m/run/mirror.json")
    new = change.to_bytes() if isinstance(change, Manifest) else change(old)
    bucket.put("m/run/mirror.json", new)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"mirror\.json: cannot be read") as refused:
        copy(elsewhere(run, tmp_path), bucket)
    assert len(str(refused.value).splitlines()) == 1
    assert set(tmp_path.rglob("*")) <= before | {tmp_path / "elsewhere"}


def test_link_that_leads_to_itself_is_not_copied(run, bucket, tmp_path):
    (run.path / "one").symlink_to("other")
    (run.path / "other").symlink_to("one")
    (run.path / "last").symlink_to("checkpoints")
    copy(run, bucket)
    other = elsewhere(run, tmp_path)
    copy(other, bucket)
    assert [path.name for path in other.path.iterdir() if path.is_symlink()] == ["last"]


@pytest.mark.parametrize(
    "links",
    [
        {"p/q/r/s": "../../../top", "z": "p/q/r/s/../../x", "z/evil": "top"},
        {"p/q/s": "../../top", "p/q/s/z": "../../x"},
    ],
)
def test_chained_links_stay_in_the_folder(tmp_path, links):
    folder = tmp_path / "run"
    (folder / "top").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    download.link(Manifest(links=links), folder)
    made = [path for path in folder.rglob("*") if path.is_symlink()]
    assert made
    assert [path for path in made if not path.resolve().is_relative_to(folder)] == []
    assert not list((tmp_path / "x").iterdir())


def test_nothing_is_written_through_a_link_out_of_the_folder(bucket, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "x").mkdir()
    (folder / "z").symlink_to("../x")  # before this pull
    part = Part(4, hashlib.sha256(b"evil").hexdigest())
    address = parse("m", f"{bucket.address}/m/run")
    paths = ["z/evil.txt", "z/step-00000004/evil.txt"]
    content = Manifest(files=dict.fromkeys(paths, (part,)), links={"z/evil": "top"})
    store = open_store(address)
    for path in paths:
        bucket.put((address / manifest.object_name(path, part)).key, b"evil")
        with pytest.raises(DamagedCopyError, match="leads out of the folder"):
            download.pull(store, address, content, folder, [path])
    with pytest.raises(DamagedCopyError, match="leads out of the folder"):
        download.link(content, folder)
    assert not list((tmp_path / "x").iterdir())


def test_no_secret_is_stored(run, bucket, tmp_path):
    copy(run, bucket)
    texts = [bucket.get(key) for key in bucket.names()]
    texts += [path.read_bytes() for path in run.path.rglob("*") if path.is_file()]
    assert not [text for text in texts if b"secret-of-the-tests" in text]


def test_large_dataset_does_not_delay_checkpoints_and_continues_after_a_kill(
    run, bucket, tmp_path, monkeypatch
):
    monkeypatch.setattr(upload, "POLL_S", 0)
    monkeypatch.setattr(manifest, "PART_BYTES", 1000)
    dataset = run.path.parent / "data" / "abc"
    dataset.mkdir(parents=True)
    (dataset / "manifest.json").write_text("{}")
    (dataset / "train-00000.parquet").write_bytes(os.urandom(5000))
    with mirrored(run, bucket) as uploader:
        uploader._ending.set()  # the thread is over
        uploader._thread.join()
        put = uploader.store.put
        sent = []

        def killed(key, data, sha256):
            if "/data/" in key:
                sent.append(key)
                if len(sent) == 4:
                    raise UserError("killed")
                add_checkpoint(run, 8 * len(sent))
            put(key, data, sha256)

        monkeypatch.setattr(uploader.store, "put", killed)
        uploader.datasets.append(dataset)
        with pytest.raises(UserError, match="killed"):
            uploader.sync()
        assert [path for path in uploader.last.files if "step-00000016" in path]
        assert uploader.last.data == []
        uploader.sync()
        assert uploader.last.data == ["abc"]
        assert len(sent) == len(set(sent)) + 1, "only the part that was lost is sent again"
    other = elsewhere(run, tmp_path)
    copy(other, bucket)
    assert content(other.path.parent / "data") == content(dataset.parent)


# ---- commands that read ----


def test_address_of_a_run_is_copied_with_its_newest_checkpoint(run, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    add_checkpoint(run, 8)
    (run.path / "trials" / "a").mkdir(parents=True)
    (run.path / "trials" / "a" / "checkpoints").symlink_to("../../checkpoints")
    copy(run, bucket)
    address = f"{bucket.address}/m/run"
    found = RunFolder(remote.here(address))
    assert found.checkpoint_steps() == [8]
    assert found.journal_file.read_text() == run.journal_file.read_text()
    assert RunFolder(remote.here(f"{address}/trials/a")).checkpoint_steps() == [8]
    one = Path(remote.here(f"{address}/checkpoints/step-00000004"))
    assert content(one) == content(run.checkpoint(4))
    assert RunFolder(remote.here(address, checkpoints="all")).checkpoint_steps() == [4, 8]
    # The run goes on: the copy here follows.
    add_checkpoint(run, 12)
    shutil.rmtree(run.checkpoint(8))
    run.journal_file.write_text("longer\n")
    copy(run, bucket)
    assert RunFolder(remote.here(address)).checkpoint_steps() == [4, 12]
    assert found.journal_file.read_text() == "longer\n"


@pytest.mark.parametrize("is_kept", [False, True])
def test_newer_checkpoint_takes_the_room_of_an_older_one(
    run, bucket, tmp_path, monkeypatch, is_kept
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(cache.VARIABLE, "0.0000025")  # 2,500 bytes; a checkpoint has 1,300
    copy(run, bucket)
    address = f"{bucket.address}/m/run"
    assert RunFolder(remote.here(address)).checkpoint_steps() == [4]
    add_checkpoint(run, 8)
    if not is_kept:
        shutil.rmtree(run.checkpoint(4))
    copy(run, bucket)
    if is_kept:
        with pytest.raises(UserError, match="no room"):  # this process has the path of the other
            remote.here(address)
        monkeypatch.setattr(remote, "_returned", set())  # as if another process had it
        [file] = [file for folder, file in cache._held.items() if tmp_path in folder.parents]
        with open(file.name) as other:
            fcntl.flock(other, fcntl.LOCK_SH)
            with pytest.raises(UserError, match="no room"):
                remote.here(address)
    assert RunFolder(remote.here(address)).checkpoint_steps() == [8]


def test_address_without_a_run_is_one_line(bucket):
    with pytest.raises(UserError, match="has no mirrored run"):
        remote.here(f"{bucket.address}/m/run/checkpoints/step-00000004")
    assert remote.here("runs/quickstart") == "runs/quickstart"
