"""What a person sees: the words of a line, and each line once."""

import os
import time

import pytest

from orchestrator.runs import events, journal
from orchestrator.runs.console import Console, format_line
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.text import duration, number, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.4, "0s"),
        (0.6, "1s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (60, "1m00s"),
        (61, "1m01s"),
        (250, "4m10s"),
        (3599, "59m59s"),
        (3599.6, "1h00m"),
        (3600, "1h00m"),
        (11100, "3h05m"),
        (86399, "23h59m"),
        (86400, "1d00h"),
        (187200, "2d04h"),
        (10**9, "11574d01h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            {
                "step": 100,
                "train/loss": 2.34561,
                "optim/lr": 1e-3,
                "perf/tokens_per_sec": 25600.4,
                "perf/mfu": 0.4123,
            },
            "step   100/2,000 | loss 2.3456 | lr 1.00e-03 | 25,600 tok/s | MFU 41.2% | ETA 19s",
        ),
        (
            {"step": 0, "val/loss": 4.17439, "val/bits_per_byte": 6.02},
            "step     0/2,000 | val loss 4.1744, 6.0200 bits/byte",
        ),
        (
            {
                "step": 2000,
                "train/loss": 1.0,
                "optim/lr": 6e-5,
                "perf/tokens_per_sec": 1.0,
                "val/loss": 1.5,
                "val/bits_per_byte": 2,
            },
            "step 2,000/2,000 | loss 1.0000 | lr 6.00e-05 | 1 tok/s | ETA 0s | val loss 1.5000, 2.0000 bits/byte",
        ),
        (
            {"step": 1, "train/loss": float("nan"), "optim/lr": 0.0},
            "step     1/2,000 | loss nan | lr 0.00e+00",
        ),
    ],
)
def test_a_record_is_one_steady_line(record, line):
    assert format_line(record, 2000, 256) == line


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0, "0"),
        (1.5, "1.5000"),
        (1234567.891, "1,234,568"),
        ("FINISHED", "FINISHED"),
        (True, "True"),
        (None, "None"),
        ([1, "a"], '[1, "a"]'),
        ({"a": 1}, '{"a": 1}'),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_a_table_is_aligned_and_leaves_out_what_is_none():
    assert table({"a": 1, "long name": "x", "gone": None}) == "  a          1\n  long name  x"
    assert table({}) == table({"gone": None}) == ""


def shown(capsys) -> list[int]:
    """Steps of the lines that were printed."""
    return [
        int(line.split("/")[0].removeprefix("step").replace(",", ""))
        for line in capsys.readouterr().out.splitlines()
    ]


def test_every_record_is_printed_once_also_after_a_rewind(tmp_path, capsys):
    log = Journal(RunFolder(tmp_path))
    log.append(0, {})  # of an earlier attempt: known already
    with Console(RunFolder(tmp_path), 100, 1, interval_s=0.01):
        for step in (1, 2, 3):
            log.append(step, {})
        time.sleep(0.1)
        log.rewind(1)
        time.sleep(0.1)
        for step in (2, 3, 4):
            log.append(step, {})
    assert shown(capsys) == [1, 2, 3, 2, 3, 4]


def test_records_of_one_millisecond_or_of_a_clock_behind_ours_are_printed_too(
    tmp_path, capsys, monkeypatch
):
    log, times = Journal(RunFolder(tmp_path)), iter([5, 5, 5, 3, 2])
    monkeypatch.setattr(journal.time, "time_ns", lambda: next(times) * 1_000_000)
    log.append(0, {})
    with Console(RunFolder(tmp_path), 100, 1, interval_s=0.01):
        for step in (1, 2, 3, 4):
            log.append(step, {})
    assert shown(capsys) == [1, 2, 3, 4]


def test_events_are_lines_too_and_those_of_before_are_not_told_again(tmp_path, capsys):
    events.note(RunFolder(tmp_path), "drift", "the driver has said that")
    with Console(RunFolder(tmp_path), 100, 1, interval_s=0.01):
        Journal(RunFolder(tmp_path)).append(1, {})
        time.sleep(0.1)
        events.note(RunFolder(tmp_path), "hang", "rank 1 hung in gradient of step 2")
        time.sleep(0.1)
        events.note(RunFolder(tmp_path), "restart", "attempt 2 begins at step 0")
    assert capsys.readouterr().out.splitlines() == [
        "step   1/100",
        "rank 1 hung in gradient of step 2",
        "attempt 2 begins at step 0",
    ]


def test_what_is_torn_among_the_events_keeps_no_other_from_being_told(tmp_path, capsys):
    with Console(RunFolder(tmp_path), 100, 1, interval_s=0.01):
        RunFolder(tmp_path).events_file.write_text('{"kind": "hang", "mess')
        time.sleep(0.1)
        events.note(RunFolder(tmp_path), "restart", "attempt 2 begins at step 0")
    assert capsys.readouterr().out == "attempt 2 begins at step 0\n"


def test_a_disk_that_is_full_is_told_once_each_time(tmp_path, capsys, monkeypatch):
    free = [0]
    # The system's figures are invented here: a real full disk of a run is filled in `test_writer.py`.
    monkeypatch.setattr(
        os,
        "statvfs",
        lambda path: os.statvfs_result((4096, 4096, 100, free[0], free[0], 50, 9, 9, 0, 255)),
    )
    with Console(RunFolder(tmp_path), 100, 1, interval_s=0.01):
        for free[0] in (0, 5, 0):
            time.sleep(0.1)
    assert (
        capsys.readouterr().out.splitlines()
        == [f"{tmp_path}: the disk is full. Training goes on; lines and checkpoints wait for room"]
        * 2
    )


def test_the_last_records_are_printed_before_the_console_ends(tmp_path, capsys):
    log = Journal(RunFolder(tmp_path))
    with Console(RunFolder(tmp_path), 100, 1, interval_s=30):
        log.append(1, {})
    assert shown(capsys) == [1]
