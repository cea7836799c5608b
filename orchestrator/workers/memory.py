"""Memory of this machine, and processes that were ended because it ran out.

A container has less memory than its machine. Its limits are files of the control group, in version
1 or 2; psutil does not read them.
"""

import contextlib
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.cluster import calls, private
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import hangs, marks

PROC = Path("/proc")
GROUPS = Path("/sys/fs/cgroup")
ANSWER_S = 10.0  # for another machine to start a process
RESERVED = 0.05  # share of the memory that Ray's memory monitor keeps free by default
# How Ray's monitor describes its limit.
THRESHOLD = re.compile(r"exceeded threshold of (\d+)B \(\S+ of (\d+)B limit\)")


@dataclass(frozen=True)
class OutOfMemory:
    """How memory ran out.

    Attributes:
        by: What ended the worker, in words.
        host: Name of its machine.
        workers: Workers of the run on that machine.
        reserved: Bytes that must stay free there.
        of_gpu: Whether it was the memory of a GPU.
    """

    by: str
    host: str
    workers: int
    reserved: int
    of_gpu: bool = False


# ---- what ended a worker ----


def find_kill(folder: RunFolder) -> OutOfMemory | None:
    """Return the kill that ended the last attempt; None: the attempt ended in another way.

    Call it after all workers have ended and before `hangs.report`, which removes the marks of the
    ranks.
    """
    seen = marks.read(folder)
    causes = private.oom_causes()
    kills = {}
    if not hangs.has_hung(folder):  # a rank that hung was killed for that
        kills = _kills({mark.host: mark.node for mark in seen if not mark.is_over})
    for mark in seen:
        workers = sum(other.host == mark.host for other in seen)
        message = causes.get((mark.node, mark.pid))
        if message is not None:
            by = "Ray's memory monitor ended a worker"
            return OutOfMemory(by, mark.host, workers, _reserved(message))
        if not mark.is_over and kills.get(mark.host, 0) > mark.oom_kills:
            return OutOfMemory("the kernel ended a worker", mark.host, workers, _reserved())
    return None


def _kills(nodes: dict[str, str]) -> dict[str, int]:
    """Return `oom_kills` of each machine that answers, by its host name.

    Args:
        nodes: Ray's id of each machine, by its host name.
    """
    own = socket.gethostname()
    others = {node for host, node in nodes.items() if host != own}
    found = calls.on_nodes(others, ANSWER_S, oom_kills)
    kills = {host: found[node] for host, node in nodes.items() if node in found}
    return {**kills, own: oom_kills()}


def kill_in_error(error: BaseException, workers: int) -> OutOfMemory | None:
    """Return the kill of the Ray process that leads the workers, which runs beside the driver."""
    message = str(error)
    if "running low on memory" not in message:
        return None
    by = "Ray's memory monitor ended the process that leads the workers"
    return OutOfMemory(by, socket.gethostname(), workers, _reserved(message))


def allocation_failed(message: str, host: str, workers: int) -> OutOfMemory:
    """Return the fault for the message of an exception, as torch raises it in a worker."""
    of_gpu = "CUDA" in message or "CUBLAS" in message
    return OutOfMemory(message, host, workers, _reserved(), of_gpu)


def _reserved(message: str = "") -> int:
    """Return the bytes that must stay free so that Ray's monitor does not kill a process."""
    numbers = THRESHOLD.search(message)
    if numbers is None:
        return int(RESERVED * total_bytes())
    return int(numbers[2]) - int(numbers[1])


# ---- how much memory there is ----


@dataclass(frozen=True)
class _Version:
    """Where one version of control groups has the files of its memory controller."""

    root: str
    limit: str
    usage: str
    reclaimable: str  # key in memory.stat: file cache that the kernel can drop
    events: str


_V1 = _Version(
    "memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
    "memory.oom_control",
)
_V2 = _Version("", "memory.max", "memory.current", "inactive_file", "memory.events")


def total_bytes() -> int:
    """Return the memory of the machine, or the tightest limit around this process."""
    limits = [limit for limit, _ in _limits()]
    return min([psutil.virtual_memory().total, *limits])


def available_bytes() -> int:
    """Return the memory that this process can still allocate."""
    left = [limit - used for limit, used in _limits()]
    return min([psutil.virtual_memory().available, *left])


def oom_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory.

    Counts the processes of our control group, or of the machine if there is no group.
    """
    files = [groups[-1] / version.events for version, groups in _groups()]
    for file in [*files, PROC / "vmstat"]:
        with contextlib.suppress(OSError, LookupError):
            return _read_numbers(file)["oom_kill"]
    return 0


def _limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use) of each control group around this process that has a limit."""
    for version, groups in _groups():
        for group in groups:
            with contextlib.suppress(OSError, LookupError, ValueError):  # no limit: "max"
                limit = int((group / version.limit).read_text("utf-8"))
                used = int((group / version.usage).read_text("utf-8"))
                yield limit, used - _read_numbers(group / "memory.stat")[version.reclaimable]


def _groups() -> Iterator[tuple[_Version, list[Path]]]:
    """Yield the folders of the control groups around this process, the outermost first.

    Inside a container, only the root may be visible.
    """
    try:
        lines = (PROC / "self" / "cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = _V1 if controllers else _V2
        group = GROUPS / version.root
        groups = [group]
        for part in path.strip("/").split("/"):
            group = group / part
            groups.append(group)
        existing = [group for group in groups if (group / version.usage).exists()]
        if existing:
            yield version, existing


def _read_numbers(file: Path) -> dict[str, int]:
    """Read lines of a name and a number; other lines are skipped."""
    numbers = {}
    for line in file.read_text("utf-8").splitlines():
        name, _, value = line.partition(" ")
        if value.isdecimal():
            numbers[name] = int(value)
    return numbers
