"""The line between a user's mistake and ours, and the exit statuses of a driver."""

import errno

EXIT_DONE, EXIT_FAILED, EXIT_USER, EXIT_AGAIN, EXIT_INTERRUPTED = 0, 1, 2, 75, 130
NO_ROOM = (
    errno.ENOSPC,
    errno.EDQUOT,
)  # of an OSError: the user's to mend, once nothing else can be done


class HeldError(RuntimeError):
    """Another process writes to this run; a pipeline prints who, and ends with status 75."""


class UserError(ValueError):
    """Something that the user can mend: the message quotes the value and says what to do.

    A pipeline prints it as one line and ends with status 2; any other exception is ours and keeps its traceback.
    """


class UnreadableError(UserError):
    """A file cannot be read at this moment, which says nothing of its content; `errno` is the system's."""

    def __init__(self, message: str, errno: int | None):
        super().__init__(message)
        self.errno = errno
