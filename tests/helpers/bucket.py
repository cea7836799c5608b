"""A bucket on loopback: moto's server, and a proxy before it that makes faults."""

import contextlib
import http.client
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

# What the proxy does with a request: passes it on, if the fault is "".
FAULTS = ("503", "reset", "reset_after", "cut", pytest.param("slow", marks=pytest.mark.slow))
Decide = Callable[[int, str, str], str]  # number of the request, method and path -> fault


class Proxy:
    """Passes requests on to a server, unless `decide` says otherwise.

    503: answers that it is busy. reset: closes the connection. reset_after: passes the request on
    and closes the connection. cut: sends half of the answer. slow: passes it on after half a
    second. Other numbers are the status of an answer, with S3's code after it: `403 ExpiredToken`.
    200: says that an object was written, and forgets it.
    `without` are headers of requests that are not passed on; `keys` gets the access keys.
    """

    def __init__(self, port: int) -> None:
        self.count = 0
        self.requests: list[tuple[str, str]] = []
        self.without: set[str] = set()
        self.keys: list[str] = []
        self.decide: Decide = lambda *_: ""
        proxy = self
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    proxy.count += 1
                    number = proxy.count
                    proxy.requests.append((self.command, self.path))
                    key = self.headers.get("Authorization", "").partition("Credential=")[2]
                    proxy.keys.append(key.partition("/")[0])
                fault = proxy.decide(number, self.command, self.path)
                if fault == "slow":
                    time.sleep(0.5)
                elif fault == "reset":
                    self.close_connection = True
                    return
                elif fault[:3].isdecimal():
                    status, _, code = fault.partition(" ")
                    error = f"<Error><Code>{code or 'SlowDown'}</Code></Error>"
                    self.answer(int(status), "" if status == "200" else error)
                    return
                server = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                headers = {k: v for k, v in self.headers.items() if k not in proxy.without}
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                data = answer.read()
                server.close()
                if fault == "reset_after":
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                kept = ("etag", "last-modified", "content-type", "content-range")
                for name, value in answer.getheaders():
                    if name.lower() in kept or name.lower().startswith("x-amz"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
                self.send_header("Content-Length", str(length or 0))
                self.end_headers()
                if fault == "cut":
                    data = data[: len(data) // 2]
                    self.close_connection = True
                if self.command != "HEAD":
                    self.wfile.write(data)

            def answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("ETag", '"none"')
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text.encode())

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # the client was killed

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@dataclass
class Bucket:
    """A bucket of moto.

    Attributes:
        name: Its name.
        env: Environment of a client, which goes through the proxy.
        proxy: The proxy.
        client: A client of boto3 that does not go through it.
    """

    name: str
    env: dict[str, str]
    proxy: Proxy
    client: object = field(repr=False)

    @property
    def address(self) -> str:
        return f"s3://{self.name}"

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the environment of this process lead to it."""
        for name, value in self.env.items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.delenv(name, raising=False)

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.name, Key=key)["Body"].read()

    def names(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2")
        return [
            found["Key"]
            for page in pages.paginate(Bucket=self.name, Prefix=prefix)
            for found in page.get("Contents", [])
        ]


def environment(url: str) -> dict[str, str]:
    """Return the environment of a client of a server without real credentials."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    }


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The address of moto's server."""
    pytest.importorskip("moto", reason="moto is missing: make dev")
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    with contextlib.suppress(Exception):
        server.stop()


@pytest.fixture(scope="session")
def store_client(object_store):
    """A client of moto that does not go through a proxy."""
    import boto3

    keys = environment(object_store)
    return boto3.session.Session(
        keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1"
    ).client("s3", endpoint_url=object_store)


@pytest.fixture(scope="session")
def store_proxy(object_store) -> Iterator[Proxy]:
    """A proxy before moto."""
    proxy = Proxy(int(object_store.rpartition(":")[2]))
    yield proxy
    proxy.close()


@pytest.fixture
def bucket(store_proxy, store_client, monkeypatch) -> Bucket:
    """An empty bucket; the environment of this process leads to it through a proxy."""
    made = new_bucket(store_proxy, store_client)
    made.use(monkeypatch)
    return made


def new_bucket(proxy: Proxy, client: object) -> Bucket:
    """Make an empty bucket, whose proxy makes no faults."""
    proxy.decide = lambda *_: ""
    name = f"bucket-{secrets.token_hex(6)}"
    client.create_bucket(Bucket=name)
    return Bucket(name, environment(proxy.url), proxy, client)
