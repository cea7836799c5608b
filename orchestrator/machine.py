"""Facts about this machine and its version of torch. Importing torch would take seconds."""

import contextlib
import functools
import importlib.util
import os
import platform
import re
from pathlib import Path


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, which may be fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Return the name of the processor."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """Return the instruction sets of the processor, as Linux calls them; empty if unknown."""
    return set(_cpu_info("flags").split())


def _cpu_info(key: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(key):
                return line.split(":", 1)[1].strip()
    return ""


@functools.cache
def torch_version() -> str:
    """Return `torch.__version__`, such as `2.13.0+cpu`."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    found = re.search(r"^__version__ = '([^']+)'$", text, re.MULTILINE)
    assert found is not None, text
    return found[1]
