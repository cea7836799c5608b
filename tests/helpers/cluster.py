"""Ray clusters for tests: a head on free ports, and more nodes on this machine."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
STORE = "--object-store-memory=200000000"


@contextlib.contextmanager
def head(logs: Path, cpus: int) -> Iterator[SimpleNamespace]:
    """Start a head. All nodes end with the context.

    The result has `env`, the environment of a client; `dashboard`, its address; `pid`; `folder` of
    the session; and `node(cpus)`, which starts another node.
    """
    # A short path: Ray creates sockets below it, whose paths have at most 107 bytes.
    base = Path("/tmp") / f"espalier-{os.getpid()}-{_free_port()}"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    port, dashboard, agent, client = (_free_port() for _ in range(4))
    processes = []

    def start(*args: str, **more: str) -> subprocess.Popen:
        log = (logs / f"{len(processes)}.log").open("w+")
        processes.append(
            subprocess.Popen(
                [*START, STORE, *args],
                env={**env, **more},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
        _wait(processes[-1], log)
        return processes[-1]

    try:
        first = start(
            "--head",
            f"--num-cpus={cpus}",
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            f"--dashboard-agent-listen-port={agent}",
            f"--ray-client-server-port={client}",
            f"--temp-dir={base}",
        )
        _wait_for_port(dashboard)
        yield SimpleNamespace(
            env={**env, "RAY_ADDRESS": f"127.0.0.1:{port}"},
            dashboard=f"http://127.0.0.1:{dashboard}",
            pid=first.pid,
            folder=base,
            node=lambda cpus, **more: start(
                f"--address=127.0.0.1:{port}", f"--num-cpus={cpus}", **more
            ),
        )
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)  # a normal end takes 20 s
        # The other processes of Ray have the folder in their arguments.
        subprocess.run(["pkill", "-9", "-f", f"{base}/"], check=False)
        shutil.rmtree(base, ignore_errors=True)


def _free_port() -> int:
    """Return a free port that the system does not assign to clients in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue


def _wait(process: subprocess.Popen, log) -> None:
    """Wait until the node belongs to its cluster."""
    deadline = time.monotonic() + 90
    output = ""
    while "Ray runtime started." not in output:
        if time.monotonic() > deadline or process.poll() is not None:
            pytest.fail(f"a node did not start:\n{output[-3000:]}")
        time.sleep(0.1)
        log.seek(0)
        output = log.read()


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with socket.socket() as s:
            s.settimeout(1)
            if s.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(f"no process listens on port {port}")
