"""Events: each line is whole or skipped, and a damaged line does not damage its neighbors."""

import pytest

from orchestrator.runs import events


@pytest.mark.parametrize(
    "damaged",
    [
        b'{"time": "2026-11-27T05:00:00+00:00", "ki',
        b"\xff",
        b"\n\n[1]\nnull\n{}\n" + b"[" * 100_000,
    ],
)
def test_lines_that_are_not_events_are_skipped(folder, damaged):
    first = events.note(folder, "hang", "rank 1 hangs", rank=1)
    with open(folder.events_file, "ab") as file:
        file.write(damaged)
    assert events.read(folder) == [first]
    second = events.note(folder, "drift", "the torch version changed")
    assert events.read(folder) == [first, second]


def test_event_that_cannot_be_written_is_printed(folder, capsys):
    folder.events_file.mkdir()
    events.note(folder, "hang", "rank 1 hangs")
    assert capsys.readouterr().out.endswith("rank 1 hangs\n")
    assert events.read(folder) == []
