"""The process group of torch.distributed that the workers of a run or a stage form."""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from orchestrator.cluster.layout import COLLECTIVE_TIMEOUT_S, Layout

if TYPE_CHECKING:
    from orchestrator.train.numerics import Worker


def new_address() -> str:
    """Return an address for a process group whose rank 0 is this process."""
    import ray

    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    return f"tcp://{ray.util.get_node_ip_address()}:{port}"


def join(address: str, rank: int, layout: Layout) -> None:
    """Wait until all workers have called this function.

    Args:
        address: Result of `new_address` on rank 0.
        rank: Rank of this process.
        layout: Number of workers and their devices.
    """
    import torch.distributed as dist

    _choose_interface(address)
    dist.init_process_group(
        "nccl" if layout.use_gpu else "gloo",
        init_method=address,
        rank=rank,
        world_size=layout.num_workers,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )


def _choose_interface(address: str) -> None:
    """Let gloo and NCCL use the network interface that reaches rank 0, unless the user chose one.

    gloo itself takes the one of the host name. On Debian that is 127.0.1.1, which no other machine
    reaches.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect((urlsplit(address).hostname, 9))  # sends nothing
        own = route.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # the whole name


def leave() -> None:
    """End the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def worker_of(rank: int, layout: Layout) -> Worker:
    """Return the place of a rank among the workers of the layout."""
    from orchestrator.train.numerics import Worker

    return Worker(rank, layout.num_workers, layout.device, layout.cpus_per_worker)
