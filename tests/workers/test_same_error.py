"""A run ends when its workers fail in the same way again and again."""

from types import SimpleNamespace

import pytest

from orchestrator.errors import UserError
from orchestrator.runs.ending import Ending
from orchestrator.workers.diagnose import diagnose
from orchestrator.workers.same_error import SameErrorAgain, SameErrorLimit

READ_ONLY = OSError(30, "Read-only file system", "metrics.jsonl")
CLOSED = RuntimeError("connection closed by peer 4711")


def fail(limit: SameErrorLimit, *errors: Exception) -> None:
    limit.after_exception(None, dict(enumerate(errors)))


def test_third_failure_with_the_same_error_ends_the_run(folder):
    limit = SameErrorLimit(folder, 3)
    fail(limit, READ_ONLY, CLOSED)
    fail(limit, RuntimeError("connection closed by peer 4712"), READ_ONLY)
    with pytest.raises(SameErrorAgain, match="^OSError: .Errno 30. Read-only file system"):
        fail(limit, READ_ONLY)


@pytest.mark.parametrize("progress", ["another error", "a new checkpoint"])
def test_another_error_or_a_new_checkpoint_begins_a_new_count(folder, progress):
    limit = SameErrorLimit(folder, 3)
    fail(limit, READ_ONLY)
    fail(limit, READ_ONLY)
    if progress == "another error":
        fail(limit, RuntimeError("killed"))
    else:
        folder.checkpoint(20).mkdir(parents=True)
    fail(limit, READ_ONLY)
    fail(limit, READ_ONLY)
    with pytest.raises(SameErrorAgain):
        fail(limit, READ_ONLY)


def test_mistake_of_the_user_on_one_rank_ends_the_run_at_once(folder):
    """Its worker may not share the folder in which the driver looks for the reason."""
    problem = UserError("storage: node2 has no run in /mnt/espalier/small")
    with pytest.raises(SameErrorAgain) as ended:
        fail(SameErrorLimit(folder, 3), CLOSED, problem)
    assert diagnose(folder, SimpleNamespace(controller_failure=ended.value)) == Ending(
        "user", "storage: node2 has no run in /mnt/espalier/small", cause="exception"
    )
