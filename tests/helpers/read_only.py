"""Lets a folder look like one of a read-only file system, for this process.

A real file system cannot be made read-only while a file is open for writing.
"""

import builtins
import errno
import os
from pathlib import Path

import pytest

CREATES = ("mkdir",)
CALLS = (*CREATES, "unlink", "rename", "replace", "rmdir", "truncate", "utime")


def make_read_only(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Refuse to change anything in `folder`."""

    def check(path: object) -> None:
        if isinstance(path, str | Path) and os.path.abspath(path).startswith(f"{folder}/"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def refuse(name: str) -> None:
        original = getattr(os, name)

        def call(path, *args, **settings):
            if name in CREATES or os.path.lexists(path):  # else: no such file
                check(path)
            return original(path, *args, **settings)

        patch.setattr(os, name, call)

    for name in CALLS:
        refuse(name)
    os_open, python_open = os.open, builtins.open

    def open_descriptor(path, flags, *args, **settings):
        if flags & (os.O_WRONLY | os.O_RDWR):
            check(path)
        return os_open(path, flags, *args, **settings)

    def open_file(path, mode="r", *args, **settings):
        if mode.strip("rbt"):
            check(path)
        return python_open(path, mode, *args, **settings)

    patch.setattr(os, "open", open_descriptor)
    patch.setattr(builtins, "open", open_file)
