"""A real MLflow server, and its faults.

`Gate` is a proxy in front of the server, which can refuse connections and damage answers. `locked`
locks the database of the server.
"""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import psutil

from tests.helpers.wait import wait_until

REPO = Path(__file__).resolve().parents[2]
LOCK = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
db.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


class Gate:
    """A proxy in front of the server.

    Its mode is "open", an HTTP status with which it answers all requests, or one of these:

        refuse   no process listens on the port
        reset    the connection is reset after the request
        hang     no answer is sent
        half     the server receives half of the request
        cut      the client receives 60 bytes of each answer
        lost     the server answers, and the client receives nothing
    """

    def __init__(self, server_port, port):
        self.server_port = server_port
        self.port = port
        self.mode = None
        self.listener = None
        self.sockets = set()

    def set(self, mode):
        """Change the mode, and close all connections, so that none continues in the old mode."""
        self.mode = mode
        for s in list(self.sockets):
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
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        # Before the mode is read: `set` changes the mode first and then closes these sockets.
        self.sockets.add(client)
        with contextlib.suppress(OSError), client:
            mode = self.mode
            if mode == "refuse":
                # Accepted before the listener was closed. If it were served, the client would keep
                # the connection open.
                return
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
    """Copy until the source ends. With a limit: only so many bytes of the first part."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data[:limit])
            if limit is not None:
                break
        target.shutdown(socket.SHUT_RDWR)


class Server:
    """`pipelines/ui.py` on the runs in `storage`.

    The virtual environment is not in its PATH: the command must work without that.
    """

    def __init__(self, storage, cwd, port):
        self.storage = storage
        self.cwd = cwd
        self.port = port
        self.process = None
        script = str(REPO / "pipelines" / "ui.py")
        self.command = [sys.executable, script, str(storage), "--port", str(port)]
        self.environment = {**os.environ, "PATH": "/usr/bin:/bin"}
        self.database = storage / "mlflow" / "mlflow.db"

    def start(self):
        with open(self.storage / "server.log", "ab") as out:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        wait_until(lambda: self.process.poll() is not None or self.healthy())
        assert self.process.poll() is None, (self.storage / "server.log").read_text()[-2000:]

    def healthy(self):
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as answer,
        ):
            return answer.status == 200

    def kill(self):
        """Kill it. The next start takes half of the time: it skips the command of MLflow."""
        serving = psutil.Process(self.process.pid).children()
        if serving:
            self.command, self.environment = serving[0].cmdline(), serving[0].environ()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def locked(database):
    """Let another process lock the database, so that no other can read or write it."""
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(database)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"locked\n"
        yield
    finally:
        holder.communicate()
