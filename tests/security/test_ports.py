"""Who may call a cluster: whoever has its token, on every port; the dashboard and MLflow, from this machine alone.

Other ports of Ray listen on every address (docs/cluster.md lists them), so each is called here without the token.
"""

import http.client
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest

REPO = Path(__file__).resolve().parent.parent.parent
# Calls that would change something or give something away, of every service that a head or a node has.
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
from orchestrator.cluster.layout import connect
connect()
import ray
print(ray.get_runtime_context().gcs_address, ray._private.worker._global_node.get_session_dir_path(), flush=True)
sys.stdin.read()
"""
METRICS = "metrics"  # the answer of a page of numbers
REFUSALS, NOBODY = {"gRPC", "HTTP", METRICS}, "{'UNAVAILABLE'} {None} {None}"


def listening(pids: set[int]) -> dict[int, str]:
    """{port: address} of the TCP sockets on which processes listen, from the kernel's own tables."""
    found = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        inodes = {inode for pid in pids for inode in _sockets(pid)}
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[i] for i in (1, 3, 9))
            if state == "0A" and inode in inodes:
                address, port = local.split(":")
                words = [
                    int(address[i : i + 8], 16).to_bytes(4, "little")
                    for i in range(0, len(address), 8)
                ]
                found[int(port, 16)] = socket.inet_ntop(family, b"".join(words))
    return found


def _sockets(pid: int) -> list[str]:
    found = []
    try:
        for fd in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(fd.path)
            if target.startswith("socket:["):
                found.append(target[8:-1])
    except OSError:  # it ended meanwhile
        pass
    return found


def processes_naming(text: str) -> set[int]:
    """Of this machine, those whose command line or whose parent's has `text`."""
    parents, named = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text in (folder / "cmdline").read_text("utf-8", "replace"):
                named.add(int(folder.name))
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except OSError:
            pass
    return named | {pid for pid, parent in parents.items() if parent in named}


@pytest.fixture
def ports(ray_head, ray_cluster, clients) -> dict[int, str]:
    """{port: address} of the head, once its agents listen too, with one actor's worker."""

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
    """Where a socket that listens at `address` can be called from here."""
    return f"{'127.0.0.1' if address in ('0.0.0.0', '::') else address}:{port}"


def grpc_answers(address: str, token: str | None, calls: list[str] = CALLS) -> set[str]:
    """What the services at an address say to an empty request of each call."""
    metadata, answers = [("authorization", f"Bearer {token}")] if token else [], set()
    with grpc.insecure_channel(address) as channel:
        for call in calls:
            try:
                channel.unary_unary(f"/ray.rpc.{call}")(b"", timeout=10, metadata=metadata)
                answers.add(f"OK {call}")
            except grpc.RpcError as error:
                answers.add(error.code().name)
                if error.code().name == "UNAVAILABLE":
                    break  # no gRPC is spoken here
    return answers


def http_answer(url: str, token: str | None, data: bytes | None = None) -> int | str | None:
    """The status; `METRICS` for a page of numbers, None where no HTTP is spoken."""
    headers = {
        "content-type": "application/json",
        **({"authorization": f"Bearer {token}"} if token else {}),
    }
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, data, headers), timeout=10
        ) as response:
            return METRICS if response.read().startswith(b"# HELP") else response.status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None


def refusal(address: str, token: str | None) -> str:
    """How a port refuses a caller: as gRPC, as HTTP, or with `METRICS` and nothing else; else all that it said."""
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
    """Who tries to join without the token: begun before the other tests, for a refused client tries for 20 seconds."""
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


def test_every_port_of_a_cluster_refuses_who_has_no_token_or_a_wrong_one(ray_head, ports):
    for token in (None, secrets.token_hex(32)):
        found = {port: refusal(reach(port, address), token) for port, address in ports.items()}
        there = listening(
            processes_naming(f"{ray_head.folder}/")
        )  # idle workers end when Ray likes
        found = {
            port: answer for port, answer in found.items() if port in there or answer != NOBODY
        }
        assert set(found.values()) == REFUSALS, found
    # The same questions are answered to who has it.
    right = ray_head.env["RAY_AUTH_TOKEN"]
    [call] = [c for c in CALLS if c.endswith("GetAllNodeInfo")]
    assert grpc_answers(ray_head.env["RAY_ADDRESS"], right, [call]) == {f"OK {call}"}


def test_the_dashboard_listens_on_this_machine_alone(ray_head, ports):
    assert ports[int(ray_head.dashboard.rpartition(":")[2])] == "127.0.0.1"


@pytest.mark.parametrize("token", [None, secrets.token_hex(32)], ids=["none", "wrong"])
def test_no_job_is_taken_from_who_has_no_token_or_a_wrong_one(ray_head, token, tmp_path):
    url, canary = f"{ray_head.dashboard}/api/jobs/", tmp_path / "canary"
    job = json.dumps({"entrypoint": f"touch {canary}"}).encode()
    assert http_answer(url, token, job) in (401, 403)
    assert http_answer(url, token) in (401, 403)
    assert http_answer(url, ray_head.env["RAY_AUTH_TOKEN"]) == 200
    assert not canary.exists()


def test_a_driver_that_starts_its_own_ray_protects_it_unasked(tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with subprocess.Popen(
        [sys.executable, "-c", OWN],
        env=env | {"HOME": str(tmp_path), "PYTHONPATH": str(REPO)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as driver:
        try:
            gcs, session = driver.stdout.readline().split()
            time.sleep(3)  # its agents
            found = listening(processes_naming(f"{Path(session).name}/"))
            answers = {port: refusal(reach(port, address), None) for port, address in found.items()}
            [token] = tmp_path.glob(".ray/auth_token")
            assert token.stat().st_mode & 0o777 == 0o600
            assert int(gcs.rpartition(":")[2]) in answers
            assert set(answers.values()) <= REFUSALS, answers
        finally:
            driver.stdin.close()
            driver.wait(60)


def test_mlflow_listens_on_this_machine_alone(tmp_path):
    """`pipelines/ui.py`, and it answers no other name than this machine's."""
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(REPO / "pipelines" / "ui.py"), str(tmp_path), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 90
        while http_answer(f"http://127.0.0.1:{port}/health", None) != 200:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.3)
        group = {
            int(f.name) for f in Path("/proc").glob("[0-9]*") if _group(int(f.name)) == server.pid
        }
        assert listening(group) == {port: "127.0.0.1"}
        foreign = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1",
            headers={"Host": "evil.example"},
        )
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(foreign, timeout=10)
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def test_no_client_joins_without_the_token(clients):
    for client in clients:
        out, err = client.communicate(timeout=120)
        assert client.returncode != 0
        assert "JOINED" not in out
        assert "oken" in err  # it says so


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None
