"""Exit statuses of a command, and errors that the user can fix."""

import errno

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2  # the user has to change something first
EXIT_AGAIN = 75  # run the same command again
EXIT_INTERRUPTED = 130  # Ctrl-C

# `errno` of an OSError: the disk or the user's quota is full.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NOT_WRITABLE = (*NO_ROOM, errno.EROFS)  # or the file system is read-only


class HeldError(RuntimeError):
    """Another process writes to this run. A command prints the message and ends with status 75."""


class RayDiedError(RuntimeError):
    """The Ray that this command started has died. The command starts again."""


class UserError(ValueError):
    """A mistake that the user can fix. The message quotes the value and says what to do.

    A command prints it as one line and ends with status 2. Any other exception is a fault of this
    program and keeps its traceback.
    """


class NoRoomError(UserError):
    """The disk or the user's quota is full."""


class UnreadableError(UserError):
    """A file cannot be read at the moment. Its content may be intact.

    A command prints it as one line and ends with status 75: the same command may succeed later.
    """
