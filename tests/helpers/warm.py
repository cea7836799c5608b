"""Python processes that start in a tenth of a second: forks of one that has imported the libraries.

Workers import torch and pandas, and commands MLflow, which takes each of them three seconds of a
CPU. The server below does that once for the workers of a head (`cluster.head`) and for the commands
that join it (`Process`). Nothing else differs: a process has the arguments, environment, folder and
streams that it is given, and imports Ray and the product itself, from its own path.

    warm.py serve SOCKET    the server
    warm.py ARGUMENT…       what Ray calls instead of its setup_worker.py
"""

import contextlib
import gc
import importlib
import json
import os
import re
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

# Not Ray: it reads the variables of its process when it is imported.
MODULES = (
    "torch.distributed",
    "safetensors.torch",
    "pandas",
    "pyarrow.parquet",
    "pyarrow.dataset",
    "mlflow.store.tracking.sqlalchemy_store",
    "pydantic",
    "regex",
    "jsonschema",
    "fsspec",
)
SOCKET = "ESPALIER_TEST_WARM"  # variable with the path of the server's socket
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}
CONTEXT = "--serialized-runtime-env-context="
REQUEST_BYTES = 1 << 20
START_S = 120.0  # for the start of the server; long, because the machines are shared
NUMBER_BYTES = 4  # of a pid, and of an exit status


# ---- the server ----


def serve(path: str) -> None:
    """Fork a process for each request. Returns only in such a process."""
    os.environ.update(ENVIRONMENT)
    del sys.path[0]  # the folder of this file
    for name in MODULES:
        importlib.import_module(name)
    gc.freeze()  # so that a fork does not copy the modules when it ends
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    running: dict[int, tuple[int, socket.socket]] = {}  # by a descriptor of the process
    while True:
        ready, _, _ = select.select([listener, *running], [], [])
        for ended in [one for one in ready if one is not listener]:
            pid, client = running.pop(ended)
            os.close(ended)
            _tell(client, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            client.close()
        if listener in ready:
            client, _ = listener.accept()
            text, streams, _, _ = socket.recv_fds(client, REQUEST_BYTES, 3)
            pid = os.fork()
            if pid == 0:
                break
            for stream in streams:
                os.close(stream)
            running[os.pidfd_open(pid)] = pid, client
            _tell(client, pid)
    for one in (listener, client, *(client for _, client in running.values())):
        one.close()
    for descriptor in running:
        os.close(descriptor)
    _become(json.loads(text), streams)


def _tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        client.sendall(number.to_bytes(NUMBER_BYTES, "big", signed=True))


def _become(request: dict, streams: list[int]) -> None:
    """Take over what belongs to a process."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.setpgrp()  # Ray may end the group of a worker, and the server is in none of them
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["words"]
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:0] = [os.path.dirname(os.path.abspath(sys.argv[0])), *paths]
    with contextlib.suppress(ImportError):  # as Python does at its start
        importlib.import_module("sitecustomize")


# ---- its clients ----


def ask(words: list[str], environment: dict, folder: str, streams: list[int]) -> socket.socket:
    """Let the server fork a process for a script and its arguments.

    Returns:
        A connection that tells the pid and, at the end, the exit status.
    """
    request = {"words": words, "environment": environment, "folder": folder}
    server = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + START_S
    while not os.path.exists(environment[SOCKET]):  # the server may still import
        assert time.monotonic() < deadline, "the server did not start: see the log of the head"
        time.sleep(0.05)
    server.connect(environment[SOCKET])
    socket.send_fds(server, [json.dumps(request).encode()], streams)
    return server


class Process:
    """A command of the product, with what tests use of `subprocess.Popen`.

    Args:
        words: A script and its arguments.
        env: Environment, of a client of the head.
        cwd: Current folder.
    """

    def __init__(self, words: list[str], env: dict[str, str], cwd: Path) -> None:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        with open(os.devnull) as nothing:
            self._server = ask(words, env, str(cwd), [nothing.fileno(), out_end, err_end])
        os.close(out_end)
        os.close(err_end)
        self.words = words
        self.pid = self._number()
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)
        self.returncode: int | None = None

    def _number(self) -> int:
        answer = self._server.recv(NUMBER_BYTES)
        assert answer, "the server has ended"
        return int.from_bytes(answer, "big", signed=True)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.words, timeout or 0)
            self.returncode = self._number()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        streams = (self.stdout, self.stderr)
        texts = {}
        readers = [
            threading.Thread(target=lambda s=s: texts.update({s: s.read()}), daemon=True)
            for s in streams
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return texts[self.stdout], texts[self.stderr]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def set_up_worker(words: list[str]) -> None:
    """Do what Ray's setup_worker.py does, with a forked process."""
    text = next((word.removeprefix(CONTEXT) for word in words if word.startswith(CONTEXT)), "{}")
    context = json.loads(text)
    words = [word for word in words if not word.startswith((CONTEXT, "--language="))]
    for name, value in (context.get("env_vars") or {}).items():
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    prefix = context.get("command_prefix")
    if prefix:
        command = [*prefix, "exec", *map(shlex.quote, [sys.executable, __file__, *words])]
        os.execvp("bash", ["bash", "-c", " ".join(command)])
    ask(words, dict(os.environ), os.getcwd(), [0, 1, 2]).recv(NUMBER_BYTES)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        set_up_worker(sys.argv[1:])
