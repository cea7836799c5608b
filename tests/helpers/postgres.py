"""A PostgreSQL server for a test, in a folder of its own, on loopback and with a password."""

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.ports import free_port

PASSWORD = "only-for-a-test"


class Postgres:
    """A running server. `uri` has no password: PGPASSWORD does."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.port = free_port()
        self.uri = f"postgresql://mlflow@127.0.0.1:{self.port}/mlflow"

    def create(self) -> None:
        secret = self.base / "password"
        secret.write_text(PASSWORD)
        self._run(
            "initdb",
            "--encoding=UTF8",
            "--username=mlflow",
            "--auth=scram-sha-256",
            f"--pwfile={secret}",
        )
        self.start()
        address = ["--host=127.0.0.1", f"--port={self.port}", "--username=mlflow"]
        self._run("createdb", *address, "mlflow", data=False)

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.base} -c fsync=off"
        self._run("pg_ctl", "start", "--wait", f"--log={self.base / 'log'}", "-o", options)

    def stop(self, mode: str) -> None:
        """Stop it: `fast` ends all connections, `immediate` is like a loss of power."""
        self._run("pg_ctl", "stop", "--wait", f"--mode={mode}")

    def query(self, text: str) -> list[tuple]:
        import psycopg

        with psycopg.connect(self.uri, password=PASSWORD) as connection:
            return connection.execute(text).fetchall()

    def _run(self, program: str, *words: str, data: bool = True) -> None:
        # PostgreSQL refuses to run as root.
        user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        where = [f"--pgdata={self.base / 'data'}"] if data else []
        subprocess.run(
            [_program(program), *where, *words],
            **user,
            env={"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD, "LC_ALL": "C"},
            cwd=self.base,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )


def _program(name: str) -> str:
    """Return the path of a program of PostgreSQL, which Debian does not put into the PATH."""
    folders = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")))
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *folders]))
    if found is None:
        pytest.skip(f"{name} of PostgreSQL is not installed")
    return found


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """Start a server; skip the test where this is not possible."""
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    _program("initdb")
    base = Path(tempfile.mkdtemp(prefix="espalier-postgres-"))
    server = Postgres(base)
    try:
        if os.geteuid() == 0:
            try:
                entry = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("PostgreSQL does not run as root, and there is no user `postgres`")
            os.chown(base, entry.pw_uid, entry.pw_gid)
        server.create()
        yield server
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            server.stop("immediate")
        shutil.rmtree(base, ignore_errors=True)
