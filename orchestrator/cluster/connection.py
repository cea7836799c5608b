"""Connect to Ray: join a cluster, or start one on this machine that ends with the driver."""

import atexit
import contextlib
import json
import logging
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.cluster import private
from orchestrator.cluster.layout import WORKER_ENVIRONMENT, worker_environment
from orchestrator.errors import UserError
from orchestrator.machine import seconds_in

PROBE_S = 10
POLL_S = 1.0  # between two looks at Ray
# The driver sets these variables before Ray starts.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no network traffic that the user did not ask for
    # Ray's default of 2 s would delay every report and the end of the run.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # The watcher needs one process for each group of workers. `RunWatch` finds drained nodes.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray's default is 60. After it, another number of workers is tried, or a line says what lacks.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    # It would print to the terminal: the controller runs in the driver (`train_here`).
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
}
# Ray puts the current folder first on the path of its workers. There may be a model.py in it.
SOURCES = Path(__file__).resolve().parents[2]
# Ray creates sockets below its temporary folder. The system limits their paths to 107 bytes.
SOCKET_BYTES = 107
SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"

SYSTEM_CONFIG = {
    # A machine may stop for a minute. With Ray's defaults, its processes would then take each other
    # for dead and exit.
    "health_check_failure_threshold": 60,
    "gcs_rpc_server_reconnect_timeout_s": 600,
    # With Ray's default of 15, any other program on the machine would slow the training down.
    "worker_niceness": 0,
    # Ray starts a process for each CPU at once, and would end it before a run needs it.
    "idle_worker_killing_time_threshold_ms": 60_000,
}
# Ray needs more than this to start.
LEAST_FILES = 256
LEAST_SHARED_BYTES = 128 << 20
# Statuses of gRPC. The last ones are those of another program, or of one that does not answer.
NO_TOKEN = "UNAUTHENTICATED"
NOT_RAY = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNKNOWN")
# Ray itself ends a driver when it has missed the head for 60 s, or for the time of this variable,
# which is for clusters whose next head continues from Redis.
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
LOST_S = 15.0

_gcs_address = ""
_answered = 0.0  # time.monotonic() of the last answer of the head


def connect(meanwhile: Callable[[], object] = lambda: None) -> None:
    """Join the cluster of $RAY_ADDRESS, or start one on this machine for this process.

    `ray job submit` sets $RAY_ADDRESS. All Ray processes of this driver get `worker_environment`.

    Args:
        meanwhile: Imports what the driver needs later, while the processes of a cluster start.

    Raises:
        UserError: No cluster answers at $RAY_ADDRESS, or Ray cannot start on this machine.
    """
    seconds_in(RECONNECT, LOST_S)  # with a wrong one, the import of Ray would crash
    import ray

    if ray.is_initialized():
        return
    for key, value in (WORKER_ENVIRONMENT | ENVIRONMENT).items():
        os.environ.setdefault(key, value)
    # At every start, Ray would print that a token protects the cluster.
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    private.shorten_messages()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.chdir(SOURCES):
            _join(settings) if is_shared() else _start(settings, meanwhile)
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray replaces it
    # Functions that are registered last run first. Ray's own function would wait half a second for
    # output of the workers.
    atexit.register(ray.shutdown)
    _note_head()


def failure(error: BaseException | None = None) -> str | None:
    """Return which part of Ray has died; None if all of it seems to work.

    Args:
        error: An exception of a call to Ray.
    """
    if "ray" not in sys.modules:
        return None
    import ray

    dead = private.dead_process()
    if dead is not None:
        return f"Ray's process {dead} has died"
    if is_shared() and _gcs_address and not _answers(error is None):
        return f"the head of the Ray cluster at {_gcs_address} does not answer"
    died = ray.exceptions.RayActorError, ray.exceptions.LocalRayletDiedError
    if isinstance(error, (*died, ray.exceptions.NodeDiedError, ray.exceptions.RaySystemError)):
        return f"a process of Ray has died ({_first_line(error).partition(': ')[0]})"
    return None


def watch(closed: threading.Event, died: Callable[[], None]) -> None:
    """Call `died` in a thread if Ray dies before `closed` is set.

    Calls to a dead Ray may wait for minutes.
    """

    def look() -> None:
        while not closed.wait(POLL_S):
            if failure() is not None and not closed.is_set():
                died()
                return

    threading.Thread(target=look, name="watch-ray", daemon=True).start()


def kill() -> None:
    """End the processes of our own Ray at once. Workers end when they miss it."""
    private.kill_local_processes()


def _note_head() -> None:
    global _gcs_address, _answered
    import ray

    _gcs_address = ray.get_runtime_context().gcs_address
    _answered = time.monotonic()


def _answers(patient: bool) -> bool:
    """Return whether the head of the cluster answers; `patient`: or has answered lately."""
    global _answered
    host, _, port = _gcs_address.rpartition(":")
    now = time.monotonic()
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        _answered = now
    except OSError:
        return patient and now - _answered < seconds_in(RECONNECT, LOST_S)
    return True


def is_shared() -> bool:
    """Return whether this process uses the cluster of $RAY_ADDRESS, and not one of its own."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def job_id() -> str | None:
    """Return Ray's id of the submitted job, or of this driver; None if neither exists."""
    import ray

    submitted = os.environ.get("RAY_JOB_ID")
    if submitted:
        return submitted
    if not ray.is_initialized():
        return None
    return ray.get_runtime_context().get_job_id()


# ---- a cluster that is there ----


def _join(settings: dict[str, Any]) -> None:
    import ray

    address = os.environ["RAY_ADDRESS"]
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    given = submitted.get("runtime_env", {}).get("env_vars", {})
    # Ray refuses a variable that is given twice.
    variables = {key: value for key, value in worker_environment().items() if key not in given}
    try:
        if address == "auto":
            address = private.running_head()
        elif not re.fullmatch(r"[^/\s]+:\d+", address):
            raise UserError(
                f"RAY_ADDRESS: '{address}' is not the address of a cluster's head; give HOST:PORT, "
                "such as 10.0.0.1:6379, or submit a job to a dashboard with RAY_API_SERVER_ADDRESS"
            )
        _probe(address)
        # If the head dies, this process would print an error each second until we end it.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        with private.without_line("RAY_BACKEND_LOG_LEVEL"):
            ray.init(address=address, runtime_env={"env_vars": variables}, **settings)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"RAY_ADDRESS: cannot join the cluster at {address} ({_first_line(error)}); correct "
            "the address, or unset RAY_ADDRESS to use this machine alone"
        ) from None


def _probe(address: str) -> None:
    """Refuse an address that does not answer; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_S).close()
        answer = _answer(address)
        # `ray start` uses a token that it finds; a client of $RAY_ADDRESS does not.
        if answer == NO_TOKEN and private.use_token_if_there():
            answer = _answer(address)
        if answer in NOT_RAY and not os.environ.get("RAY_USE_TLS"):
            raise OSError(f"not the head of a Ray cluster: {answer}")
    except (OSError, OverflowError) as error:
        raise UserError(
            f"RAY_ADDRESS: no cluster answers at {address} ({error}); start one, or unset "
            "RAY_ADDRESS to use this machine alone"
        ) from None
    if answer == NO_TOKEN:
        raise UserError(
            f"RAY_ADDRESS: the cluster at {address} wants a token, which is missing or wrong; set "
            "RAY_AUTH_MODE=token, and copy the head's ~/.ray/auth_token or set RAY_AUTH_TOKEN"
        )


def _answer(address: str) -> str:
    """Return gRPC's status of a call to a head with our token, or without one if we have none.

    Ray would try for half a minute, with a warning each second, or wait for ever.
    """
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
            call(b"", timeout=PROBE_S, metadata=private.token_metadata())
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


# ---- a cluster of our own ----


def _start(settings: dict[str, Any], meanwhile: Callable[[], object]) -> None:
    """Start a cluster without a dashboard, protected by a token that only this process knows."""
    import ray

    # Ray's processes inherit them. Each `runtime_env` would need another process, and its agent.
    os.environ.update(worker_environment())
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        # Ray would write one into the home directory, readable for all users.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    if len(os.fsencode(os.path.abspath(_temporary()) + SOCKET)) > SOCKET_BYTES:
        os.environ["RAY_TMPDIR"] = "/tmp"
    try:
        with private.local_processes(meanwhile):
            settings |= {"address": "local", "include_dashboard": False}
            ray.init(_system_config=SYSTEM_CONFIG, **settings)
    except Exception as error:
        raise UserError(
            f"Ray cannot start on this machine: {_first_line(error)}; {_limits()}"
        ) from None


def _temporary() -> str:
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _limits() -> str:
    """Return the limits of this process that are too low for Ray; else where its logs are."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    memory, _ = resource.getrlimit(resource.RLIMIT_AS)
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    problems = []
    if 0 <= files < LEAST_FILES:
        problems.append(f"raise `ulimit -n` from {files} to at least {LEAST_FILES}")
    if memory != resource.RLIM_INFINITY:
        problems.append(f"raise `ulimit -v` from {memory // 1024} to unlimited")
    if shared < LEAST_SHARED_BYTES:
        problems.append(f"make room in /dev/shm, where {shared >> 20} MiB are free")
    return " and ".join(problems) or f"its logs are in {_temporary()}/ray/session_latest/logs"


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
