"""Calls of private functions of Ray and torch that have no public equivalent.

`tests/cluster/test_private.py` tests each one against the installed version, so that it shows what
an upgrade broke. `data/tokenizer.py` calls a private function of tiktoken.
"""

import contextlib
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any


@contextlib.contextmanager
def without_api_server() -> Iterator[None]:
    """Let `ray.init` start a cluster without its API server.

    At every start, the API server sends requests to the metadata services of three clouds, also if
    usage reports are off. No public option turns it off.
    """
    from ray._private import services

    original = services.start_api_server
    # Ray itself returns (None, None) if the API server cannot be started.
    services.start_api_server = lambda *_, **__: (None, None)
    try:
        yield
    finally:
        services.start_api_server = original


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


def drop_datasets_callback(trainer: Any) -> None:
    """Let a Ray Train trainer start its workers without a process for Ray Data.

    We do not use Ray Data, and each start of the workers would wait for that process.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

    create = trainer._create_default_callbacks

    def create_others() -> list[Any]:
        return [callback for callback in create() if not isinstance(callback, DatasetsCallback)]

    trainer._create_default_callbacks = create_others


def set_collective_timeout(seconds: float) -> None:
    """Set the timeout of later collectives of the default process group.

    `init_process_group` can set it only once.
    """
    from torch.distributed import distributed_c10d

    distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))
