"""Ray clusters for tests: a head on free ports, and more nodes on this machine."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import warm
from tests.helpers.ports import free_port
from tests.helpers.wait import wait_until

START = [
    sys.executable,
    str(Path(__file__).with_name("warm_head.py")),
    "start",
    "--block",
    "--disable-usage-stats",
    "--include-log-monitor=false",
]
STORE = "--object-store-memory=200000000"


@contextlib.contextmanager
def head(logs: Path, cpus: int) -> Iterator[SimpleNamespace]:
    """Start a head. All nodes end with the context.

    The result has `env`, the environment of a client; `dashboard`, its address; `pid`; `folder` of
    the session; and `node(cpus)`, which starts another node.
    """
    # A short path: Ray creates sockets below it, whose paths have at most 107 bytes.
    base = Path("/tmp") / f"espalier-{os.getpid()}-{free_port()}"
    base.mkdir(mode=0o700)
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        warm.SOCKET: str(base / "warm"),
    }
    port, dashboard, agent, client = (free_port() for _ in range(4))
    processes = []

    def start(*args: str, **more: str) -> subprocess.Popen:
        log = logs / f"{len(processes)}.log"
        with log.open("w") as out:
            processes.append(
                subprocess.Popen(
                    [*START, STORE, *args],
                    env={**env, **more},
                    stdout=out,
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
        wait_until(lambda: _listens(dashboard), first)
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


def _wait(process: subprocess.Popen, log: Path) -> None:
    """Wait until the node belongs to its cluster."""
    try:
        wait_until(lambda: "Ray runtime started." in log.read_text(), process, pause_s=0.1)
    except AssertionError:
        pytest.fail(f"a node did not start:\n{log.read_text()[-3000:]}")


def _listens(port: int) -> bool:
    with socket.socket() as s:
        s.settimeout(1)
        return s.connect_ex(("127.0.0.1", port)) == 0
