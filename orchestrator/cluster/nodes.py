"""Checks that each node of the cluster can work for this driver, before anything is trained."""

import importlib.metadata
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.cluster.calls import interruptibly
from orchestrator.cluster.layout import has_several_nodes
from orchestrator.cluster.reach import answers
from orchestrator.code_hashes import REPOSITORY, sources_sha256
from orchestrator.errors import UnreadableError, UserError

WAIT_S = 20.0  # for the answers; a node that was cut off gives none
BUSY_S = 40.0  # longer, if its kernel answers: a busy node starts a process slowly
SEEN_S = 3.0  # until another machine sees a new file of a network file system


def check_nodes(setting: str, storage: Path, needs_worker_here: bool = False) -> None:
    """Let each node with CPUs write and read a file in the storage, and compare its software.

    Args:
        setting: The storage as the user wrote it.
        storage: Its folder.
        needs_worker_here: If the storage is in a bucket, so that nodes need not share its folder, a
            worker must be on this machine.

    Raises:
        UserError: The path is relative, and the cluster has or may get several nodes; or the
            storage is in a bucket, and this machine has no CPU for rank 0; or a node does not
            share the storage, or has another version of torch or of this project. One line names
            each such node.
        UnreadableError: A node that is there does not answer; its storage may hang.
    """
    if not has_several_nodes():
        return
    if "://" in setting:
        if needs_worker_here:
            _require_worker_here(setting)
        _require(None, writes=False)
        return
    if not Path(setting).expanduser().is_absolute():
        raise UserError(
            f"storage: '{setting}' is relative and the cluster has or may get several nodes; set "
            "storage=… or ESPALIER_STORAGE to an absolute path that all of them share"
        )
    check_shared(storage)


def check_shared(folder: Path) -> None:
    """As `check_nodes`, for another folder of this driver."""
    if not has_several_nodes():
        return
    mine = folder / f".node-{secrets.token_hex(8)}"
    try:
        mine.touch()
        _require(mine, writes=True)
    finally:
        mine.unlink(missing_ok=True)  # first: a node that is late then removes its reply itself
        for file in folder.glob(f"{mine.name}*"):
            file.unlink(missing_ok=True)


def check_has(file: Path) -> None:
    """Raise an error of `check_nodes` if a node does not have a file of this driver."""
    if has_several_nodes():
        _require(file, writes=False)


def _require_worker_here(setting: str) -> None:
    """Refuse a machine without CPUs: rank 0 works in its folder."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    cpus = [n["Resources"].get("CPU", 0) for n in ray.nodes() if n["NodeID"] == own and n["Alive"]]
    if max(cpus, default=0) < 1:
        raise UserError(
            f"storage: '{setting}' on several nodes needs a worker on the machine of this command, "
            "which has no CPUs in the cluster; give it some (ray start --num-cpus), or set "
            f"storage=… to a folder that all nodes share, and mirror={setting}"
        )


def _require(mine: Path | None, writes: bool) -> None:
    problems, silent = interruptibly(lambda: _ask(mine, writes))
    if problems:
        raise UserError("; ".join([*problems, *silent]))
    # A worker there might hang for half an hour without a word. A node can also be slow, so this
    # is no mistake of the user: the same command may succeed.
    if silent:
        raise UnreadableError("; ".join(silent))


@dataclass(frozen=True)
class Asked:
    """A node that was asked.

    Attributes:
        host: Its host name.
        place: Address and port of its raylet.
        reply: The file that it writes, or the one that it reads; None: it only tells its versions.
    """

    host: str
    place: tuple[str, int]
    reply: Path | None


@dataclass(frozen=True)
class Software:
    """What must be the same on all nodes.

    Attributes:
        torch: Version of torch, without the suffix for its devices.
        sources: Hash of the copy of this project.
    """

    torch: str
    sources: str


@dataclass(frozen=True)
class Answer:
    """What a node says.

    Attributes:
        problem: Why it cannot use the storage; None if it can.
        software: Its software.
    """

    problem: str | None
    software: Software


def not_shared(host: str, folder: Path, problem: str) -> str:
    """Return the line about a node that does not share a folder of the storage."""
    return (
        f"storage: {host} {problem} {folder}; mount the same folder on all nodes, or set storage=… "
        "(data.dir=… for tokens) to a folder that they share"
    )


def folder_problem(folder: Path) -> str | None:
    """Return why this node cannot work in a folder that the driver has; None if it can."""
    if folder.is_dir():
        return None
    return not_shared(socket.gethostname(), folder, "does not have")


def _ask(mine: Path | None, writes: bool) -> tuple[list[str], list[str]]:
    """Return lines about nodes that are not as they should be, and about silent ones."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked: dict[Any, Asked] = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            options = ray.remote(_answer).options(num_cpus=0, scheduling_strategy=strategy)
            reply = mine
            if mine is not None and writes:
                reply = mine.with_name(f"{mine.name}-{node['NodeID']}")
            place = (node["NodeManagerAddress"], node["NodeManagerPort"])
            asked[options.remote(mine, reply)] = Asked(node["NodeManagerHostname"], place, reply)
    silent = _silent(asked)
    expected = _answer(mine, mine)
    problems = [
        problem
        for reference in asked.keys() - silent
        for problem in _problems(reference, asked[reference], expected)
    ]
    return sorted(problems), sorted(line for line in silent.values() if line)


def _silent(asked: dict[Any, Asked]) -> dict[Any, str]:
    """Wait for the answers. Return the line about each node without one; empty: it is away."""
    import ray

    _, waiting = ray.wait(list(asked), num_returns=len(asked), timeout=WAIT_S)
    there = answers({reference: asked[reference].place for reference in waiting})
    if there:
        _, busy = ray.wait(list(there), num_returns=len(there), timeout=BUSY_S)
        waiting = [
            reference for reference in waiting if reference in busy or reference not in there
        ]
    lines = {}
    for reference in waiting:
        ray.cancel(reference, force=True)
        one = asked[reference]
        lines[reference] = ""
        if reference in there:
            may_hang = f"; {one.reply.parent} may hang there" if one.reply else ""
            lines[reference] = (
                f"storage: {one.host} did not answer for {WAIT_S + BUSY_S:.0f} s and was "
                f"not checked{may_hang}"
            )
        else:  # the node is down: a run goes on without it, or waits for it
            _warn(one.host, "it does not answer")
    return lines


def _problems(reference: Any, asked: Asked, expected: Answer) -> Iterator[str]:
    import ray

    try:
        answer = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # such as an older copy without this module
        lines = str(error).strip().splitlines()
        yield f"{asked.host} has another version of this project, or none: {lines[-1]}"
    except ray.exceptions.WorkerCrashedError:  # also when Ray has tried it again
        yield (
            f"{asked.host}: each process that Ray starts there dies at once; free some memory, or "
            "room on the disk of Ray's files (/tmp/ray, if you set no other folder)"
        )
    except ray.exceptions.RayError as error:
        # The node is gone, or no process lives there: a worker fails the same way, and says so.
        _warn(asked.host, type(error).__name__)
    else:
        if answer.problem is None and asked.reply is not None and not _appears(asked.reply):
            answer = replace(answer, problem="has another folder at")
        folder = asked.reply.parent if asked.reply else Path()
        yield from _differences(asked.host, folder, answer, expected)


def _warn(host: str, why: str) -> None:
    print(f"storage: {host} was not checked ({why})", file=sys.stderr, flush=True)


def _differences(host: str, storage: Path, answer: Answer, expected: Answer) -> Iterator[str]:
    if answer.problem is not None:
        yield not_shared(host, storage, answer.problem)
    yield from _other_software(host, answer.software, "this machine", expected.software)


def require_software(host: str, expected: Software) -> None:
    """Raise UserError if this node, which may have joined after `check_nodes`, has other software.

    Args:
        host: The host that has the expected software.
        expected: Its software.
    """
    problems = list(_other_software(socket.gethostname(), software(), host, expected))
    if problems:
        raise UserError("; ".join(problems))


def _other_software(host: str, found: Software, other: str, expected: Software) -> Iterator[str]:
    if found.torch != expected.torch:
        yield (
            f"{host} has torch {found.torch} and {other} {expected.torch}; install the versions of "
            "constraints.txt on all nodes"
        )
    if found.sources != expected.sources:
        yield (
            f"{host} has another version of this project than {other}; use the same on all nodes, "
            "or submit a job, which brings the project to each node"
        )


def _answer(driver_file: Path | None, reply: Path | None) -> Answer:
    """Read a file of the driver on this node, if one is given, and write the reply."""
    problem = None
    try:
        if driver_file is None or reply is None:
            pass
        elif not driver_file.parent.is_dir():
            problem = "does not have"
        elif not _appears(driver_file):
            problem = "has another folder at"
        elif reply != driver_file:
            reply.touch()
            if not driver_file.exists():  # the driver waits no longer
                reply.unlink(missing_ok=True)
    except OSError as error:
        problem = f"cannot write ({error.strerror}) to"
    return Answer(problem, software())


def software() -> Software:
    """Return the software of this node."""
    torch = importlib.metadata.version("torch").partition("+")[0]
    return Software(torch, sources_sha256(REPOSITORY))


def _appears(file: Path) -> bool:
    """Return whether a file exists now or in a moment."""
    deadline = time.monotonic() + SEEN_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
