"""Free ports of this machine."""

import contextlib
import random
import socket


def free_port() -> int:
    """Return a free port that the system does not assign to clients in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
