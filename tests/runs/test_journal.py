"""The journal: lines are whole or not there, a resume loses none, and who follows the file sees each one."""

import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from orchestrator.errors import UserError
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal, Tail


def filled(run_dir, steps) -> Journal:
    log = Journal(RunFolder(run_dir))
    for step in steps:
        log.append(step, {"train/loss": step / 3})
    return log


def steps(records) -> list[int]:
    return [record["step"] for record in records]


def aside(run_dir) -> list[list[int]]:
    return [[line["step"] for line in aside.read()] for aside in journal.asides(RunFolder(run_dir))]


# ---- append and read ----
def test_what_is_appended_is_read_back_to_the_last_bit(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 5e-324, "c": -0.0, "d": float("nan"), "e": float("inf"), "f": 3}
    before = time.time() * 1000
    record = Journal(RunFolder(tmp_path)).append(7, values)
    (read,) = journal.read(RunFolder(tmp_path))
    assert repr(read) == repr(record)
    assert {k: repr(v) for k, v in values.items()} == {k: repr(read[k]) for k in values}
    assert math.copysign(1, read["c"]) == -1
    assert before - 1 <= read["timestamp"] <= time.time() * 1000
    assert read["step"] == 7
    assert isinstance(read["timestamp"], int)


def test_without_a_file_there_is_no_history(tmp_path):
    assert journal.read(RunFolder(tmp_path)) == []
    assert Tail(RunFolder(tmp_path)).poll() == []
    assert journal.asides(RunFolder(tmp_path)) == []


def test_a_torn_last_line_is_not_read(tmp_path):
    log = filled(tmp_path, (1, 2))
    whole = log.file.read_bytes()
    for cut in range(1, len(whole.splitlines()[1]) + 1):
        log.file.write_bytes(whole[:-cut])
        assert steps(journal.read(RunFolder(tmp_path))) == [1]


def test_lines_for_which_a_full_disk_has_no_room_are_never_torn_and_come_later_in_order(tmp_path):
    log = filled(tmp_path, (1, 2))
    limits, size = resource.getrlimit(resource.RLIMIT_FSIZE), log.file.stat().st_size
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(OSError):
            log.write({"step": 3, "train/loss": 1.0})
        assert log.file.stat().st_size == size
        late = [log.append(step, {"train/loss": 1.0}) for step in (3, 4)]
        with pytest.raises(
            UserError,
            match=f"{log.file}: no room for the line of step 3 .*run the same command again",
        ):
            log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert log.file.stat().st_size == size
    late.append(log.append(5, {}))
    assert journal.read(RunFolder(tmp_path))[2:] == late, "not in order, or not as they were"
    log.close()
    assert events.read(RunFolder(tmp_path))[-1]["message"].endswith(
        "there is room again, and the lines that waited are written"
    )


# ---- rewind ----
@pytest.mark.parametrize(
    ("step", "kept", "moved"),
    [
        (-1, [], [[0, 10, 20, 30]]),
        (0, [0], [[10, 20, 30]]),
        (9, [0], [[10, 20, 30]]),
        (10, [0, 10], [[20, 30]]),
        (15, [0, 10], [[20, 30]]),
        (30, [0, 10, 20, 30], []),
        (99, [0, 10, 20, 30], []),
    ],
)
def test_a_rewind_keeps_what_the_checkpoint_knows_and_moves_the_rest_aside(
    tmp_path, step, kept, moved
):
    log = filled(tmp_path, (0, 10, 20, 30))
    lines = log.file.read_bytes().splitlines()
    assert log.rewind(step) == 4 - len(kept)
    assert steps(journal.read(RunFolder(tmp_path))) == kept
    assert aside(tmp_path) == moved
    everything = log.file.read_bytes() + b"".join(
        aside.path.read_bytes() for aside in journal.asides(RunFolder(tmp_path))
    )
    assert everything.splitlines() == lines  # verbatim


def test_a_rewind_before_any_line_does_nothing(tmp_path):
    assert Journal(RunFolder(tmp_path)).rewind(-1) == 0
    assert list(tmp_path.iterdir()) == []
    Journal(RunFolder(tmp_path)).file.write_bytes(b"")
    assert Journal(RunFolder(tmp_path)).rewind(5) == 0
    assert Journal(RunFolder(tmp_path)).file.read_bytes() == b""


def test_a_rewind_drops_a_torn_line_and_the_next_one_is_whole(tmp_path):
    log = filled(tmp_path, (1, 2))
    with open(log.file, "ab") as file:
        file.write(b'{"step": 3, "timest')
    assert log.rewind(2) == 0
    log.append(3, {})
    assert steps(journal.read(RunFolder(tmp_path))) == [1, 2, 3]
    assert aside(tmp_path) == []


def test_each_rewind_has_an_aside_file_of_its_own_also_after_one_was_deleted(tmp_path):
    log = filled(tmp_path, (1, 2, 3))
    log.rewind(2)
    filled(tmp_path, (3,))
    log.rewind(1)
    assert aside(tmp_path) == [[3], [2, 3]]
    journal.asides(RunFolder(tmp_path))[0].path.unlink()
    filled(tmp_path, (2,))
    log.rewind(0)
    assert aside(tmp_path) == [[2, 3], [1, 2]]


def test_a_rewind_loses_no_line_even_where_steps_do_not_rise(tmp_path):
    log = filled(tmp_path, (1, 5, 2, 6))
    log.rewind(2)
    assert steps(journal.read(RunFolder(tmp_path))) == [1, 2]
    assert aside(tmp_path) == [[5, 6]]


@pytest.mark.parametrize("n", range(1, 5))
def test_a_rewind_that_dies_at_any_replacement_or_sync_loses_no_line(tmp_path, monkeypatch, n):
    log = filled(tmp_path, (1, 2, 3))
    real, calls = {"fsync": os.fsync, "replace": os.replace}, [0]

    def dies(name):
        def call(*args):
            calls[0] += 1
            if calls[0] >= n:
                raise KeyboardInterrupt
            return real[name](*args)

        return call

    with monkeypatch.context() as patch:
        for name in real:
            patch.setattr(os, name, dies(name))
        with pytest.raises(KeyboardInterrupt):
            log.rewind(1)
    assert set(steps(journal.read(RunFolder(tmp_path)))) | {
        s for f in aside(tmp_path) for s in f
    } == {1, 2, 3}
    log.rewind(1)
    assert steps(journal.read(RunFolder(tmp_path))) == [1]
    assert aside(tmp_path)[-1] == [2, 3]


# ---- following ----
def test_a_tail_sees_each_line_once_and_a_torn_one_when_it_is_whole(tmp_path):
    tail, log = Tail(RunFolder(tmp_path)), Journal(RunFolder(tmp_path))
    assert tail.poll() == []
    filled(tmp_path, (1, 2))
    assert steps(tail.poll()) == [1, 2]
    assert tail.poll() == []
    with open(log.file, "ab") as file:
        file.write(b'{"step": 3, "tim')
        file.flush()
        assert tail.poll() == []
        file.write(b'estamp": 1}\n{"st')
        file.flush()
        assert steps(tail.poll()) == [3]
        file.write(b'ep": 4, "timestamp": 1}\n')
        file.flush()
        assert steps(tail.poll()) == [4]
    assert tail.poll() == []


def test_a_replaced_file_is_told_again_from_its_start(tmp_path):
    log, tail = filled(tmp_path, (1, 2, 3)), Tail(RunFolder(tmp_path))
    first = tail.poll()
    log.rewind(2)
    assert tail.poll() == first[:2]
    log.append(3, {})
    assert steps(tail.poll()) == [3]


def test_a_file_replaced_several_times_between_two_looks_is_told_again_from_its_start(tmp_path):
    # File systems give the freed inode of the first file to the third.
    for number in range(1, 8):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        log, tail = filled(run_dir, (1, 2, 3)), Tail(RunFolder(run_dir))
        tail.poll()
        for _ in range(number):
            log.rewind(1)
            log.append(20, {"train/loss": 1.0})
        assert steps(tail.poll()) == [1, 20]


def test_a_reader_beside_a_writer_sees_every_line_once_and_no_half_ones(tmp_path):
    count, seen = 3000, []
    writer = f"""
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
log = Journal(RunFolder({str(tmp_path)!r}))
for step in range({count}):
    log.append(step, {{"train/loss": 1 / 3, "padding": 10.0 ** -(step % 300)}})
"""
    process = subprocess.Popen([sys.executable, "-c", writer])
    tail, done = Tail(RunFolder(tmp_path)), threading.Event()
    while not done.is_set():
        if process.poll() is not None:
            done.set()
        seen += tail.poll()
        for record in journal.read(RunFolder(tmp_path))[-1:]:
            assert record["train/loss"] == 1 / 3
    assert process.returncode == 0
    assert steps(seen) == list(range(count))
