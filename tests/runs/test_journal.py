"""The journal: lines are whole or missing, a resume loses none, a tail returns each one once."""

import contextlib
import math
import os
import resource
import signal
import subprocess
import sys

import pytest

from orchestrator.errors import UserError
from orchestrator.runs import events, journal
from orchestrator.runs.journal import Journal, Tail
from orchestrator.train.due import by_interval


def filled(folder, steps) -> Journal:
    """Return a journal with a line for each of these steps."""
    log = Journal(folder)
    for step in steps:
        log.append(step, {"train/loss": step / 3})
    return log


def steps_of(lines) -> list[int]:
    return [line["step"] for line in lines]


def steps_in_asides(folder) -> list[list[int]]:
    return [steps_of(aside.read()) for aside in journal.asides(folder)]


# ---- append and read ----


def test_values_are_read_back_to_the_last_bit(folder):
    values = {"a": 0.1 + 0.2, "b": 5e-324, "c": -0.0, "d": math.nan, "e": math.inf, "f": 3}
    written = Journal(folder).append(7, values)
    (read,) = journal.read(folder)
    assert repr(read) == repr(written)
    assert {key: repr(value) for key, value in values.items()} == {k: repr(read[k]) for k in values}
    assert read["step"] == 7
    assert isinstance(read["timestamp"], int)
    assert repr(journal.last(folder)) == repr(written)


def test_folder_without_a_journal_has_no_lines(folder):
    assert journal.read(folder) == []
    assert journal.last(folder) is None
    assert Tail(folder).poll() == []
    assert journal.asides(folder) == []


def test_incomplete_last_line_is_not_read(folder):
    log = filled(folder, (1, 2))
    whole = log.file.read_bytes()
    for cut in range(1, len(whole.splitlines()[1]) + 1):
        log.file.write_bytes(whole[:-cut])
        assert steps_of(journal.read(folder)) == [1]
        assert journal.last(folder)["step"] == 1
        log.append(3, {})  # after a killed process
        assert steps_of(journal.read(folder))[-1] == 3


@contextlib.contextmanager
def disk_with_room_for(size: int):
    """Let no file of this process grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_lines_wait_while_the_disk_is_full_and_are_then_written_in_order(folder, capsys):
    log = filled(folder, (1, 2))
    size = log.file.stat().st_size
    with disk_with_room_for(size + 20):
        with pytest.raises(OSError):
            log.write({"step": 3, "train/loss": 1.0})
        assert log.file.stat().st_size == size, "a part of a line was left"
        late = [log.append(step, {"train/loss": 1.0}) for step in (3, 4)]
        message = f"{log.file}: no room for the line of step 3 .*run the same command again"
        with pytest.raises(UserError, match=message):
            log.close()
    assert "step 3 (No space left on device); it waits in memory" in capsys.readouterr().out
    assert log.file.stat().st_size == size
    late.append(log.append(5, {}))
    assert journal.read(folder)[2:] == late
    log.close()
    message = events.read(folder)[-1]["message"]
    assert message.endswith("there is room again, and the lines that waited are written")


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
def test_rewind_moves_the_lines_after_a_step_unchanged(folder, step, kept, moved):
    log = filled(folder, (0, 10, 20, 30))
    lines = log.file.read_bytes()
    assert log.rewind(step) == 4 - len(kept)
    assert steps_of(journal.read(folder)) == kept
    assert steps_in_asides(folder) == moved
    asides = [aside.path.read_bytes() for aside in journal.asides(folder)]
    assert log.file.read_bytes() + b"".join(asides) == lines
    assert [aside.first_step for aside in journal.asides(folder)] == [step + 1] * len(moved)


def test_rewind_can_keep_a_part_of_a_line_and_archives_the_whole(folder):
    log = filled(folder, (1, 2))
    before = journal.read(folder)
    assert log.rewind(2, lambda line: {"step": line["step"], "timestamp": 7}) == 1
    assert journal.read(folder) == [before[0], {"step": 2, "timestamp": 7}]
    assert journal.asides(folder)[0].read() == before[1:]

    assert log.rewind(2, lambda line: line) == 0, "an unchanged line is not archived"
    assert log.rewind(2, lambda line: None) == 1
    assert journal.read(folder) == before[:1]


def test_metrics_that_only_the_last_step_logs_are_removed():
    line = {"step": 12, "timestamp": 7, "train/loss": 1.0, "val/loss": 2.0, "train/eval_loss": 3.0}
    assert by_interval(line, 3, 4) == line
    assert by_interval(line, 3, 5) == {"step": 12, "timestamp": 7, "train/loss": 1.0}
    evaluated = {"step": 12, "timestamp": 7, "val/loss": 2.0, "train/eval_loss": 3.0}
    assert by_interval(line, None, 4) == evaluated
    assert by_interval(line, 5, None) is None


def test_rewind_of_an_empty_journal_writes_nothing(folder):
    assert Journal(folder).rewind(-1) == 0
    assert list(folder.path.iterdir()) == []
    folder.journal_file.touch()
    assert Journal(folder).rewind(5) == 0
    assert folder.journal_file.read_bytes() == b""


def test_rewind_drops_an_incomplete_line(folder):
    log = filled(folder, (1, 2))
    with open(log.file, "ab") as file:
        file.write(b'{"step": 3, "timest')
    assert log.rewind(2) == 0
    log.append(3, {})
    assert steps_of(journal.read(folder)) == [1, 2, 3]
    assert journal.asides(folder) == []


def test_each_rewind_has_its_own_aside_also_if_an_older_one_was_deleted(folder):
    log = filled(folder, (1, 2, 3))
    log.rewind(2)
    filled(folder, (3,))
    log.rewind(1)
    assert steps_in_asides(folder) == [[3], [2, 3]]
    journal.asides(folder)[0].path.unlink()
    filled(folder, (2,))
    log.rewind(0)
    assert steps_in_asides(folder) == [[2, 3], [1, 2]]
    assert journal.generation(folder) == 3


def test_aside_of_an_earlier_version_and_a_foreign_file(folder):
    (folder.path / "metrics.aside-0003.jsonl").write_text('{"step": 5, "timestamp": 7}\n')
    (folder.path / "metrics.aside-copy.jsonl").touch()
    (folder.path / "metrics.aside-0004-from-2.jsonl").symlink_to(folder.path / "other")
    (aside,) = journal.asides(folder)
    assert (aside.number, aside.first_step, aside.read()) == (
        3,
        0,
        [{"step": 5, "timestamp": 7}],
    )


def test_rewind_loses_no_line_if_steps_do_not_rise(folder):
    filled(folder, (1, 5, 2, 6)).rewind(2)
    assert steps_of(journal.read(folder)) == [1, 2]
    assert steps_in_asides(folder) == [[5, 6]]


@pytest.mark.parametrize("number", range(1, 5))
def test_rewind_that_is_killed_at_any_fsync_or_rename_loses_no_line(folder, monkeypatch, number):
    log = filled(folder, (1, 2, 3))
    calls = []

    def killed_at_call(function):
        def call(*arguments):
            calls.append(function)
            if len(calls) >= number:
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed_at_call(os.fsync))
        patch.setattr(os, "replace", killed_at_call(os.replace))
        with pytest.raises(KeyboardInterrupt):
            log.rewind(1)
    everywhere = [journal.read(folder), *(aside.read() for aside in journal.asides(folder))]
    assert {step for lines in everywhere for step in steps_of(lines)} == {1, 2, 3}

    log.rewind(1)
    assert steps_of(journal.read(folder)) == [1]
    assert steps_in_asides(folder)[-1] == [2, 3]


# ---- follow ----


def test_tail_returns_each_line_once_and_waits_for_the_end_of_a_line(folder):
    tail = Tail(folder)
    assert tail.poll() == []
    log = filled(folder, (1, 2))
    assert steps_of(tail.poll()) == [1, 2]
    assert tail.poll() == []
    with open(log.file, "ab", buffering=0) as file:
        file.write(b'{"step": 3, "tim')
        assert tail.poll() == []
        file.write(b'estamp": 1}\n{"st')
        assert steps_of(tail.poll()) == [3]
        file.write(b'ep": 4, "timestamp": 1}\n')
        assert steps_of(tail.poll()) == [4]
    assert tail.poll() == []


@pytest.mark.parametrize("times", range(1, 8))
def test_tail_reads_a_replaced_journal_from_its_start(folder, times):
    # File systems may give the inode of the first file to the third one.
    log = filled(folder, (1, 2, 3))
    tail = Tail(folder)
    tail.poll()
    for _ in range(times):
        log.rewind(1)
        log.append(20, {})
    assert steps_of(tail.poll()) == [1, 20]
    log.append(30, {})
    assert steps_of(tail.poll()) == [30]


WRITER = """
import sys
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
log = Journal(RunFolder(sys.argv[1]))
for step in range(3000):
    log.append(step, {"train/loss": 1 / 3, "padding": 10.0 ** -(step % 300)})
"""


def test_tail_beside_a_writer_returns_every_line_once_and_whole(folder):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder.path)])
    tail = Tail(folder)
    seen = []
    ended = False
    while not ended:
        ended = writer.poll() is not None
        seen += tail.poll()
        last = journal.last(folder)
        assert last is None or last["train/loss"] == 1 / 3
        # All complete lines can be read at any moment.
        assert len(journal.read(folder)) >= len(seen)
    assert writer.returncode == 0
    assert steps_of(seen) == list(range(3000))
