"""Prepare datasets without Ray: the tasks run in this process, in random order."""

import contextlib
import random
from collections.abc import Iterator

import pytest

from orchestrator.data import prepare


class LocalTasks(prepare.RayTasks):
    """Runs tasks in this process."""

    def __enter__(self) -> "LocalTasks":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check_shared(self, folder) -> None:
        pass

    def cpus(self) -> int:
        return 1

    def run_rows(self, run, rows):
        for row in random.sample(rows, len(rows)):
            yield run(row)


@contextlib.contextmanager
def here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "RayTasks", LocalTasks)
        yield
