"""Facts about this machine, its environment variables, and its version of torch.

Importing torch would take seconds.
"""

import contextlib
import functools
import hashlib
import importlib.util
import os
import platform
import re
import socket
from pathlib import Path

import psutil

from orchestrator.errors import UserError

# Starts of their names; fuse. is that of sshfs, s3fs and others.
NETWORK_FILE_SYSTEMS = (
    "nfs",
    "cifs",
    "smb",
    "fuse.",
    "lustre",
    "ceph",
    "gluster",
    "gpfs",
    "beegfs",
)
GPU_DEVICES = ("nvidiactl", "kfd", "dxg", "nvmap")  # NVIDIA, AMD, either of them in WSL, Jetson


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, which may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Return the name of the processor."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def seconds_in(variable: str, default: float) -> float:
    """Return the seconds that an environment variable of Ray gives.

    Raises:
        UserError: It is not a whole number, which Ray needs.
    """
    text = os.environ.get(variable)
    if text is None:
        return default
    if text.isascii() and text.isdecimal():
        return float(text)
    raise UserError(
        f"{variable}: '{text}' is not a whole number of seconds; give one, such as {default:g}, or "
        "unset the variable"
    )


def node_digest() -> str:
    """Return hexadecimal digits that tell this machine, or this container, from others."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256(f"{socket.gethostname()}/{boot}".encode()).hexdigest()[:16]


def cpu_flags() -> set[str]:
    """Return the instruction sets of the processor, as Linux calls them; empty if unknown."""
    return set(_cpu_info("flags").split())


def _cpu_info(key: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return ""


def torch_version() -> str:
    """Return `torch.__version__`, such as `2.13.0+cpu`."""
    return _torch_build()["__version__"]


def gpus() -> int:
    """Return the number of GPUs that torch can use. It is imported only if there may be one."""
    if not may_have_gpus() or not _torch_build().keys() & {"cuda", "hip"}:
        return 0
    import torch

    return torch.cuda.device_count()


def may_have_gpus() -> bool:
    """Return whether a driver of GPUs has made its device files."""
    return any(Path("/dev", name).exists() for name in GPU_DEVICES)


@functools.cache
def _torch_build() -> dict[str, str]:
    """Return the texts in torch's version.py, where `cuda` is None in a build for CPUs."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    return dict(re.findall(r"^(\w+)(?:: .+)? = '([^']+)'$", text, re.MULTILINE))


def network_file_system(path: Path) -> str | None:
    """Return the kind of the network file system of a path, such as nfs4; None if it is local."""
    parents = {str(one) for one in (path, *path.parents)}
    mounts = [mount for mount in psutil.disk_partitions(all=True) if mount.mountpoint in parents]
    kind = max(reversed(mounts), key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""
    return kind if kind.startswith(NETWORK_FILE_SYSTEMS) else None
