"""Which checkpoint is found, which ones are removed, and what a failed commit leaves behind."""

import builtins
import errno
import os
import threading
from pathlib import Path

import pytest

from orchestrator import files
from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint import store
from orchestrator.checkpoint.format import step_of
from orchestrator.errors import NO_ROOM, UnreadableError
from orchestrator.runs.folder import RunFolder
from orchestrator.track import contents
from tests.helpers.checkpoints import commit, damage, hidden, holds

# ---- finding ----


def test_newest_valid_checkpoint_is_taken_and_each_skipped_one_is_reported(tmp_path):
    paths = [commit(tmp_path, step) for step in (1, 2, 3)]
    messages: list[str] = []
    assert store.latest_valid(tmp_path, messages.append) == paths[2]
    assert messages == []
    damage(paths[2])
    (paths[1] / "state.json").unlink()
    assert store.latest_valid(tmp_path, messages.append) == paths[0]
    assert len(messages) == 2
    assert str(paths[2]) in messages[0] and str(paths[1]) in messages[1]
    damage(paths[0])
    assert store.latest_valid(tmp_path, messages.append) is None


def test_no_checkpoint_is_found_where_there_is_none(tmp_path):
    assert store.latest_valid(tmp_path / "absent") is None
    assert store.latest_valid(tmp_path) is None
    assert store.best(tmp_path) is None


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([3.0, 1.0, 2.0], 2),
        ([1.0, 1.0, 2.0], 1),
        ([None, None, None], None),
        ([None, 5.0, None], 2),
        ([float("nan"), 5.0, 6.0], 2),
        ([5.0, float("nan"), 4.0], 3),
        ([float("nan")] * 3, None),
        ([float("-inf"), 5.0, 6.0], 2),
    ],
)
def test_best_has_the_lowest_finite_loss_and_is_the_earliest_of_equals(tmp_path, losses, best):
    for step, loss in enumerate(losses, 1):
        commit(tmp_path, step, loss=loss)
    assert store.best(tmp_path) == best


def test_dangling_symlink_with_the_name_of_a_checkpoint_is_skipped(tmp_path):
    path = commit(tmp_path, 1)
    (tmp_path / "step-00000002").symlink_to(tmp_path / "gone")
    messages: list[str] = []
    assert store.latest_valid(tmp_path, messages.append) == path
    assert len(messages) == 1


def test_checkpoint_that_vanishes_while_it_is_read_is_not_damage(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    verify = store.verify

    def prune_and_verify(path):
        if path.name == "step-00000001":
            commit(tmp_path, 2)
            store.remove(path)
        return verify(path)

    monkeypatch.setattr(store, "verify", prune_and_verify)
    assert store.latest_valid(tmp_path, warn=pytest.fail) == store.path_of(tmp_path, 2)


def fail_to_hash(monkeypatch, number: int, times: int, name: str = "") -> None:
    """Let the next reads of parts of checkpoints with this name fail with an error number."""
    left = [times]
    hash_here = checkpoint_format.hash_here

    def hash_files(paths, *contents):
        if left[0] > 0 and name in paths[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number), paths[0])
        return hash_here(paths, *contents)

    monkeypatch.setattr(checkpoint_format, "hash_here", hash_files)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.EIO])
def test_checkpoint_is_read_again_after_an_error_that_passes(tmp_path, monkeypatch, number):
    path = commit(tmp_path, 1)
    fail_to_hash(monkeypatch, number, times=2)
    assert store.latest_valid(tmp_path, pytest.fail, set_aside=True) == path


@pytest.mark.parametrize("set_aside", [False, True])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.EACCES])
def test_checkpoint_that_cannot_be_read_at_the_moment_is_not_skipped(
    tmp_path, monkeypatch, number, set_aside
):
    commit(tmp_path, 1)
    commit(tmp_path, 2)
    monkeypatch.setattr(files, "RETRY_S", 0)
    fail_to_hash(monkeypatch, number, times=1000)
    with pytest.raises(UnreadableError, match="run the same command again"):
        store.latest_valid(tmp_path, pytest.fail, set_aside=set_aside)
    assert store.steps(tmp_path) == [1, 2]


def test_error_of_the_disk_that_stays_is_damage(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    monkeypatch.setattr(files, "RETRY_S", 0)
    fail_to_hash(monkeypatch, errno.EIO, times=1000)
    messages: list[str] = []
    assert store.latest_valid(tmp_path, messages.append, set_aside=True) is None
    assert "Input/output error" in messages[0]
    assert store.steps(tmp_path) == []


def test_disk_that_cannot_read_two_checkpoints_is_not_damage_of_both(tmp_path, monkeypatch):
    path = commit(tmp_path, 1)
    commit(tmp_path, 2)
    commit(tmp_path, 3)
    monkeypatch.setattr(files, "RETRY_S", 0)
    with monkeypatch.context() as broken:
        fail_to_hash(broken, errno.EIO, times=1000)
        with pytest.raises(UnreadableError, match="step-00000003.*step-00000002.*check the disk"):
            store.latest_valid(tmp_path, pytest.fail, set_aside=True)
    assert store.steps(tmp_path) == [1, 2, 3]
    # Of two damaged checkpoints, only one has the error.
    damage(store.path_of(tmp_path, 2))
    fail_to_hash(monkeypatch, errno.EIO, times=1000, name="step-00000003")
    messages: list[str] = []
    assert store.latest_valid(tmp_path, messages.append, set_aside=True) == path
    assert store.steps(tmp_path) == [1] and len(messages) == 2


def test_best_checkpoint_is_not_removed_while_it_cannot_be_read(tmp_path, monkeypatch):
    for step, loss in [(1, 1.0), (2, 2.0), (3, 3.0)]:
        commit(tmp_path, step, loss=loss)
    monkeypatch.setattr(files, "RETRY_S", 0)
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint_format, "_read_small", fail_with_stale_handle)
        store.prune(tmp_path, keep=1)
    assert store.steps(tmp_path) == [1, 2, 3]
    store.prune(tmp_path, keep=1)
    assert store.steps(tmp_path) == [1, 3]


def fail_with_stale_handle(file):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(file))


def test_writer_renames_damaged_checkpoints_and_keeps_them(tmp_path):
    for step, loss in [(1, 5.0), (2, 4.0), (7, 1.0), (8, 1.0)]:
        commit(tmp_path, step, loss=loss)
    damage(store.path_of(tmp_path, 7))
    damage(store.path_of(tmp_path, 8))
    messages: list[str] = []
    valid = store.path_of(tmp_path, 2)
    assert store.latest_valid(tmp_path, messages.append) == valid
    assert store.steps(tmp_path) == [1, 2, 7, 8], "a reader changes nothing"
    assert store.latest_valid(tmp_path, messages.append, set_aside=True) == valid
    assert store.steps(tmp_path) == [1, 2]
    damaged = sorted(path.name for path in tmp_path.glob("damaged-*"))
    assert [name[: len("damaged-step-00000007")] for name in damaged] == [
        "damaged-step-00000007",
        "damaged-step-00000008",
    ]
    assert messages[-1].endswith(f"; now {damaged[0]}")
    commit(tmp_path, 3, loss=6.0)
    store.prune(tmp_path, 1)
    assert store.steps(tmp_path) == [2, 3], "2 is the best"
    assert sorted(path.name for path in tmp_path.glob("damaged-*")) == damaged


# ---- removing ----


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_pruning_keeps_the_newest_and_the_best_and_removes_leftovers(tmp_path, keep):
    for step, loss in enumerate([5.0, 1.0, 3.0, 2.0, 4.0], 1):
        commit(tmp_path, step, loss=loss)
    (tmp_path / ".step-00000009.123-abc").mkdir()
    (tmp_path / ".step-00000009.123-abc" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    store.prune(tmp_path, keep)
    assert store.steps(tmp_path) == sorted({2, *range(1, 6)[-keep:]})
    assert hidden(tmp_path) == []
    assert (tmp_path / "notes.txt").exists()
    assert all(holds(store.path_of(tmp_path, step), step) for step in store.steps(tmp_path))


# ---- readers beside the writer ----


def test_readers_beside_a_writer_always_find_a_complete_checkpoint(tmp_path):
    """The writer commits, replaces and prunes without pause while the reader searches."""
    directory = tmp_path / "checkpoints"
    commit(directory, 1)
    enough = threading.Event()
    written = [1]
    messages: list[str] = []

    def write() -> None:
        while not enough.is_set():
            commit(directory, written[-1] + 1)
            commit(directory, written[-1] + 1)
            store.prune(directory, 1)
            written.append(written[-1] + 1)

    writer = threading.Thread(target=write)
    writer.start()
    newest = 1
    try:
        while written[-1] < 20 or newest < 20:
            found = store.latest_valid(directory, messages.append)
            assert found is not None and writer.is_alive()
            step = step_of(found)
            # While a checkpoint is replaced, the one before it may be the newest.
            assert step >= newest - 1
            newest = step
            assert len(contents.checkpoints(RunFolder(tmp_path))) <= 2
            store.best(directory)
    finally:
        enough.set()
        writer.join()
    assert store.steps(directory) == [written[-1]]
    assert messages == []


def test_reader_that_restores_the_old_checkpoint_does_not_stop_its_replacement(
    tmp_path, monkeypatch
):
    commit(tmp_path, 1)
    rename = os.rename
    found = []

    def read_after_first_rename(source, target):
        rename(source, target)
        if str(target).endswith(".aside") and not found:
            found.append(store.latest_valid(tmp_path, warn=pytest.fail))

    monkeypatch.setattr(os, "rename", read_after_first_rename)
    commit(tmp_path, 1, seed=5)
    assert found == [store.path_of(tmp_path, 1)]
    assert holds(found[0], 5)
    assert os.listdir(tmp_path) == ["step-00000001"]


# ---- a full disk; kills are in test_crash.py ----

CALLS = [
    (os, "mkdir"),
    (os, "rename"),
    (os, "open"),
    (os, "write"),
    (os, "fsync"),
    (os, "close"),
    (os, "scandir"),
    (os, "unlink"),
    (os, "rmdir"),
    (os, "stat"),
    (os, "statvfs"),
    (builtins, "open"),
]


def fail_at(number: int | None, action) -> int:
    """Run `action`; the system call of this number fails. Return how many calls were made."""
    count = 0

    def counted(function, name):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count != number:
                return function(*args, **kwargs)
            if name == "write":
                function(args[0], args[1][:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS:
            patch.setattr(owner, name, counted(getattr(owner, name), name))
        try:
            action()
        except OSError:
            assert number is not None
    return count


@pytest.mark.parametrize("new_step", [1, 2], ids=["replaced", "beside"])
def test_commit_that_fails_at_any_call_leaves_the_old_or_the_new_checkpoint(tmp_path, new_step):
    commit(tmp_path / "count", 1)
    calls = fail_at(None, lambda: commit(tmp_path / "count", new_step, seed=9))
    assert calls > 20
    found_new = set()
    for number in range(1, calls + 1):
        directory = tmp_path / str(number)
        commit(directory, 1)
        fail_at(number, lambda directory=directory: commit(directory, new_step, seed=9))
        found = store.latest_valid(directory, warn=pytest.fail)
        found_new.add(holds(found, 9))
        assert holds(found, 9) or holds(found, 1)
        for step in store.steps(directory):
            store.verify(store.path_of(directory, step))
        if number < calls - 12:  # the last calls remove the old checkpoint
            assert hidden(directory) == [], number
        commit(directory, new_step, seed=9)
        store.prune(directory, 1)
        assert os.listdir(directory) == [store.path_of(directory, new_step).name]
        assert holds(store.path_of(directory, new_step), 9)
    assert found_new == {False, True}


def test_leftovers_are_removed_before_free_space_is_measured(tmp_path: Path, monkeypatch):
    (tmp_path / ".step-00000009.123-abc").mkdir()

    def statvfs(path):
        assert hidden(path) == []
        return os.statvfs_result((4096, 4096, 100, 10, 10, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(OSError, match="40,960 bytes free, 1,04") as raised:
        commit(tmp_path, 1)
    assert raised.value.errno in NO_ROOM
    assert os.listdir(tmp_path) == []
