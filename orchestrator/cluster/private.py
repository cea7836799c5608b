"""Calls of private functions of Ray and torch that have no public equivalent.

`tests/cluster/test_private.py` tests each one against the installed version, so that it shows what
an upgrade broke. `data/tokenizers/pairs.py` calls a private function of tiktoken.
"""

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psutil

from orchestrator.cluster.layout import Node, node_of


@contextlib.contextmanager
def local_processes(meanwhile: Callable[[], object]) -> Iterator[None]:
    """Change how `ray.init` starts the processes of a cluster.

    It calls `meanwhile` when it has started them: they need some seconds until they answer.

    It starts no API server, which sends requests to the metadata services of three clouds at every
    start, also if usage reports are off. It starts neither the autoscaler nor the process that
    sends the output of workers to the driver: we use neither, and each takes a second of a CPU. And
    the processes get a session of their own: signals that a terminal or `timeout` sends to all
    processes of a command reach only the driver.
    """
    from ray._private import services
    from ray._private.node import Node

    api_server = services.start_api_server
    popen = services.ConsolePopen
    monitor = Node.start_monitor
    log_monitor = Node.start_log_monitor
    get_node = services.get_node

    def call_then_get_node(*arguments: Any) -> Any:
        meanwhile()
        return get_node(*arguments)

    # Ray itself returns (None, None) if the API server cannot be started.
    services.start_api_server = lambda *_, **__: (None, None)
    services.ConsolePopen = functools.partial(popen, start_new_session=True)
    Node.start_monitor = lambda self: None
    Node.start_log_monitor = lambda self: None
    services.get_node = call_then_get_node
    try:
        yield
    finally:
        services.start_api_server = api_server
        services.ConsolePopen = popen
        Node.start_monitor = monitor
        Node.start_log_monitor = log_monitor
        services.get_node = get_node


def dead_process() -> str | None:
    """Return the name of a process of Ray on this machine that has ended; None if there is none.

    Of a cluster that we joined, only the raylet is looked at. Ray itself would end this process.
    """
    from ray._private import worker

    node = worker._global_node
    if node is None:
        return None
    if not node.all_processes and _has_ended(node.raylet_socket_name):
        return "raylet"
    dead = node.dead_processes()
    return next((name for name, _ in dead if name in ("gcs_server", "raylet")), None)


def _has_ended(path: str) -> bool:
    """Return whether the process that listened on a socket has ended. It may be stopped."""
    try:
        return _connection(path).recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@functools.cache
def _connection(path: str) -> socket.socket:
    """Return a connection that stays: a raylet logs the end of each."""
    client = socket.socket(socket.AF_UNIX)
    client.setblocking(False)
    client.connect(path)
    return client


def kill_local_processes() -> None:
    """End the processes of our own Ray with SIGKILL, and their children.

    Workers that train may notice only minutes later that their Ray is dead.
    """
    from ray._private import worker

    started = worker._global_node.all_processes.values()
    leaders = [info.process for infos in started for info in infos]
    # In the order of their start: the raylet's end is then not reported to the driver.
    for leader in leaders:
        leader.kill()
    sessions = {leader.pid for leader in leaders}
    for pid in psutil.pids():
        if _session(pid) in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@contextlib.contextmanager
def without_line(words: str) -> Iterator[None]:
    """Keep lines with these words from standard error.

    Ray's compiled code prints one if a variable sets the level of its log.
    """
    with tempfile.TemporaryFile() as caught:
        standard_error = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)
            caught.seek(0)
            for line in caught:
                if words.encode() not in line:
                    os.write(2, line)


def shorten_messages() -> None:
    """Print only the first sentence of what Ray's processes report to the driver.

    If a raylet dies, for example, the whole message has a page of its log.
    """
    from ray._private import worker

    original = worker.print_to_stdstream

    def first_sentence(data: dict[str, Any], *args: Any, **more: Any) -> None:
        text = "\n".join(data["lines"])
        original({**data, "lines": [text.split("\n")[0].split(". ")[0]]}, *args, **more)

    if original.__module__ == worker.__name__:
        worker.print_to_stdstream = first_sentence


def use_token_if_there() -> bool:
    """Use token authentication if there is a token. Return whether there is one."""
    from ray._private.authentication import authentication_token_setup as setup

    logging.getLogger(setup.__name__).setLevel(logging.ERROR)
    return setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def token_metadata() -> tuple[tuple[str, str], ...]:
    """Return what Ray adds to a call: the token; empty without token authentication."""
    from ray._private.authentication import grpc_authentication_client_interceptor as client

    return client._get_authentication_metadata_tuple()


def running_head() -> str:
    """Return the address of the cluster that RAY_ADDRESS=auto means.

    Raises:
        ConnectionError: None runs on this machine.
    """
    from ray._private import services

    return services.canonicalize_bootstrap_address_or_die("auto")


def oom_causes() -> dict[tuple[str, int], str]:
    """Return Ray's message for each actor that its memory monitor killed.

    The key is (id of the node, pid). Empty without a cluster. The public `ray.util.state` needs the
    dashboard.
    """
    if "ray" not in sys.modules:
        return {}
    from ray._private.state import actors

    try:
        found = actors().values()
    except Exception:  # the cluster does not answer at the moment
        return {}
    causes = {}
    for actor in found:
        cause = actor["DeathCause"]
        if cause is not None and cause.HasField("oom_context"):
            place = (actor["Address"]["NodeID"], actor["Pid"])
            causes[place] = cause.oom_context.error_message
    return causes


def draining_nodes() -> dict[str, str]:
    """Return the host names of the nodes that are being drained, by id. Empty without a cluster.

    Ray Train's own watcher reads the same table.
    """
    import ray._private.state

    try:
        leaving = ray._private.state.state.get_draining_nodes()
        if not leaving:
            return {}
        names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    except Exception:  # the cluster does not answer at the moment
        return {}
    return {node: names.get(node, node) for node in leaving}


def free_nodes() -> dict[str, Node]:
    """Return the CPUs and GPUs of each machine that nothing uses now, by Ray's id of the node."""
    import ray._private.state

    free = ray._private.state.state.available_resources_per_node()
    return {id_: node_of(resources) for id_, resources in free.items()}


def set_collective_timeout(seconds: float) -> None:
    """Set the timeout of later collectives of the default process group, and of its parts.

    `init_process_group` can set it only once. A group of all ranks, beside the default one, has
    messages of checkpoints, which may take longer: it keeps its timeout.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        if group is dist.group.WORLD or group.size() < dist.get_world_size():
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
