"""Events: a line is whole or passed over, and no line spoils its neighbours."""

import pytest

from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder


@pytest.mark.parametrize(
    "torn",
    [
        b'{"time": "2026-11-27T05:00:00+00:00", "ki',
        b"\xff",
        b"\n\n[1]\nnull\n{}\n" + b"[" * 100_000,
    ],
)
def test_what_is_torn_or_no_event_is_passed_over_and_the_next_one_stands_on_a_line_of_its_own(
    tmp_path, torn
):
    first = events.note(RunFolder(tmp_path), "hang", "rank 1 hangs", rank=1)
    with open(RunFolder(tmp_path).events_file, "ab") as file:
        file.write(torn)
    assert events.read(RunFolder(tmp_path)) == [first]
    second = events.note(RunFolder(tmp_path), "drift", "of the clock")
    assert events.read(RunFolder(tmp_path)) == [first, second]
