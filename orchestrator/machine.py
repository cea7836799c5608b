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
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def torch_version() -> str:
    """Return `torch.__version__`, such as `2.13.0+cpu`."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    text = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    found = re.search(r"^__version__ = '([^']+)'$", text, re.MULTILINE)
    assert found is not None, text
    return found[1]
