"""Joining and starting Ray, with a function instead of `ray.init`."""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
import ray
import ray.train

from orchestrator.cluster import connection, layout, private
from orchestrator.errors import UserError

LONGEST_TEMPORARY = connection.SOCKET_BYTES - len(connection.SOCKET)


@pytest.fixture
def init(monkeypatch):
    """Note the calls of `ray.init`, which does nothing. Ray is not initialized."""
    calls = []

    def note(**settings):
        calls.append((Path.cwd(), settings))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as ray.init does

    monkeypatch.setattr(ray, "init", note)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection.atexit, "register", lambda function: None)
    monkeypatch.setattr(connection, "_note_head", lambda: None)
    monkeypatch.setattr(private, "running_head", lambda: "nowhere")
    for name in (
        *("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"),
        "RAY_BACKEND_LOG_LEVEL",
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return calls


def test_workers_of_a_local_ray_do_not_import_from_the_current_folder(init, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    connection.connect()
    [(folder, _)] = init
    assert (folder / "model" / "gpt.py").is_file()
    assert Path.cwd() == tmp_path


def test_processes_of_a_local_ray_inherit_the_variables_of_workers(init, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    connection.connect()
    [(_, settings)] = init
    assert "runtime_env" not in settings, "each would need a process of its own"
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_variable_that_a_job_was_submitted_with_is_not_given_twice(init, monkeypatch):
    """Ray refuses a variable that the job and its driver both give."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(connection, "_probe", lambda address: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    job = {"runtime_env": {"env_vars": {"TIKTOKEN_CACHE_DIR": "/mine"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    connection.connect()
    [(_, settings)] = init
    expected = {**layout.WORKER_ENVIRONMENT, "XDG_CACHE_HOME": "/cache"}
    assert settings["runtime_env"]["env_vars"] == expected


def test_handler_of_sigterm_stays(init):
    before = signal.getsignal(signal.SIGTERM)
    connection.connect()
    assert signal.getsignal(signal.SIGTERM) is before


def test_local_ray_has_a_token_that_is_not_stored(init, monkeypatch):
    connection.connect()
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    connection.connect()
    assert os.environ["RAY_AUTH_TOKEN"] == token
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/a/token")
    connection.connect()
    assert "RAY_AUTH_TOKEN" not in os.environ, "the user has one"


@pytest.mark.parametrize(("length", "kept"), [(LONGEST_TEMPORARY, True), (60, False)])
def test_temporary_folder_is_replaced_if_its_path_is_too_long_for_sockets(
    init, monkeypatch, length, kept
):
    monkeypatch.setenv("TMPDIR", "/tmp/".ljust(length, "x"))
    connection.connect()
    assert os.environ.get("RAY_TMPDIR") == (None if kept else "/tmp")


@pytest.mark.parametrize(
    "address",
    [
        *("http://127.0.0.1:8265", "ray://127.0.0.1:10001", "127.0.0.1", ":6379", "127.0.0.1:-5"),
        *(" auto", "head:"),
    ],
)
def test_what_is_not_the_address_of_a_head_is_refused(init, monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=f"RAY_ADDRESS: '{address}' .* give HOST:PORT"):
        connection.connect()
    assert init == []


@pytest.mark.parametrize(
    ("address", "words"),
    [("", "Ray cannot start on this machine: no space"), ("auto", "RAY_ADDRESS: .*no space")],
)
def test_ray_that_does_not_start_is_reported_in_one_line(monkeypatch, init, address, words):
    def fail(**_):
        raise ConnectionError("no space\nmany\nlines")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(connection, "_probe", lambda address: None)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(UserError, match=words) as caught:
        connection.connect()
    assert "\n" not in str(caught.value)


def test_head_that_does_not_answer_for_some_seconds_has_died(monkeypatch):
    """The seconds are those of Ray's variable, if another head may come."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.delenv(connection.RECONNECT, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setattr(connection, "_gcs_address", f"127.0.0.1:{head.getsockname()[1]}")
        assert connection.failure() is None
    assert connection.failure() is None, "it may be back soon"
    assert connection.failure(RuntimeError("a worker is gone")) is not None
    monkeypatch.setattr(connection, "_answered", time.monotonic() - 60)
    monkeypatch.setenv(connection.RECONNECT, "600")
    assert connection.failure() is None
    monkeypatch.delenv(connection.RECONNECT)
    assert connection.failure() == (
        f"the head of the Ray cluster at {connection._gcs_address} does not answer"
    )


@pytest.mark.parametrize(
    ("error", "has_died"),
    [
        (ray.exceptions.ActorDiedError(), True),
        (ray.exceptions.NodeDiedError("gone"), True),
        (ray.train.TrainingFailedError("a worker failed"), False),
        (RuntimeError("ours"), False),
        (None, False),
    ],
)
def test_errors_of_workers_are_not_errors_of_ray(monkeypatch, error, has_died):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert (connection.failure(error) is not None) == has_died


def test_limits_that_are_too_low_for_ray_are_named(init, monkeypatch):
    def fail(**_):
        raise RuntimeError("timed out")

    def getrlimit(kind):
        return (40, 40) if kind == resource.RLIMIT_NOFILE else (2**30, 2**30)

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(resource, "getrlimit", getrlimit)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(UserError) as caught:
        connection.connect()
    assert str(caught.value) == (
        "Ray cannot start on this machine: timed out; raise `ulimit -n` from 40 to at least 256 "
        "and raise `ulimit -v` from 1048576 to unlimited and make room in /dev/shm, where 1 MiB "
        "are free"
    )


@pytest.fixture
def head():
    """A head that wants the token `right`. Returns its address."""

    def answer(request, context):
        if ("authorization", "Bearer right") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return b""

    method = grpc.unary_unary_rpc_method_handler(answer)
    handler = grpc.method_handlers_generic_handler(
        "ray.rpc.NodeInfoGcsService", {"GetAllNodeInfo": method}
    )
    server = grpc.server(ThreadPoolExecutor(1), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_port_of_another_program_is_refused(init, monkeypatch, answer):
    monkeypatch.setattr(connection, "PROBE_S", 0.3)
    monkeypatch.setattr(private, "token_metadata", lambda: ())
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as thread:
        clients = []

        def serve() -> None:
            with contextlib.suppress(OSError):  # the server is closed
                while True:
                    clients.append(server.accept()[0])  # stays open
                    if answer is not None:
                        clients[-1].sendall(answer)
                        clients.pop().close()

        thread.submit(serve)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match="no cluster answers at .*not the head of a Ray"):
            connection.connect()
        server.shutdown(socket.SHUT_RDWR)
    assert init == []


@pytest.mark.parametrize("address", ["auto", "127.0.0.1"])
@pytest.mark.parametrize(
    ("given", "found", "joins"),
    [
        ("right", None, True),
        ("wrong", None, False),
        (None, "right", True),
        (None, "wrong", False),
        (None, None, False),
    ],
)
def test_token_is_used_if_the_head_wants_one(init, head, monkeypatch, address, given, found, joins):
    tokens = [given] if given else []

    def use_token_if_there():
        tokens.extend([found] if found and not tokens else [])
        return bool(tokens)

    def metadata():
        return tuple(("authorization", f"Bearer {token}") for token in tokens)

    monkeypatch.setattr(private, "running_head", lambda: head)
    monkeypatch.setattr(private, "use_token_if_there", use_token_if_there)
    monkeypatch.setattr(private, "token_metadata", metadata)
    monkeypatch.setenv("RAY_ADDRESS", "auto" if address == "auto" else head)
    if joins:
        connection.connect()
        [(_, settings)] = init
        assert settings["address"] == head
        return
    with pytest.raises(UserError, match="wants a token.* set RAY_AUTH_MODE=token"):
        connection.connect()
    assert init == []
