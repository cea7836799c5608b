"""What the answers of a store, and settings that cannot work, mean for a command."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestrator.errors import UserError
from orchestrator.objects import s3
from orchestrator.objects.address import parse
from orchestrator.objects.store import ChangedObjectError, StoreAwayError, open_store


def opened(bucket, patience_s=0.3):
    return open_store(parse("mirror", bucket.address), patience_s)


REQUESTS = {
    "get": lambda store: store.get("k"),
    "put": lambda store: store.put("k", b"x"),
    "put_if": lambda store: store.put_if("k", b"x", None),
    "list": lambda store: list(store.list("")),
}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("403 RequestTimeTooSkewed", "the clock of this machine is wrong"),
        ("403 InvalidObjectState", "is in an archive"),
        ("403 AccessDenied", r"may not do this \(AccessDenied, (Get|Put|List)Object"),
        ("400 AuthorizationHeaderMalformed", "has another address or region"),
        ("301 PermanentRedirect", "not one of S3; check AWS_ENDPOINT_URL"),
        ("501 NotImplemented", "cannot do what is asked of it, such as a conditional write"),
    ],
)
@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_answer_that_no_repetition_changes_is_one_line_at_once(bucket, request_, fault, says):
    store = opened(bucket)
    bucket.proxy.decide = lambda *_: fault
    with pytest.raises(UserError, match=says) as caught:
        request_(store)
    assert not isinstance(caught.value, StoreAwayError)


class WebServer(BaseHTTPRequestHandler):
    """Answers every request with a page."""

    def do_any(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html><body>Welcome</body></html>")

    do_GET = do_PUT = do_any

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_server_that_is_no_store_is_one_line(bucket, monkeypatch, request_):
    server = ThreadingHTTPServer(("127.0.0.1", 0), WebServer)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        with pytest.raises(UserError, match="not one of S3; check AWS_ENDPOINT_URL"):
            request_(opened(bucket))
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "ftp://store"),
        ("AWS_ENDPOINT_URL", "http://store:99999"),
        ("AWS_ENDPOINT_URL", "store:9000\n"),
        ("AWS_ENDPOINT_URL", "https://{}"),  # the server speaks http
        ("AWS_ACCESS_KEY_ID", "secret-key\n"),
        ("AWS_SESSION_TOKEN", "secret-token\n"),
    ],
)
def test_setting_that_cannot_work_is_one_line_at_once(bucket, monkeypatch, name, value):
    monkeypatch.setenv(name, value.format(bucket.proxy.url.removeprefix("http://")))
    s3._client.cache_clear()
    with pytest.raises(UserError) as caught:
        opened(bucket).get("k")
    s3._client.cache_clear()
    assert not isinstance(caught.value, StoreAwayError)
    assert re.search("check AWS_ENDPOINT_URL|Invalid endpoint", str(caught.value))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_renewed_credentials_are_used_by_a_process_that_goes_on(bucket, monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    keys = "[default]\naws_access_key_id = {}\naws_secret_access_key = x\n"
    file.write_text(keys.format("first"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    store = opened(bucket)
    store.put("k", b"x")
    used = bucket.proxy.keys = []
    bucket.proxy.decide = lambda *_: "403 ExpiredToken"
    with pytest.raises(UserError, match="have expired"):
        store.get("k")
    bucket.proxy.decide = lambda *_: ""
    file.write_text(keys.format("second"))
    assert store.get("k").data == b"x"
    assert used == ["first", "second"]


def test_answer_with_other_bytes_than_asked_for_is_not_used(bucket):
    """A store may ignore the range and the version that a request asks for."""
    bucket.put("k", b"first")
    store = opened(bucket)
    version = store.get("k").version
    headers = bucket.proxy.without
    headers.add("Range")
    try:
        with pytest.raises(StoreAwayError):
            store.get("k", 1, 2)
        bucket.put("k", b"other")
        headers.add("If-Match")
        with pytest.raises(ChangedObjectError):
            store.get("k", version=version)
    finally:
        headers.clear()


class Metadata(BaseHTTPRequestHandler):
    """The service that gives a machine of AWS its role. It is busy at first."""

    def do_any(self):
        self.server.requests += 1
        name = self.path.rsplit("/", 1)[1]
        text = "role" if name == "" else json.dumps(KEYS)
        is_busy = self.server.requests <= self.server.busy
        self.send_response(503 if is_busy else 200)
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_PUT = do_any

    def log_message(self, *_):
        pass


KEYS = {
    "Code": "Success",
    "AccessKeyId": "of-the-role",
    "SecretAccessKey": "x",
    "Token": "t",
    "Expiration": "2099-01-01T00:00:00Z",
}


@pytest.mark.parametrize("busy", [4, 10**9])
def test_role_of_the_machine_that_comes_late_is_waited_for(bucket, monkeypatch, busy):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.requests = 0
    server.busy = busy
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(s3, "CREDENTIALS_S", 30.0)  # the tests may share the CPUs
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", address)
    bucket.put("k", b"x")
    used = bucket.proxy.keys = []
    s3._client.cache_clear()
    try:
        if busy == 4:
            assert opened(bucket, 30.0).get("k").data == b"x"
            assert set(used) == {"of-the-role"}
        else:
            with pytest.raises(UserError, match="there are no credentials"):
                opened(bucket, 0.3).get("k")
    finally:
        s3._client.cache_clear()
        server.shutdown()
        server.server_close()
