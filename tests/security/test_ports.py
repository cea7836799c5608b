"""Every port of a cluster needs the token; the dashboard listens on loopback only.

Other ports of Ray listen on all addresses (docs/cluster.md lists them). Each is called here without
the token.
"""

import contextlib
import http.client
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import psutil
import pytest

REPO = Path(__file__).resolve().parent.parent.parent
# Calls that change or read something, of every service of a head or node.
CALLS = [
    "InternalKVGcsService/InternalKVPut",
    "InternalKVGcsService/InternalKVKeys",
    "NodeInfoGcsService/GetAllNodeInfo",
    "JobInfoGcsService/AddJob",
    "ActorInfoGcsService/RegisterActor",
    "NodeManagerService/RequestWorkerLease",
    "NodeManagerService/GetNodeStats",
    "NodeManagerService/ShutdownRaylet",
    "ObjectManagerService/Push",
    "ObjectManagerService/Pull",
    "ObjectManagerService/FreeObjects",
    "CoreWorkerService/PushTask",
    "ReporterService/GetTraceback",
    "LogService/ListLogs",
    "RayletDriver/Init",
    "RayletDriver/PutObject",
]
PATHS = [
    "/api/jobs/",
    "/api/v0/nodes",
    "/logs",
    "/get_or_create_runtime_env",
    "/api/job_agent/jobs/",
    "/nodes?view=summary",
    "/api/serve/applications/",
    "/worker/traceback?pid=1",
    "/metrics",
]
JOINS = "import ray; ray.init(log_to_driver=False); print('JOINED', len(ray.nodes()))"
OWN = """
import os, sys
from tests.helpers.wait import wait_until
from orchestrator.cluster.connection import connect
connect(lambda: print("meanwhile", end=" "))
import ray
node = ray._private.worker._global_node
gcs = ray.get_runtime_context().gcs_address
print(gcs, node.get_session_dir_path(), *sorted(node.all_processes), flush=True)
sys.stdin.read()
"""
METRICS = "metrics"  # a page of numbers
REFUSALS = {"gRPC", "HTTP", METRICS}
NO_ANSWER = "{'UNAVAILABLE'} {None} {None}"


def listening(pids: set[int]) -> dict[int, str]:
    """Return {port: address} of the TCP sockets on which these processes listen."""
    found = {}
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in psutil.Process(pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.port] = connection.laddr.ip
    return found


def processes_naming(text: str) -> set[int]:
    """Return processes of this machine with `text` in their own or their parent's command line."""
    processes = list(psutil.process_iter(["pid", "ppid", "cmdline"]))
    named = {p.pid for p in processes if text in "\0".join(p.info["cmdline"] or [])}
    return named | {p.pid for p in processes if p.info["ppid"] in named}


@pytest.fixture
def ports(ray_head, ray_cluster, clients) -> dict[int, str]:
    """Return {port: address} of the head, its agents and the worker of one actor."""

    @ray_cluster.remote(num_cpus=0)
    class Idle:
        def pid(self):
            return os.getpid()

    idle = Idle.remote()
    worker = ray_cluster.get(idle.pid.remote())
    deadline, before = time.monotonic() + 30, {}
    while time.monotonic() < deadline:
        found = listening(processes_naming(f"{ray_head.folder}/") | {worker})
        if found == before and len(found) > 6:
            break
        before = found
        time.sleep(2)
    yield found
    del idle


def reach(port: int, address: str) -> str:
    """Return how a socket that listens at `address` is called from this machine."""
    host = "127.0.0.1" if address in ("0.0.0.0", "::") else address
    return f"{host}:{port}"


def grpc_answers(address: str, token: str | None, calls: list[str] = CALLS) -> set[str]:
    """Return the answers of a gRPC server to an empty request of each call."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    answers = set()
    with grpc.insecure_channel(address) as channel:
        for call in calls:
            try:
                channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=10, metadata=metadata)
                answers.add(f"OK {call}")
            except grpc.RpcError as error:
                answers.add(error.code().name)
                if error.code().name == "UNAVAILABLE":
                    break  # the port has no gRPC server
    return answers


def http_answer(url: str, token: str | None, data: bytes | None = None) -> int | str | None:
    """Return the status; `METRICS` for a page of numbers; None if there is no HTTP server."""
    headers = {"content-type": "application/json"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return METRICS if response.read().startswith(b"# HELP") else response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


def refusal(address: str, token: str | None) -> str:
    """Return how a port refuses a caller: "gRPC", "HTTP" or `METRICS`; else all its answers."""
    answers = grpc_answers(address, token)
    if "UNAUTHENTICATED" in answers and answers <= {"UNAUTHENTICATED", "UNIMPLEMENTED"}:
        return "gRPC"
    got = {http_answer(f"http://{address}{path}", token) for path in PATHS}
    posted = {http_answer(f"http://{address}{path}", token, b"{}") for path in PATHS}
    if got | posted <= {401, 403}:
        return "HTTP"
    return METRICS if (got, posted) == ({METRICS}, {405}) else f"{answers} {got} {posted}"


@pytest.fixture(scope="module")
def clients(ray_head, tmp_path_factory):
    """Clients that try to join without the token.

    They are started before the other tests, because a refused client tries for 20 seconds.
    """
    home = {"HOME": str(tmp_path_factory.mktemp("home"))}
    without = {k: v for k, v in ray_head.env.items() if not k.startswith("RAY_AUTH")} | home
    words = [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
    ]
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", JOINS],
            env=without | w,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for w in words
    ]
    yield clients
    for client in clients:
        client.kill()
        client.wait()


def test_every_port_of_a_cluster_refuses_a_missing_and_a_wrong_token(ray_head, ports):
    for token in (None, secrets.token_hex(32)):
        found = {port: refusal(reach(port, address), token) for port, address in ports.items()}
        # Ray may have ended idle workers meanwhile. Their ports do not answer.
        still_open = listening(processes_naming(f"{ray_head.folder}/"))
        for port in set(found) - set(still_open):
            if found[port] == NO_ANSWER:
                del found[port]
        assert set(found.values()) == REFUSALS, found
    # With the right token, the same call is answered.
    right = ray_head.env["RAY_AUTH_TOKEN"]
    [call] = [c for c in CALLS if c.endswith("GetAllNodeInfo")]
    assert grpc_answers(ray_head.env["RAY_ADDRESS"], right, [call]) == {f"OK {call}"}


def test_dashboard_listens_on_loopback(ray_head, ports):
    assert ports[int(ray_head.dashboard.rpartition(":")[2])] == "127.0.0.1"


@pytest.mark.parametrize("token", [None, secrets.token_hex(32)], ids=["none", "wrong"])
def test_job_without_the_right_token_is_refused(ray_head, token, tmp_path):
    url, canary = f"{ray_head.dashboard}/api/jobs/", tmp_path / "canary"
    job = json.dumps({"entrypoint": f"touch {canary}"}).encode()
    assert http_answer(url, token, job) in (401, 403)
    assert http_answer(url, token) in (401, 403)
    assert http_answer(url, ray_head.env["RAY_AUTH_TOKEN"]) == 200
    assert not canary.exists()


def test_driver_that_starts_its_own_ray_protects_it_with_a_token(tmp_path):
    """It starts no process that a driver does not need, such as a dashboard."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", OWN],
        env=env | {"HOME": str(tmp_path), "PYTHONPATH": str(REPO)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as driver:
        try:
            done, gcs, session, *processes = driver.stdout.readline().split()
            assert (done, processes) == ("meanwhile", ["gcs_server", "raylet"])
            time.sleep(3)  # until its agents listen
            found = listening(processes_naming(f"{Path(session).name}/"))
            answers = {port: refusal(reach(port, address), None) for port, address in found.items()}
            assert not list(tmp_path.glob(".ray/auth_token")), "readable for all users"
            assert int(gcs.rpartition(":")[2]) in answers
            assert set(answers.values()) <= REFUSALS, answers
        finally:
            driver.stdin.close()
            driver.wait(60)


def test_no_client_joins_without_the_token(clients):
    for client in clients:
        out, err = client.communicate(timeout=120)
        assert client.returncode != 0
        assert "JOINED" not in out
        assert "oken" in err, "the message does not mention the token"
