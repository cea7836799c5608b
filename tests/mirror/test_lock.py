"""One process at a time writes to a mirror."""

import json
import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest

from orchestrator.errors import HeldError, UserError
from orchestrator.mirror import lock, manifest, upload
from orchestrator.objects.address import parse
from orchestrator.objects.store import open_store
from orchestrator.runs import stop
from tests.helpers.mirrored import add_checkpoint, copy, elsewhere, mirrored
from tests.helpers.wait import wait_until

pytestmark = pytest.mark.usefixtures("fast")


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

        is_refused = threading.Event()

        def refused(*_):
            is_refused.set()
            raise UserError("the credentials have expired")

        monkeypatch.setattr(uploader.lock.store, "put_if", refused)
        assert is_refused.wait(60)  # no write is under way any more
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


def test_copy_of_the_folder_does_not_take_the_lock_from_a_holder_that_lives(run, bucket, tmp_path):
    with mirrored(run, bucket) as uploader:
        uploader.sync()
        other = elsewhere(run, tmp_path)
        shutil.copytree(run.path, other.path)
        with pytest.raises(HeldError), mirrored(other, bucket):
            pass
        assert uploader.lock.lost_to is None


def test_store_that_ignores_conditions_is_refused(run, bucket, monkeypatch):
    from orchestrator.objects import s3

    monkeypatch.setattr(s3.S3Store, "put_if", lambda self, key, data, version: self._put(key, data))
    with pytest.raises(UserError, match="ignores the conditions of a write"):
        copy(run, bucket)


@pytest.mark.parametrize("next_call", ["beat", "release"])
def test_holder_whose_answer_was_lost_does_not_lose_the_lock_to_itself(bucket, next_call):
    address = parse("m", f"{bucket.address}/m/run")
    store = open_store(address, 0.0)
    holder = lock.MirrorLock(store, address, store)
    holder.acquire(None)
    bucket.proxy.decide = lambda _, method, __: "reset_after" if method == "PUT" else "503"
    with pytest.raises(UserError, match="does not answer"):
        holder.beat()  # it is written, and its answer never comes
    bucket.proxy.decide = lambda *_: ""
    getattr(holder, next_call)()
    holder.beat()
    assert holder.lost_to is None
    holder.release()
    assert json.loads(bucket.get("m/run/lock.json"))["holder"] == ""


def test_holder_still_shows_that_it_lives_after_any_error(run, bucket, monkeypatch):
    beats = []

    def beat(self):
        beats.append(self)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(lock.MirrorLock, "beat", beat)
    with mirrored(run, bucket):
        wait_until(lambda: len(beats) > 2)


@pytest.mark.parametrize("is_known", [False, True])
def test_command_that_ends_during_a_write_keeps_the_lock_and_writes_nothing_more(
    run, bucket, tmp_path, monkeypatch, is_known
):
    monkeypatch.setattr(upload, "STOP_S", 0.1)
    monkeypatch.setattr(lock, "STALE_S", 0.3)
    is_sent, may_go_on = threading.Event(), threading.Event()
    with mirrored(run, bucket) as uploader:
        put = uploader.store.put

        def slow(key, data, sha256):
            is_sent.set()
            assert may_go_on.wait(60)
            put(key, data, sha256)

        monkeypatch.setattr(uploader.store, "put", slow)
        uploader._ending.set()
        assert is_sent.wait(60)
    assert json.loads(bucket.get("m/run/lock.json"))["holder"]
    next_one = run if is_known else elsewhere(run, tmp_path)
    started = time.monotonic()
    with mirrored(next_one, bucket) as second:
        assert time.monotonic() > started + lock.STALE_S, "the lock was taken at once"
        may_go_on.set()
        uploader._thread.join()
        assert "m/run/mirror.json" not in bucket.names()
        second.sync()
        assert second.lock.lost_to is None
