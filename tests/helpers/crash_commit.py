"""Commits in forked children, each killed after another file-system call: `crash_commit.py FOLDER` -> JSON.

A commit makes its calls through `os` and `open`; here each of them is counted, and the n-th is followed by a real SIGKILL
(a write also by one half-way). An audit hook ends a child that opens, renames or removes anything past the counter, so no
call can be missed. Prints for each scenario {"calls": of one left alone, "ends": [[n, call, "old" or "new"], …]}.
"""

import builtins
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from orchestrator.checkpoint import store as checkpoint

CALLS = [
    (os, name)
    for name in (
        "open",
        "write",
        "fsync",
        "fdatasync",
        "close",
        "mkdir",
        "rename",
        "replace",
        "link",
        "symlink",
        "rmdir",
        "unlink",
        "remove",
        "truncate",
        "ftruncate",
        "scandir",
        "listdir",
        "stat",
        "lstat",
        "statvfs",
    )
] + [(builtins, "open")]
AUDITED = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.link",
    "os.symlink",
    "os.rmdir",
    "os.remove",
    "os.truncate",
    "os.scandir",
    "os.listdir",
)


NO_TENSORS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file


def commit(directory: Path, step: int, mark: int) -> None:
    """Small parts that say which one it is; the loss makes step 2 the best."""
    parts = {"model.safetensors": NO_TENSORS, "state.json": bytes([mark]) * 1000, "a.txt": b""}
    fingerprints = {"data": "d", "numerics": {"cpus_per_worker": 1, "device": "cpu"}}
    facts = {"mark": mark, "metrics": {"val/loss": abs(step - 2)}, "fingerprints": fingerprints}
    checkpoint.commit(directory, step, parts, facts)


def commit_and_prune(directory: Path, step: int, mark: int) -> None:
    commit(directory, step, mark)
    checkpoint.prune(directory, 1)


def leave_behind(directory: Path) -> None:
    """What killed writers may have left: a torn commit, a removal, and the first half of a replacement."""
    commit(directory, 1, 1)
    for name in (".step-00000002.77-abc", ".step-00000000.removed-abc"):
        shutil.copytree(directory / "step-00000001", directory / name)
    (directory / ".step-00000002.77-abc" / "MANIFEST.json").unlink()
    os.rename(directory / "step-00000001", directory / ".step-00000001.aside")


def fill(*steps: int):
    return lambda directory: [commit(directory, step, step) for step in steps]


# name: (what stands there, what is killed, the step that is then the latest)
SCENARIOS = {
    "first": (lambda directory: None, lambda d: commit(d, 1, 9), None),
    "beside": (fill(1), lambda d: commit(d, 2, 9), 1),
    "same": (fill(1), lambda d: commit(d, 1, 9), 1),
    "prune": (fill(1, 2, 3), lambda d: commit_and_prune(d, 4, 9), 3),
    "leftovers": (leave_behind, lambda d: commit_and_prune(d, 2, 9), 1),
}


class Counter:
    """Counts the calls of this process; the `at`-th is followed by a kill, or a write cut short by it."""

    def __init__(self, at: int | None, torn: bool):
        self.at, self.torn, self.depth, self.calls, self.names = at, torn, 0, [], {}
        for owner, name in CALLS:
            setattr(owner, name, self.counted(getattr(owner, name), name))
        sys.addaudithook(self.audit)

    def audit(self, event: str, _) -> None:
        if event in AUDITED and not self.depth:
            os._exit(99)

    def counted(self, real, name: str):
        def call(*args, **kwargs):
            self.calls.append([name, str(self.names.get(args[0], args[0]) if args else "")])
            last, self.depth = len(self.calls) == self.at, self.depth + 1
            if last and self.torn and name == "write":
                real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                result = real(*args, **kwargs)
            finally:
                self.depth -= 1
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)
            if name == "open" and isinstance(result, int):
                self.names[result] = args[0]
            return result

        return call


def child(action, directory: Path, at: int | None, torn: bool, report: Path) -> int:
    """The status of a process that runs `action` and is killed at its `at`-th call; it reports its calls if it was not."""
    pid = os.fork()
    if pid == 0:
        opened = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        write = os.write
        counter = Counter(at, torn)
        action(directory)
        write(opened, json.dumps(counter.calls).encode())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state_of(directory: Path, old: int | None) -> str:
    """Which one a resume would take, its content and that of every other one checked."""

    def fail(line):
        raise AssertionError(line)

    found = checkpoint.latest_valid(directory, warn=fail)
    for step in checkpoint.steps(directory):
        checkpoint.verify(checkpoint.path_of(directory, step))
    if found is None:
        assert old is None
        return "old"
    mark = checkpoint.read_manifest(found)["mark"]
    assert (found / "state.json").read_bytes() == bytes([mark]) * 1000
    assert mark == 9 or found == checkpoint.path_of(directory, old), found
    return "new" if mark == 9 else "old"


def run(folder: Path, prepare, action, old: int | None) -> dict:
    """One scenario, killed at every call."""
    base, report = folder / "base" / "checkpoints", folder / "calls.json"
    base.parent.mkdir(parents=True)
    prepare(base)
    shutil.copytree(base.parent, folder / "whole")
    assert child(action, folder / "whole" / "checkpoints", None, False, report) == 0
    calls, ends = json.loads(report.read_text()), []
    for n, (name, _) in enumerate(calls, 1):
        for torn in (False, True) if name == "write" else (False,):
            directory = folder / "run" / "checkpoints"
            shutil.copytree(base.parent, directory.parent)
            status = child(action, directory, n, torn, report)
            assert status == -signal.SIGKILL, (n, calls[n - 1], status)
            ends.append([n, name, state_of(directory, old)])
            commit_and_prune(directory, 5, 5)  # and the next one finds its way
            assert 5 in checkpoint.steps(directory) and not list(directory.glob(".*")), (
                n,
                calls[n - 1],
            )
            shutil.rmtree(directory.parent)
    return {"calls": calls, "ends": ends}


if __name__ == "__main__":
    print(
        json.dumps(
            {name: run(Path(sys.argv[1]) / name, *scenario) for name, scenario in SCENARIOS.items()}
        )
    )
