"""A real MLflow server, a gate in front of it that refuses, hangs, lies or cuts, and a lock on its database."""

import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

from tests.helpers.tracked import wait_for

REPO = Path(__file__).resolve().parents[2]
LOCK = (
    "import sqlite3, sys\ndb = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)\ndb.execute('BEGIN EXCLUSIVE')\n"
    "print('locked', flush=True)\nsys.stdin.read()"
)


class Gate:
    """A port in front of the server. `mode` is open, a status that it answers with, or

    refuse   nobody listens                     reset   the connection is reset after the request
    hang     nobody answers                     half    the server gets half of the request
    cut      60 bytes of each answer come       lost    the server has answered, and nothing of it comes
    """

    def __init__(self, server_port, port):
        self.server_port, self.port, self.mode, self.listener, self.sockets = (
            server_port,
            port,
            None,
            None,
            set(),
        )

    def set(self, mode):
        self.mode = mode
        for s in list(self.sockets):  # connections that are kept alive feel it too
            with contextlib.suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
        if (mode == "refuse") == bool(self.listener):
            self._listen(mode != "refuse")

    def _listen(self, on):
        if not on:
            self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
            self.listener = None
            return
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(
                    target=self._serve, args=(listener.accept()[0],), daemon=True
                ).start()

    def _serve(self, client):
        self.sockets.add(
            client
        )  # before the mode is read: `set` changes the mode, then shuts what it finds here
        with contextlib.suppress(OSError), client:
            mode = self.mode
            if mode == "refuse":
                return  # accepted between the new mode and the end of the listener: served, it would be kept alive for ever
            if mode == "reset":
                client.recv(65536)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif mode == "hang":
                while client.recv(65536):
                    pass
            elif mode[0].isdigit():
                client.recv(65536)
                client.sendall(
                    f"HTTP/1.1 {mode}\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno".encode()
                )
            else:
                self._pass(client, mode)

    def _pass(self, client, mode):
        with socket.create_connection(("127.0.0.1", self.server_port)) as server:
            self.sockets.add(server)
            if mode == "half":
                data = client.recv(65536)
                server.sendall(data[: len(data) // 2])
                return
            threading.Thread(target=_copy, args=(client, server, None), daemon=True).start()
            _copy(server, client, {"cut": 60, "lost": 0}.get(mode))


def _copy(source, target, limit):
    """All that comes; with a limit, that much of what comes first."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data[:limit])
            if limit is not None:
                break
        target.shutdown(socket.SHUT_RDWR)


class Server:
    """`pipelines/ui.py` over `storage`, in a working directory of its own and an environment that is not activated."""

    def __init__(self, storage, cwd, port):
        self.storage, self.cwd, self.port, self.process = storage, cwd, port, None
        self.database = storage / "mlflow" / "mlflow.db"

    def start(self):
        command = [
            sys.executable,
            str(REPO / "pipelines" / "ui.py"),
            str(self.storage),
            "--port",
            str(self.port),
        ]
        with open(self.storage / "server.log", "ab") as out:
            self.process = subprocess.Popen(
                command,
                cwd=self.cwd,
                env={**os.environ, "PATH": "/usr/bin:/bin"},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        wait_for(lambda: self.process.poll() is not None or self.healthy(), 60)
        assert self.process.poll() is None, (self.storage / "server.log").read_text()[-2000:]

    def healthy(self):
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer,
        ):
            return answer.status == 200

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def locked(database):
    """Another process holds the database: nobody reads or writes it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"locked\n"
        yield
    finally:
        holder.communicate()


def free_port():
    """Below the range from which the system gives ports to clients: while the gate refuses, one of those could take it."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
