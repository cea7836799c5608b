"""What memory this machine has, or the container around this process: of `/proc` and of the control groups, v2 and v1.

Eats nothing but those files; where a system has none of them there is nothing to know.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Kind:
    """Where the memory controller of one version lies, and what its files are called."""

    root: str
    limit: str
    usage: str
    reclaimable: str
    events: str


_V2 = _Kind("", "memory.max", "memory.current", "inactive_file", "memory.events")
_V1 = _Kind(
    "memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
    "memory.oom_control",
)


def total_bytes() -> int:
    """The machine's memory, or the tightest limit around this process."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in _limits())])


def available_bytes() -> int:
    """What is left of it."""
    return min([psutil.virtual_memory().available, *(left for _, left in _limits())])


def oom_kills() -> int:
    """How many processes the kernel has ended for want of memory: of this process's group, else of the machine."""
    for kind, folders in _groups():
        with contextlib.suppress(OSError, LookupError):
            return _fields(folders[-1] / kind.events)["oom_kill"]
    with contextlib.suppress(OSError, LookupError):
        return _fields(PROC / "vmstat")["oom_kill"]
    return 0


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) of the group and of those around it that have one."""
    for kind, folders in _groups():
        for folder in folders:
            with contextlib.suppress(OSError, LookupError, ValueError):  # no limit: "max"
                limit, used = (
                    int((folder / name).read_text("utf-8")) for name in (kind.limit, kind.usage)
                )
                yield limit, limit - used + _fields(folder / "memory.stat")[kind.reclaimable]


def _groups() -> Iterator[tuple[_Kind, list[Path]]]:
    """The folders that lead to this process's group, outermost first; inside a container only the root may be there to see."""
    try:
        lines = (PROC / "self" / "cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        kind = _V1 if controllers else _V2
        root, parts = GROUPS / kind.root, [part for part in path.split("/") if part]
        found = [root.joinpath(*parts[:n]) for n in range(len(parts) + 1)]
        existing = [folder for folder in found if (folder / kind.usage).exists()]
        if existing:
            yield kind, existing


def _fields(file: Path) -> dict[str, int]:
    """`name number …` lines."""
    lines = (line.split() for line in file.read_text("utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
