"""Lines that were lost or changed between two attempts come back from the copy in a checkpoint."""

import json

import pytest

from orchestrator.checkpoint import store
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.runs.journal_copy import restore
from tests.helpers.facts import FACTS

STEP = 30


@pytest.fixture
def checkpoint(folder) -> RunFolder:
    """A checkpoint of step 30. The journal of the run goes on to step 50."""
    lines = Journal(folder)
    for step in (10, 20, 30):
        lines.append(step, {"train/loss": step / 7, "val/loss": step / 3})
    parts = {folder.journal_file.name: folder.journal_file.read_bytes()}
    path = store.commit(folder.checkpoints, STEP, parts, FACTS)
    for step in (40, 50):
        lines.append(step, {"train/loss": step / 7})
    return RunFolder(path)


def edited(number: int):
    """Return a function that changes the loss in a line."""

    def edit(lines: list[bytes]) -> list[bytes]:
        line = json.loads(lines[number])
        line["train/loss"] += 1
        return [*lines[:number], json.dumps(line).encode(), *lines[number + 1 :]]

    return edit


DAMAGES = {
    "deleted": lambda lines: [],
    "cut": lambda lines: lines[:1],
    "cut before the last line": lambda lines: lines[:2],
    "line missing": lambda lines: [lines[0], *lines[2:]],
    "doubled": lambda lines: [*lines, *lines],
    "one line doubled": lambda lines: [lines[0], *lines],
    "edited": edited(1),
    "last line edited": edited(2),
    "not JSON": lambda lines: [lines[0], b"\0garbage", *lines[2:]],
    "not a line": lambda lines: [*lines, b"[1]", b'{"step": "x"}'],
    "swapped": lambda lines: [lines[1], lines[0], *lines[2:]],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_journal_is_restored_and_named_and_kept(folder, checkpoint, kind):
    damaged = b"".join(
        line + b"\n" for line in DAMAGES[kind](folder.journal_file.read_bytes().splitlines())
    )
    folder.journal_file.write_bytes(damaged)
    restore(folder, STEP)
    assert folder.journal_file.read_bytes() == checkpoint.journal_file.read_bytes()
    [event] = events.read(folder)
    assert (event["kind"], event["step"]) == ("journal_damaged", STEP)
    assert "\n" not in event["message"]
    [kept] = folder.path.glob("metrics.damaged-*.jsonl")
    assert kept.read_bytes() == damaged
    restore(folder, STEP)
    assert len(events.read(folder)) == 1


def test_missing_journal_is_restored(folder, checkpoint):
    folder.journal_file.unlink()
    restore(folder, STEP)
    assert folder.journal_file.read_bytes() == checkpoint.journal_file.read_bytes()
    assert "steps 10, 20, 30" in events.read(folder)[0]["message"]


def shorten_last_line(folder) -> None:
    names = ("step", "timestamp", "train/loss")
    Journal(folder).rewind(STEP, lambda line: {name: line[name] for name in names})


def drop_last_line(folder) -> None:
    Journal(folder).rewind(STEP, lambda line: None)


def complete_last_line(folder) -> None:
    Journal(folder).rewind(STEP - 1)
    Journal(folder).append(STEP, {"train/loss": 30 / 7, "val/loss": 30 / 3, "train/eval_loss": 1.0})


@pytest.mark.parametrize("rewrite", [shorten_last_line, drop_last_line, complete_last_line])
def test_line_that_a_longer_or_shorter_run_has_rewritten_is_not_damage(folder, checkpoint, rewrite):
    rewrite(folder)
    before = folder.journal_file.read_bytes()
    restore(folder, STEP)
    assert folder.journal_file.read_bytes() == before
    assert events.read(folder) == []


def test_undamaged_journal_stays(folder, checkpoint):
    before = folder.journal_file.read_bytes()
    with open(folder.journal_file, "ab") as file:
        file.write(b'{"step": 60, "ti')  # a killed process left an incomplete line
    restore(folder, STEP)
    assert folder.journal_file.read_bytes().startswith(before)
    assert events.read(folder) == []


def test_without_a_copy_only_damaged_lines_are_dropped(folder, checkpoint):
    checkpoint.journal_file.unlink()
    lines = folder.journal_file.read_bytes().splitlines()
    folder.journal_file.write_bytes(b"\n".join([lines[0], b"{", *lines[1:], lines[1], b""]))
    restore(folder, STEP)
    assert [line["step"] for line in journal.read(folder)] == [10, 20, 30, 40, 50]
    assert "2 line(s)" in events.read(folder)[0]["message"]


def test_readers_skip_damaged_lines(folder, checkpoint):
    tail = journal.Tail(folder)
    assert len(tail.poll()) == 5
    with open(folder.journal_file, "ab") as file:
        file.write(b'garbage\n{"step": 60, "timestamp": 1}\n')
    assert [line["step"] for line in tail.poll()] == [60]
    assert [line["step"] for line in journal.read(folder)][-1] == 60
    assert journal.last(folder)["step"] == 60
