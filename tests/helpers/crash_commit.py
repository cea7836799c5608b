"""Kill commits after each of their system calls: `crash_commit.py FOLDER` prints JSON.

A commit makes its calls through `os` and `open`. Here they are counted in a forked child, and call
number n is followed by a real SIGKILL; a write is also killed in the middle. An audit hook ends a
child that opens, renames or removes anything past the counter, so that no call is missed.

Prints for each scenario {"calls": those of a commit that is not killed,
"ends": [[n, name of the call, "old" or "new" checkpoint found], ...]}.
"""

import builtins
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store
from orchestrator.checkpoint.format import FORMAT_IN_PARTS
from tests.helpers.facts import FACTS

NAMES = (
    *("open", "write", "fsync", "fdatasync", "close", "mkdir", "rename", "replace", "link"),
    *("symlink", "rmdir", "unlink", "remove", "truncate", "ftruncate", "scandir", "listdir"),
    *("stat", "lstat", "statvfs"),
)
AUDITED = (
    *("open", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.rmdir", "os.remove"),
    *("os.truncate", "os.scandir", "os.listdir"),
)
NO_TENSORS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file
NEW = 9  # mark of the checkpoint whose commit is killed; others have their step


def commit(directory: Path, step: int, mark: int) -> None:
    """Write small parts that contain `mark`. Step 2 has the lowest loss."""
    parts = {"model.safetensors": NO_TENSORS, "state.json": bytes([mark]) * 1000, "a.txt": b""}
    facts = {"mark": mark, "metrics": {"val/loss": abs(step - 2)}, **FACTS}
    store.commit(directory, step, parts, facts)


def commit_in_parts(directory: Path, step: int, mark: int) -> None:
    """Write the same files as `commit`, as if one of them came from another rank."""
    parts = {"model.safetensors": NO_TENSORS, "state.json": bytes([mark]) * 1000}
    temporary = store.begin(directory, step, 2000)
    with store.discarded_on_error(temporary):
        entries = store.write(temporary, {"a.txt": b""}) | store.write(temporary, parts)
        store.finish(temporary, step, entries, {"mark": mark, **FACTS}, FORMAT_IN_PARTS)


def commit_and_prune(directory: Path, step: int, mark: int) -> None:
    commit(directory, step, mark)
    store.prune(directory, 1)


def leave_behind(directory: Path) -> None:
    """Create what killed writers leave: half a commit, half a removal, half a replacement."""
    commit(directory, 1, 1)
    for name in (".step-00000002.77-abc", ".step-00000000.removed-abc"):
        shutil.copytree(directory / "step-00000001", directory / name)
    (directory / ".step-00000002.77-abc" / "MANIFEST.json").unlink()
    os.rename(directory / "step-00000001", directory / ".step-00000001.aside")


def write_steps(*steps: int) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        for step in steps:
            commit(directory, step, step)

    return write


@dataclass
class Scenario:
    """One test.

    Attributes:
        prepare: Creates the checkpoints that exist before.
        action: The commit that is killed.
        old_step: Newest step before the commit; None if there is none.
    """

    prepare: Callable[[Path], None]
    action: Callable[[Path], None]
    old_step: int | None


SCENARIOS = {
    "first": Scenario(write_steps(), lambda d: commit(d, 1, NEW), None),
    "beside": Scenario(write_steps(1), lambda d: commit(d, 2, NEW), 1),
    "same": Scenario(write_steps(1), lambda d: commit(d, 1, NEW), 1),
    "parts": Scenario(write_steps(1), lambda d: commit_in_parts(d, 1, NEW), 1),
    "prune": Scenario(write_steps(1, 2, 3), lambda d: commit_and_prune(d, 4, NEW), 3),
    "leftovers": Scenario(leave_behind, lambda d: commit_and_prune(d, 2, NEW), 1),
}


class Counter:
    """Counts the system calls of this process and kills it after call number `last`."""

    def __init__(self, last: int | None, is_torn: bool) -> None:
        self.last = last
        self.is_torn = is_torn
        self.depth = 0
        self.calls: list[list[str]] = []
        self.paths: dict[int, Any] = {}  # by file descriptor
        for name in NAMES:
            setattr(os, name, self.counted(getattr(os, name), name))
        builtins.open = self.counted(builtins.open, "open")
        sys.addaudithook(self.audit)

    def audit(self, event: str, _: object) -> None:
        if event in AUDITED and not self.depth:
            os._exit(99)

    def counted(self, function: Callable, name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            target = self.paths.get(args[0], args[0]) if args else ""
            self.calls.append([name, str(target)])
            is_last = len(self.calls) == self.last
            self.depth += 1
            if is_last and self.is_torn and name == "write":
                function(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                result = function(*args, **kwargs)
            finally:
                self.depth -= 1
                if is_last:
                    os.kill(os.getpid(), signal.SIGKILL)
            if name == "open" and isinstance(result, int):
                self.paths[result] = args[0]
            return result

        return call


def run_in_child(
    action: Callable[[Path], None], directory: Path, last: int | None, is_torn: bool, report: Path
) -> int:
    """Run `action` in a child, which writes its calls to `report` at its end. Return its status."""
    pid = os.fork()
    if pid == 0:
        opened = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        write = os.write
        counter = Counter(last, is_torn)
        action(directory)
        write(opened, json.dumps(counter.calls).encode())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def found_after_kill(directory: Path, old_step: int | None) -> str:
    """Verify all checkpoints. Return whether the newest is the "old" or the "new" one."""

    def fail(message: str) -> None:
        raise AssertionError(message)

    found = store.latest_valid(directory, warn=fail)
    for step in store.steps(directory):
        store.verify(store.path_of(directory, step))
    if found is None:
        assert old_step is None
        return "old"
    mark = json.loads((found / store.MANIFEST).read_text())["mark"]
    assert (found / "state.json").read_bytes() == bytes([mark]) * 1000
    if mark == NEW:
        return "new"
    assert old_step is not None and found == store.path_of(directory, old_step), found
    return "old"


def run(folder: Path, scenario: Scenario) -> dict[str, Any]:
    """Kill one scenario at each of its calls."""
    base = folder / "base" / "checkpoints"
    report = folder / "calls.json"
    base.parent.mkdir(parents=True)
    scenario.prepare(base)
    shutil.copytree(base.parent, folder / "whole")
    whole = folder / "whole" / "checkpoints"
    assert run_in_child(scenario.action, whole, None, False, report) == 0
    calls = json.loads(report.read_text())
    ends = []
    for number, (name, _) in enumerate(calls, 1):
        for is_torn in (False, True) if name == "write" else (False,):
            directory = folder / "run" / "checkpoints"
            shutil.copytree(base.parent, directory.parent)
            status = run_in_child(scenario.action, directory, number, is_torn, report)
            assert status == -signal.SIGKILL, (number, name, status)
            ends.append([number, name, found_after_kill(directory, scenario.old_step)])
            # The next commit works and removes all leftovers.
            commit_and_prune(directory, 5, 5)
            assert 5 in store.steps(directory), (number, name)
            assert not list(directory.glob(".*")), (number, name)
            shutil.rmtree(directory.parent)
    return {"calls": calls, "ends": ends}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(json.dumps({name: run(folder / name, item) for name, item in SCENARIOS.items()}))
