"""Files of JSON objects, one a line: appended whole, and read without damaged lines.

Such files are the journal of a run, its events and its attempts.
"""

import errno
import json
import os
from pathlib import Path
from typing import Any

from orchestrator import files


def append(path: Path, content: dict[str, Any]) -> None:
    """Append an object with one system call, so that several processes can append.

    Raises:
        OSError: For example, the disk is full. The file has not changed.
    """
    line = encode(content)
    descriptor = files.opener(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        start = os.fstat(descriptor).st_size
        if start > 0 and os.pread(descriptor, 1, start - 1) != b"\n":
            line = b"\n" + line  # a killed process left an incomplete line
        if os.write(descriptor, line) != len(line):
            os.ftruncate(descriptor, start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def encode(content: dict[str, Any]) -> bytes:
    """Return an object as a line."""
    return json.dumps(content).encode() + b"\n"


def read(path: Path) -> list[bytes]:
    """Return the complete lines, without their newlines; none if the file does not exist."""
    try:
        return files.read_bytes(path).split(b"\n")[:-1]
    except FileNotFoundError:
        return []


def parse(line: bytes, **types: type) -> dict[str, Any] | None:
    """Return the object of a line; None if it is damaged.

    Args:
        line: The line.
        types: Type of each value that the object must have.
    """
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_whole = isinstance(content, dict) and all(
        type(content.get(name)) is kind for name, kind in types.items()
    )
    return content if is_whole else None
