"""Why the workers of a run or a stage ended: one answer for lone runs and for sweeps."""

import errno
import re
import socket
from collections.abc import Iterable
from dataclasses import asdict

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment
from orchestrator.cost.measure import is_out_of_memory
from orchestrator.data.dataset import Manifest
from orchestrator.errors import NOT_WRITABLE
from orchestrator.runs import events, stop
from orchestrator.runs.ending import Cause, Ending, Kind
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import fitting, hangs, marks, memory
from orchestrator.workers.memory import OutOfMemory

NO_ROOM_ERROR = "orchestrator.errors.NoRoomError: "
HELD_ERROR = "orchestrator.errors.HeldError: "
STORE_AWAY_ERROR = "orchestrator.objects.store.StoreAwayError: "
EXPECTED_ERRORS: dict[str, Kind] = {
    "orchestrator.errors.UserError: ": "user",
    "orchestrator.errors.DiskError: ": "user",
    "orchestrator.files.DamagedError: ": "user",
    "orchestrator.files.NotPlainFileError: ": "user",
    "orchestrator.mirror.manifest.DamagedCopyError: ": "user",
    "orchestrator.objects.store.MissingObjectError: ": "user",
    "orchestrator.errors.UnreadableError: ": "again",
}
_COMPILER = re.compile(r"torch\._(?:dynamo|inductor)\.exc\.\w+: ")
_CAUSES: dict[int, Cause] = {errno.EIO: "disk_error"}
TRACEBACK = "Traceback (most recent call last):"
# The whole reason that gloo, NCCL or torch's store gives if another rank died.
_LOST_PEER = re.compile(
    r"(RuntimeError|torch\.distributed\.\w+): "
    r".*(gloo/transport/tcp/pair\.cc|reset by peer|remote process exited)",
    re.DOTALL,
)


def diagnose(folder: RunFolder, error: BaseException | None = None, workers: int = 1) -> Ending:
    """Find out how the workers of a run or a stage ended.

    Lone runs and stages both call this function after all workers have ended, so that the same
    fault has the same message and exit status in both. A hang is noted in events.jsonl of the
    folder, and its thread stacks move to `hangs/`.

    Args:
        folder: Folder of the run or stage.
        error: The exception that ended the workers, as Ray reports it; None if they returned.
        workers: Number of worker processes.

    Returns:
        The recorded ending if there is one. Otherwise the first of these that applies: done, out
        of memory, a hang, an exception of a rank, a worker that was killed. Complete an ending
        that is out of memory with `advise`.
    """
    # `hangs.report` removes the marks of the ranks. The search for a kill reads them, so it
    # comes first.
    hosts = [mark.host for mark in marks.read(folder)]
    kill = None
    if error is not None:
        kill = memory.find_kill(folder) or memory.kill_in_error(error, workers)
    hang = hangs.report(folder)

    recorded = folder.read_ending()
    if recorded is not None:
        return _with_stop_reason(folder, recorded)
    if error is None:
        return Ending("done")
    if kill is not None:
        return out_of_memory(kill)
    if hang is not None:
        return Ending("failed", hang, cause="hang")

    again = getattr(error, "controller_failure", None)
    tracebacks = failures_of(folder, workers) or ([str(again)] if again is not None else [])
    if not tracebacks:
        where = f" on {' or '.join(dict.fromkeys(hosts))}" if hosts else ""
        reason = (
            f"a worker{where} died without a traceback; its machine may be gone or out of memory "
            f"({type(error).__name__}: {error})"
        )
        return Ending("failed", reason, cause="kill")
    return ending_of_tracebacks(folder, tracebacks, workers, hosts)


def failures_of(folder: RunFolder, workers: int) -> list[str]:
    """Return the tracebacks of all ranks, oldest first, without errors of a lost connection."""
    failures = folder.read_failures()
    if workers == 1:
        return failures
    return [text for text in failures if not _LOST_PEER.match(exception_of(text))]


def out_of_memory(fault: OutOfMemory) -> Ending:
    """Return the ending of workers that ran out of memory, without advice."""
    reason = f"out of memory on {fault.host}: {fault.by}"
    return Ending("user", reason, {"oom_kill": asdict(fault)}, "out_of_memory")


def ending_of_tracebacks(
    folder: RunFolder, tracebacks: list[str], workers: int, hosts: Iterable[str] = ()
) -> Ending:
    """Return the ending that follows from the exception of a rank.

    Args:
        folder: Folder of the run or stage.
        tracebacks: Oldest first. Only the first one counts: the other ranks then fail because a
            connection was closed.
        workers: Number of worker processes.
        hosts: Names of the machines where the workers ran; empty if not known.
    """
    exception = exception_of(tracebacks[0])
    message = exception.partition("\n")[0]
    if exception.startswith(NO_ROOM_ERROR):
        reason = f"the disk is full: {exception.removeprefix(NO_ROOM_ERROR)}"
        return Ending("user", reason, cause="disk_full")
    if exception.startswith(HELD_ERROR):
        reason = (
            f"{exception.removeprefix(HELD_ERROR)}, a worker that does not end; end it and run the "
            "same command again"
        )
        return Ending("user", reason, cause="held")
    if exception.startswith(STORE_AWAY_ERROR):
        return Ending("again", exception.removeprefix(STORE_AWAY_ERROR), cause="store_away")
    for prefix, kind in EXPECTED_ERRORS.items():
        if exception.startswith(prefix):
            return Ending(kind, exception.removeprefix(prefix), cause="exception")
    compiler = _COMPILER.match(exception)
    if compiler and not is_out_of_memory(exception):
        places = re.findall(r'File "(.+)", line (\d+)', exception)  # in the code of the model
        where = "".join(f"{file}:{line}: " for file, line in places[-1:])
        reason = (
            f"train.compile: torch cannot compile the model: {where}{message[compiler.end() :]}; "
            "set train.compile=false"
        )
        return Ending("user", reason, cause="exception")
    if is_out_of_memory(exception):
        host = next(iter(hosts), socket.gethostname())
        kill = memory.allocation_failed(message, host, workers)
        return out_of_memory(kill)
    for number, (what, advice) in NOT_WRITABLE.items():
        if f"[Errno {number}]" in exception:
            problem = message.partition("] ")[2]  # without class and number
            reason = f"{what}: {folder.path}: {problem}. {advice} and run the same command again"
            return Ending("user", reason, cause=_CAUSES.get(number, "disk_full"))
    return Ending("failed", message, {"traceback": "\n".join(tracebacks)}, "exception")


def advise(
    ending: Ending,
    folder: RunFolder,
    experiment: Experiment,
    dataset: Manifest,
    layout: Layout,
    stages: int = 1,
) -> Ending:
    """Add a micro-batch that fits to an ending that is out of memory.

    The search takes half a minute or more. A sweep calls this function once, at its end.

    Args:
        ending: Result of `diagnose`. Any other ending is returned as it is.
        folder: Folder of the run or the sweep, whose events.jsonl gets an `out_of_memory` event.
        experiment: The experiment that ran out of memory.
        dataset: Its dataset.
        layout: Its workers.
        stages: Stages that the sweep runs at the same time.
    """
    facts = dict(ending.facts)
    stored = facts.pop("oom_kill", None)
    if ending.cause != "out_of_memory" or stored is None:
        return ending
    print("out of memory; looking for a micro-batch that fits …", flush=True)
    fault = OutOfMemory(**stored)
    reason = fitting.advice(fault, experiment, dataset.tokenizer["n_vocab"], layout, stages)
    events.note(folder, "out_of_memory", reason)
    return Ending("user", reason, facts, "out_of_memory")


def _with_stop_reason(folder: RunFolder, ending: Ending) -> Ending:
    """Add where the stop request came from, such as SIGTERM or a drained node."""
    requested = stop.requested(folder)
    if ending.kind != "again" or requested is None:
        return ending
    return Ending("again", f"{requested}: {ending.reason}", ending.facts)


def exception_of(traceback: str) -> str:
    """Return the class and the message, of one or more lines, of the exception that was raised."""
    lines = traceback.rpartition(TRACEBACK)[2].strip("\n").splitlines()
    for number, line in enumerate(lines):
        if line and not line[0].isspace():  # the lines of a stack frame are indented
            return "\n".join(lines[number:]).strip()
    return "an exception without a message"
