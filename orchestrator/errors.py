"""Exit statuses of a command, and errors that the user can fix."""

import errno

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2  # the user has to change something first
EXIT_AGAIN = 75  # run the same command again
EXIT_INTERRUPTED = 130  # Ctrl-C

# `errno` of an OSError: the disk or the user's quota is full.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# `errno` of an OSError of a file system that takes no data: what it is, and what to do.
NOT_WRITABLE = {
    **dict.fromkeys(NO_ROOM, ("the disk is full", "Free some room there")),
    errno.EROFS: ("the file system is read-only", "Make it writable"),
    errno.EIO: ("the file system has an error", "Look into the logs of the system"),
}


class HeldError(RuntimeError):
    """Another process writes to this run. A command prints the message and ends with status 75."""


class RayDiedError(RuntimeError):
    """Ray has died. A command starts again if that Ray was its own, else it ends with status 75.

    Args:
        died: What has died.
        steps: Steps that are stored.
    """

    def __init__(self, died: str, steps: int = 0) -> None:
        super().__init__(died)
        self.steps = steps


class UserError(ValueError):
    """A mistake that the user can fix. The message quotes the value and says what to do.

    A command prints it as one line and ends with status 2. Any other exception is a fault of this
    program and keeps its traceback.
    """


class NoRoomError(UserError):
    """The disk or the user's quota is full."""


class DiskError(UserError):
    """The disk could not read a file, although it was asked again: a bad sector or an outage."""


class UnreadableError(UserError):
    """A file cannot be read at the moment. Its content may be intact.

    A command prints it as one line and ends with status 75: the same command may succeed later.
    """
