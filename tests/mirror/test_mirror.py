"""A mirror: copying and removing, the lock of the writer, and faults of the store."""

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.errors import HeldError, UserError
from orchestrator.mirror import download, lock, manifest, remote, session, upload
from orchestrator.mirror.download import DamagedCopyError
from orchestrator.mirror.manifest import Manifest, Part
from orchestrator.objects.address import parse
from orchestrator.objects.store import open_store
from orchestrator.runs import events, stop
from orchestrator.runs.folder import RunFolder
from tests.helpers.bucket import FAULTS
from tests.helpers.wait import wait_until


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Let a holder of a lock show often that it lives. Copies are made by `sync` and `finish`."""
    monkeypatch.setattr(upload, "POLL_S", 600)
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "POLL_S", 0.02)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A folder with what a run writes."""
    folder = RunFolder(tmp_path / "here" / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.run_file.write_text(json.dumps({"key": "k"}))
    folder.journal_file.write_text('{"step": 1}\n')
    add_checkpoint(folder, 4)
    return folder


def add_checkpoint(folder: RunFolder, step: int, content: str = "") -> None:
    temporary = folder.checkpoints / ".writing"
    temporary.mkdir()
    (temporary / "model.safetensors").write_text(content or f"weights of {step} " * 100)
    (temporary / "MANIFEST.json").write_text(str(step))
    temporary.rename(folder.checkpoint(step))


def mirrored(folder: RunFolder, bucket):
    return session.mirrored(folder, parse("mirror", f"{bucket.address}/m"), folder.path.parent)


def copy(folder: RunFolder, bucket) -> None:
    """Mirror the folder as it is."""
    with mirrored(folder, bucket) as uploader:
        assert uploader.finish(20), uploader.problem


def content(folder: Path) -> dict[str, str]:
    """Return all files and links that a mirror has."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes().decode("latin-1")
        for path in folder.rglob("*")
        if path.is_symlink() or (path.is_file() and not path.name.startswith("."))
    }


def elsewhere(folder: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "elsewhere" / folder.name)


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
        first = uploader.sync
        first()
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


def test_many_small_parts_become_one(run, bucket, monkeypatch):
    monkeypatch.setattr(upload, "MOST_SMALL", 3)
    with mirrored(run, bucket) as uploader:
        for step in range(12):
            with open(run.journal_file, "a") as file:
                file.write(f'{{"step": {step}}}\n')
            uploader.sync()
            assert len(uploader.last.files[run.journal_file.name]) <= 5


def test_leftovers_of_a_killed_process_leave_the_bucket(run, bucket):
    bucket.put("m/run/checkpoints/step-00000099/x@0123", b"left")
    bucket.put("m/run/stages/s/checkpoints/step-00000099/x@0123", b"left")
    others = ["m/other/x@0123", "m/run/other/checkpoints/step-00000099/x@0123", "m/run2/x@0123"]
    for other in others:
        bucket.put(other, b"of another run")
    copy(run, bucket)
    assert not [name for name in bucket.names("m/run/") if "99/x" in name and name not in others]
    assert set(others) < set(bucket.names())


# ---- the lock of the writer ----


def test_second_writer_is_refused_with_the_name_of_the_first(run, bucket, tmp_path):
    with mirrored(run, bucket):
        with pytest.raises(HeldError, match=f"s3://.*/m/run: held by process {os.getpid()} on "):
            copy(elsewhere(run, tmp_path), bucket)
    copy(elsewhere(run, tmp_path), bucket)


def test_lost_holder_is_followed_and_cannot_write_any_more(run, bucket, tmp_path, monkeypatch):
    store = open_store(parse("m", bucket.address))
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    with mirrored(run, bucket) as uploader:
        uploader.sync()
        beat = lock.MirrorLock.beat
        asleep = threading.Event()  # the first process hangs
        is_late = threading.Event()

        def beat_unless_asleep(self):
            if self is not uploader.lock or not asleep.is_set():
                beat(self)
            else:
                is_late.set()

        monkeypatch.setattr(lock.MirrorLock, "beat", beat_unless_asleep)
        asleep.set()
        wait_until(is_late.is_set)
        other = elsewhere(run, tmp_path)
        with mirrored(other, bucket) as second:
            add_checkpoint(other, 8)
            second.sync()
            add_checkpoint(run, 6)
            with pytest.raises(UserError, match="was written by another process"):
                uploader.sync()
            asleep.clear()
            wait_until(lambda: stop.requested(run))
            assert "was taken over by" in stop.requested(run)
        found = manifest.read(store, uploader.address)
        assert found is not None
        assert [path for path in found[0].files if "step-00000008" in path]
        assert not [path for path in found[0].files if "step-00000006" in path]


@pytest.mark.parametrize("fails", ["reads", "writes"])
def test_time_in_which_the_store_is_away_does_not_count_for_a_waiter(monkeypatch, fails):
    now = [0.0]

    def pass_by(seconds):
        now[0] += seconds

    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=pass_by)
    answers = iter([(0, "1"), (lock.STALE_S, "1"), (0, "2")])  # after how long, which version
    delay = []

    def read(self):
        seconds, version = next(answers)
        delay[:] = [seconds]
        pass_by(seconds if fails == "reads" else 0)
        return "a living holder", "token", version

    def put(key, data):
        pass_by(delay[0] if fails == "writes" else 0)

    monkeypatch.setattr(lock, "time", clock)
    monkeypatch.setattr(lock.MirrorLock, "_read", read)
    address = parse("m", "s3://bucket/m/run")
    store = SimpleNamespace(put=put, delete=lambda key: None)
    with pytest.raises(HeldError, match="held by a living holder"):
        lock.MirrorLock(store, address, None).acquire(None)
    assert next(answers, None) is None


def test_holder_whose_writes_alone_fail_notices_that_it_was_taken_over(
    run, bucket, tmp_path, monkeypatch
):
    monkeypatch.setattr(lock, "STALE_S", 0.5)
    with mirrored(run, bucket) as uploader:
        uploader.sync()

        def refused(*_):
            raise UserError("the credentials have expired")

        monkeypatch.setattr(uploader.lock.store, "put_if", refused)
        with mirrored(elsewhere(run, tmp_path), bucket) as other:
            wait_until(lambda: stop.requested(run))
            assert uploader.lock.lost_to is not None and other.lock.lost_to is None
            assert "was taken over by" in stop.requested(run)
    assert not [name for name in bucket.names() if "waiting" in name]


def test_process_that_was_taken_over_deletes_nothing_and_is_not_whole(run, bucket, monkeypatch):
    left = "m/run/checkpoints/step-00000099/x@0123"
    with mirrored(run, bucket) as uploader:
        uploader.sync()
        before = set(bucket.names("m/run/checkpoints/"))
        bucket.put(left, b"of the next holder")
        uploader._has_cleaned = False
        put_if = uploader.store.put_if

        def taken_over(*arguments):
            version = put_if(*arguments)
            uploader.lock.lost_to = "the next holder"
            return version

        monkeypatch.setattr(uploader.store, "put_if", taken_over)
        add_checkpoint(run, 8)
        shutil.rmtree(run.checkpoint(4))
        assert not uploader.finish(20)
        assert uploader.problem == "it was taken over by the next holder"
    assert {*before, left} < set(bucket.names("m/run/checkpoints/"))


def test_restart_in_the_same_folder_does_not_wait_for_its_killed_holder(run, bucket, monkeypatch):
    with mirrored(run, bucket) as uploader:
        monkeypatch.setattr(lock.MirrorLock, "release", lambda self: None)  # killed
        uploader.sync()
    monkeypatch.setattr(lock, "STALE_S", 600)
    copy(run, bucket)


def test_store_that_ignores_conditions_is_refused(run, bucket, monkeypatch):
    from orchestrator.objects import s3

    monkeypatch.setattr(s3.S3Store, "put_if", lambda self, key, data, version: self._put(key, data))
    with pytest.raises(UserError, match="ignores the conditions of a write"):
        copy(run, bucket)


# ---- which folder is newer ----


def test_older_folder_is_set_aside_and_the_newer_copy_taken(run, bucket, tmp_path):
    copy(run, bucket)
    other = elsewhere(run, tmp_path)
    with mirrored(other, bucket) as uploader:
        add_checkpoint(other, 8)
        assert uploader.finish(20)
    run.journal_file.write_text("only here\n")
    copy(run, bucket)
    assert run.checkpoint_steps() == [4, 8]
    assert (run.path / "before-0001" / run.journal_file.name).read_text() == "only here\n"
    assert not [key for key in bucket.names() if "before-" in key]


def test_copy_of_another_run_is_not_overwritten(run, bucket, tmp_path):
    copy(run, bucket)
    other = elsewhere(run, tmp_path)
    other.path.mkdir(parents=True)
    other.run_file.write_text(json.dumps({"key": "other"}))
    with pytest.raises(UserError, match="has another run of this name"):
        copy(other, bucket)


def test_lost_checkpoints_of_a_folder_come_back(run, bucket):
    add_checkpoint(run, 8)
    copy(run, bucket)
    shutil.rmtree(run.checkpoints)
    run.journal_file.write_text("newer\n")
    copy(run, bucket)
    assert run.checkpoint_steps() == [4, 8]
    assert run.journal_file.read_text() == "newer\n"


def test_folder_that_loses_all_checkpoints_does_not_take_them_from_the_copy(run, bucket):
    with mirrored(run, bucket) as uploader:
        uploader.sync()
        shutil.rmtree(run.checkpoints)
        with pytest.raises(UserError, match="has lost all checkpoints; the copy keeps its own"):
            uploader.sync()
        run.run_file.write_text(json.dumps({"key": "begun again"}))
        uploader.sync()
    assert not bucket.names("m/run/checkpoints/")


@pytest.mark.parametrize("is_first", [True, False])
def test_manifest_whose_answer_was_lost_is_known_again(run, bucket, monkeypatch, is_first):
    with mirrored(run, bucket) as uploader:
        if not is_first:
            uploader.sync()
        put_if = uploader.store.put_if

        def lost(*arguments):
            put_if(*arguments)
            raise UserError("no answer")

        monkeypatch.setattr(uploader.store, "put_if", lost)
        add_checkpoint(run, 8)
        with pytest.raises(UserError, match="no answer"):
            uploader.sync()
        monkeypatch.undo()
        add_checkpoint(run, 12)
        uploader.sync()
    assert [path for path in uploader.last.files if "step-00000012" in path]


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


def test_copy_whose_thread_has_failed_is_not_whole(run, bucket, monkeypatch):
    failures = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    with mirrored(run, bucket) as uploader:
        monkeypatch.setattr(uploader, "sync", lambda: 1 / 0)
        assert not uploader.finish(20)
        assert uploader.problem == "its thread has failed"
    assert [failure.exc_type for failure in failures] == [ZeroDivisionError]


def test_hashing_what_the_copy_has_is_progress(run, bucket):
    copy(run, bucket)
    with mirrored(run, bucket) as uploader:
        uploader._progress = 0.0
        uploader.sync()
        assert uploader._progress > 0


def test_checkpoint_that_is_removed_while_it_is_sent_is_sent_whole_or_not(run, bucket, monkeypatch):
    with mirrored(run, bucket) as uploader:
        put = uploader.store.put

        def remove_first(key, data):
            shutil.rmtree(run.checkpoint(4), ignore_errors=True)
            put(key, data)

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

        def killed(key, data):
            if "/data/" in key:
                sent.append(key)
                if len(sent) == 4:
                    raise UserError("killed")
                add_checkpoint(run, 8 * len(sent))
            put(key, data)

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


def test_address_without_a_run_is_one_line(bucket):
    with pytest.raises(UserError, match="has no mirrored run"):
        remote.here(f"{bucket.address}/m/run/checkpoints/step-00000004")
    assert remote.here("runs/quickstart") == "runs/quickstart"
