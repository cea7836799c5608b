"""A stand-in for Slurm's `srun`, which starts commands on the machines of `machines.py`.

    slurm.py OPTION… COMMAND…    what the script of a job calls on a machine

It asks a server of the test, by a socket on the share: the namespaces of other machines cannot be
seen from one of them.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

SOCKET = "SRUN_SOCKET"  # variable with the path of the server's socket
REQUEST_BYTES = 1 << 20
POLL_S = 0.2


def main(words: list[str]) -> int:
    """Let the server start the command, and wait for it. SIGTERM ends it."""
    command = words[:]
    while command[0].startswith("--"):
        del command[0]
    request = {
        "options": words[: len(words) - len(command)],
        "command": command,
        "env": dict(os.environ),
    }
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ[SOCKET])
    signal.signal(signal.SIGTERM, lambda *_: server.shutdown(socket.SHUT_WR))
    server.sendall(json.dumps(request).encode() + b"\n")
    return server.recv(1)[0]


@contextlib.contextmanager
def server(cluster, file: Path) -> Iterator[None]:
    """Start commands for `main` on the machines of a cluster."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(file))
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                client = listener.accept()[0]
                threading.Thread(target=_start, args=(cluster, client), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _start(cluster, client: socket.socket) -> None:
    text = b""
    while not text.endswith(b"\n"):
        text += client.recv(REQUEST_BYTES)
    request = json.loads(text)
    chosen = []
    for number, machine in enumerate(cluster.nodes):
        if f"--nodelist={machine.name}" in request["options"]:
            chosen = [number]
        elif f"--exclude={machine.name}" in request["options"]:
            chosen = [other for other in range(len(cluster.nodes)) if other != number]
    log = cluster.base / "-".join(["srun", *map(str, chosen)])
    started = [cluster.popen(number, request["command"], log, request["env"]) for number in chosen]
    client.settimeout(POLL_S)
    while any(process.poll() is None for process in started):
        with contextlib.suppress(TimeoutError):
            if not client.recv(1):  # srun got SIGTERM, or was killed
                for process in started:
                    cluster.signal_driver(process, signal.SIGTERM)
                    process.wait()
    with contextlib.suppress(OSError):
        client.sendall(bytes([max(abs(process.returncode) for process in started)]))
    client.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
