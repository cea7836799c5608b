"""Locks: a second driver or writer is refused while another process holds the lock."""

import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from orchestrator import files
from orchestrator.errors import HeldError, UserError
from orchestrator.runs import lock

HOLD = """
import sys, time
from orchestrator.runs import lock
from orchestrator.runs.folder import RunFolder
with lock.held(RunFolder(sys.argv[1]).driver_lock):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(folder):
    """Another process that holds the driver's lock."""
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_held_lock_is_refused_with_the_name_of_the_holder(folder, holder):
    message = rf"held by process {holder.pid} on "
    with pytest.raises(HeldError, match=message), lock.held(folder.driver_lock):
        pytest.fail("two drivers")
    with pytest.raises(HeldError, match=message):
        lock.refuse_if_held(folder)
    assert folder.driver_lock.read_text().startswith(f"process {holder.pid} ")


def test_lock_of_a_killed_holder_is_free_and_tells_its_name(folder, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock.refuse_if_held(folder)
    with lock.held(folder.driver_lock) as killed_holder:
        assert killed_holder.startswith(f"process {holder.pid} ")
        assert folder.driver_lock.read_text().startswith(f"process {os.getpid()} ")
        with pytest.raises(HeldError, match=str(os.getpid())), lock.held(folder.driver_lock):
            pytest.fail("two drivers")
    with lock.held(folder.driver_lock) as killed_holder:
        assert killed_holder is None, "the last holder ended in good order"


def test_wait_for_a_worker_that_still_writes_is_announced(folder, monkeypatch, capsys):
    monkeypatch.setattr(lock, "WRITER_WAIT_S", 0.1)
    lock.wait_for_writer(folder)
    with lock.held(folder.writer_lock):
        assert capsys.readouterr().out == ""
        with pytest.raises(HeldError):
            lock.wait_for_writer(folder)
    assert f"held by process {os.getpid()} on " in capsys.readouterr().out


@pytest.mark.parametrize("number", files.NO_LOCKS, ids=errno.errorcode.get)
def test_file_system_without_locks_is_refused(folder, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder.driver_lock.touch()
    with pytest.raises(UserError, match="its file system has no locks .* on another file system"):
        lock.refuse_if_held(folder)
    with pytest.raises(UserError, match=str(folder.driver_lock)), lock.held(folder.driver_lock):
        pytest.fail("held without a lock")


def test_driver_and_writer_have_different_locks(folder):
    with lock.held(folder.driver_lock), lock.held(folder.writer_lock, wait_s=60):
        assert folder.writer_lock.read_text() == folder.driver_lock.read_text()
    with (
        lock.held(folder.writer_lock),
        pytest.raises(HeldError),
        lock.held(folder.writer_lock, wait_s=0.3),
    ):
        pytest.fail("two writers")


def test_folders_that_were_created_only_for_a_lock_are_removed(folder, tmp_path):
    new = tmp_path / "a" / "b"
    with lock.held(new / ".lock"):
        assert new.is_dir()
    assert list(tmp_path.iterdir()) == []

    with lock.held(new / ".lock"):
        (new / "run.json").touch()
    assert (new / "run.json").exists()


def test_check_creates_nothing(folder, tmp_path):
    lock.refuse_if_held(folder)
    assert list(tmp_path.iterdir()) == []
