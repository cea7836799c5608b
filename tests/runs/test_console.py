"""The console: the text of a line, and each line and event once."""

import os

import pytest

from orchestrator.runs import events, journal
from orchestrator.runs.console import Console, format_line
from orchestrator.runs.journal import Journal
from tests.helpers.wait import wait_until


@pytest.mark.parametrize(
    ("line", "text"),
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
            "step 2,000/2,000 | loss 1.0000 | lr 6.00e-05 | 1 tok/s | ETA 0s | "
            "val loss 1.5000, 2.0000 bits/byte",
        ),
        (
            {"step": 1, "train/loss": float("nan"), "optim/lr": 0.0},
            "step     1/2,000 | loss nan | lr 0.00e+00",
        ),
    ],
)
def test_text_of_a_line(line, text):
    assert format_line(line, 2000, lambda step: 256 * step) == text


class Screen:
    """What was printed so far."""

    def __init__(self, capsys):
        self.capsys = capsys
        self.text = ""

    def lines(self) -> list[str]:
        self.text += self.capsys.readouterr().out
        return self.text.splitlines()

    def wait_for(self, count: int) -> None:
        wait_until(lambda: len(self.lines()) >= count)


@pytest.fixture
def screen(capsys):
    return Screen(capsys)


def console(folder, interval_s=0.01) -> Console:
    return Console(folder, 100, int, interval_s=interval_s)


def lines_of(*steps: int) -> list[str]:
    return [f"step {step:>3}/100" for step in steps]


def test_every_line_is_printed_once_also_after_a_rewind(folder, screen):
    log = Journal(folder)
    log.append(0, {})  # an earlier attempt printed it
    with console(folder):
        for step in (1, 2, 3):
            log.append(step, {})
        screen.wait_for(3)
        log.rewind(1)
        for step in (2, 3, 4):
            log.append(step, {})
    assert screen.lines() == lines_of(1, 2, 3, 2, 3, 4)


def test_lines_of_the_same_millisecond_or_of_a_slow_clock_are_printed(folder, screen, monkeypatch):
    times = iter([5, 5, 5, 3, 2])
    monkeypatch.setattr(journal.time, "time_ns", lambda: next(times) * 1_000_000)
    log = Journal(folder)
    log.append(0, {})
    with console(folder):
        for step in (1, 2, 3, 4):
            log.append(step, {})
    assert screen.lines() == lines_of(1, 2, 3, 4)


def test_events_are_printed_but_not_those_of_earlier_attempts(folder, screen):
    events.note(folder, "drift", "the driver has printed this")
    with console(folder):
        Journal(folder).append(1, {})
        screen.wait_for(1)
        events.note(folder, "hang", "rank 1 hung in gradient of step 2")
        screen.wait_for(2)
        folder.events_file.write_bytes(folder.events_file.read_bytes() + b'{"kind": "hang", "mess')
        events.note(folder, "restart", "attempt 2 begins at step 0")
    assert screen.lines() == [
        *lines_of(1),
        "rank 1 hung in gradient of step 2",
        "attempt 2 begins at step 0",
    ]


def test_full_disk_is_printed_once_each_time(folder, screen, monkeypatch):
    # A real full disk is filled in tests/train/test_checkpointer.py.
    free = 0
    looks = 0

    def statvfs(path):
        nonlocal looks
        looks += 1
        return os.statvfs_result((4096, 4096, 100, free, free, 50, 9, 9, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    with console(folder):
        for blocks in (0, 5, 0):
            free = blocks
            seen = looks
            wait_until(lambda seen=seen: looks > seen + 1)
    message = "the disk is full. Training goes on; lines and checkpoints wait for room"
    assert screen.lines() == [f"{folder.path}: {message}"] * 2


def test_last_lines_are_printed_before_the_console_ends(folder, screen):
    log = Journal(folder)
    with console(folder, interval_s=30):
        log.append(1, {})
    assert screen.lines() == lines_of(1)
