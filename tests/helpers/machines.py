"""Several machines on this one: each has its own network, files, processes and host name.

A machine is a tree of processes in namespaces of its own. Its first process is killed to lose the
machine: the kernel then ends all others. The machines are connected by a bridge, which is in a
namespace of its own, so that nothing of the real network changes. All end with the test, also if
it is killed. It needs root and `ip` of Debian's iproute2.
"""

import contextlib
import ctypes
import functools
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.helpers import bucket
from tests.helpers.wait import wait_until

REPO = Path(__file__).resolve().parent.parent.parent
NETWORK = "10.77.0"
PORT = 6379
STORE_PORT = 9000  # of moto's server on the head, for tests that start it
NAMESPACES = ("--net", "--mount", "--pid", "--uts")
STORE_BYTES = 100_000_000
# What processes of a machine need of this one, if it is below a folder that each has for itself.
NEEDED = (REPO, Path(sys.prefix), Path(sys.base_prefix))
PRIVATE = ("/tmp", "/dev/shm")
SLOW_RUN = [  # fields of a run that lasts long enough for a fault
    "model.kind=tests/machines/slow.py:Slow",
    "data.tokenizer=char",
    "train.dtype=float32",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.eval_interval=null",
    "train.checkpoint_interval=5",
    "compute.cpus_per_worker=1",
]
RAY = {  # as cluster.yaml sets it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
}
PR_SET_PDEATHSIG = 1
DRAIN = """
import ray
from ray._raylet import GcsClient
ray.init(log_to_driver=False)
[node] = [n["NodeID"] for n in ray.nodes() if n["NodeManagerAddress"] == "{address}" and n["Alive"]]
GcsClient(address=ray.get_runtime_context().gcs_address).drain_node(node, 2, "spot", {deadline})
"""
# What a machine and the bridge need.
PROBE = """set -e
hostname probe
mount -t tmpfs probe /mnt
ip link add bridge type bridge
ip link add port type veth peer name eth0
ip link set port master bridge up
"""
# The loopback name of a machine, as Debian writes it.
HOSTS = "127.0.0.1 localhost\n127.0.1.1 {name}\n"


def reason_to_skip() -> str | None:
    """Return why machines cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "needs root for namespaces"
    if not shutil.which("ip") or not shutil.which("unshare") or not shutil.which("nsenter"):
        return "needs ip (iproute2), unshare and nsenter"
    command = ["unshare", *NAMESPACES, "--fork", "--mount-proc", "sh", "-c", PROBE]
    probe = subprocess.run(command, capture_output=True, text=True)
    said = probe.stderr.strip() or f"status {probe.returncode}"
    return None if probe.returncode == 0 else f"this system does not permit them: {said}"


class Machine:
    """One machine: its processes end with `kill`.

    Attributes:
        name: Host name, `node0` for the head.
        address: Address in the network of the machines.
        private: A folder that only this machine has at this path; also `folder` from outside.
    """

    def __init__(self, base: Path, number: int) -> None:
        self.base = base
        self.number = number
        self.name = f"node{number}"
        self.address = f"{NETWORK}.{10 + number}"
        self.folder = base / self.name
        self.folder.mkdir()
        (self.folder / "hosts").write_text(HOSTS.format(name=self.name))
        self.holder: subprocess.Popen | None = None

    def boot(self, switch: "Switch") -> None:
        """Start the machine without Ray, connected to the bridge."""
        self.holder = _hold(self._mounts(), self.base / f"{self.name}.log")
        switch.connect(self)

    def _mounts(self) -> str:
        """Return the commands of the shell of the first process, which then waits for ever."""
        kept = [self.base, *(path for path in NEEDED if _is_private(path))]
        lines = [f"hostname {self.name}", f"mount --bind {self.folder}/hosts /etc/hosts"]
        # A folder of this machine stays visible below a new /tmp.
        lines += ["mount -t tmpfs kept /mnt"]
        for number, path in enumerate(kept):
            lines += [f"mkdir /mnt/{number}", f"mount --rbind {path} /mnt/{number}"]
        lines += [f"mount -t tmpfs own {path}" for path in PRIVATE]
        for number, path in enumerate(kept):
            lines += [f"mkdir -p {path}", f"mount --rbind /mnt/{number} {path}"]
        lines += [f"mount --bind {self.folder} {self.base}/private", "umount -l /mnt"]
        return "\n".join(lines)

    def enter(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on this machine."""
        assert self.holder is not None
        inner = _child(self.holder)
        # `--wd` would be resolved before the namespace is entered.
        here = ["sh", "-c", f"cd {shlex.quote(str(REPO))} && exec {shlex.join(command)}"]
        return ["nsenter", "--target", str(inner), "-n", "-m", "-p", "-u", *here]

    def processes(self) -> list[int]:
        """Return the ids of its processes, as they are seen from outside."""
        assert self.holder is not None
        own = os.readlink(f"/proc/{_child(self.holder)}/ns/pid")
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError):  # it has ended
                if os.readlink(f"/proc/{pid}/ns/pid") == own:
                    found.append(pid)
        return found

    def kill(self) -> None:
        """End all processes of the machine with SIGKILL, as if it had lost its power."""
        if self.holder is not None:
            _end(self.holder)
            self.holder = None


class Switch:
    """The bridge that connects the machines."""

    def __init__(self, base: Path) -> None:
        lines = ["ip link add bridge type bridge", "ip link set bridge up", "ip link set lo up"]
        self.holder = _hold("\n".join(lines), base / "switch.log")

    def connect(self, machine: Machine) -> None:
        """Give the machine its network device."""
        assert machine.holder is not None
        other = _child(machine.holder)
        port = f"port{machine.number}"
        with contextlib.suppress(subprocess.CalledProcessError):  # of a machine that was killed
            self._ip("link", "delete", port)
        # A machine that boots again has the same address of its card, which others remember.
        card = ["name", "eth0", "address", f"02:00:00:00:00:{machine.number:02x}"]
        self._ip("link", "add", port, "type", "veth", "peer", *card, "netns", str(other))
        self._ip("link", "set", port, "master", "bridge", "up")
        for words in (
            "link set lo up",
            f"address add {machine.address}/24 dev eth0",
            "link set eth0 up",
        ):
            _run(["nsenter", "--target", str(other), "-n", "ip", *words.split()])

    def set_port(self, machine: Machine, state: str) -> None:
        """Cut the machine off (`down`), or connect it again (`up`)."""
        self._ip("link", "set", f"port{machine.number}", state)

    def lose(self, machine: Machine, share: float, ways: Sequence[str]) -> None:
        """Drop packets at random: "ingress" are those of the machine, "egress" those to it.

        Many kernels have no `netem`. A filter of four instructions (BPF) needs no module.
        """
        port = ("dev", f"port{machine.number}")
        self._run("tc", "qdisc", "add", *port, "clsact")
        # Load a random number, compare it, return TC_ACT_SHOT or TC_ACT_OK.
        code = f"4,32 0 0 4294963256,37 0 1 {int(share * (2**32 - 1))},6 0 0 0,6 0 0 2"
        for way in ways:
            self._run("tc", "filter", "add", *port, way, "bpf", "da", "bytecode", code)

    def lose_nothing(self, machine: Machine) -> None:
        """End what `lose` began."""
        self._run("tc", "qdisc", "del", "dev", f"port{machine.number}", "clsact")

    def _ip(self, *words: str) -> None:
        self._run("ip", *words)

    def _run(self, *words: str) -> None:
        _run(["nsenter", "--target", str(_child(self.holder)), "-n", *words])


class Machines:
    """A Ray cluster with a token: machine 0 is its head and has no CPUs.

    Attributes:
        shared: A folder that all machines share, at the same path here.
        private: A folder at the same path on each machine, which is another one on each.
        env: Environment of all commands on the machines.
        own_env: More of the environment of a machine, by its number.
        head_words: More options of `ray start` on the head.
    """

    def __init__(self, base: Path, cpus: Sequence[int]) -> None:
        self.base = base
        self.cpus = list(cpus)
        self.shared = base / "shared"
        self.private = base / "private"
        for folder in (self.shared, self.private):
            folder.mkdir()
        self.switch = Switch(base)
        self.nodes = [Machine(base, number) for number in range(len(cpus))]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        kept = ("TIKTOKEN_CACHE_DIR", "ESPALIER_TEST_DATA", "LANG")
        self.env = {key: os.environ[key] for key in kept if key in os.environ}
        self.env |= RAY | {
            "PATH": path,
            "HOME": "/tmp",
            "XDG_CACHE_HOME": "/tmp/cache",
            "PYTHONPATH": str(REPO),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "ESPALIER_STORAGE": str(self.shared),
            "PAUSE_S": "0.05",  # of tests/machines/slow.py
            "PAUSE_LONGER_FILE": str(self.shared / "longer"),
        }
        self.env |= bucket.environment(f"http://{self.nodes[0].address}:{STORE_PORT}")
        self.own_env: dict[int, dict[str, str]] = {}
        self.head_words: list[str] = []
        self.drivers: list[subprocess.Popen] = []
        self.changed: set[int] = set()  # machines that were killed, cut off or are unlike others
        self.lost_head = False  # used by campaigns
        self.head = {"RAY_ADDRESS": f"{self.nodes[0].address}:{PORT}"}

    def start(self, *nodes: int) -> None:
        """Boot machines and start Ray on them."""
        begun = [self._begin(node) for node in nodes]
        self.changed.difference_update(nodes)
        for process, log in begun:
            wait_until(lambda log=log: "Ray runtime started." in log.read_text(), process)

    def _begin(self, node: int) -> tuple[subprocess.Popen, Path]:
        machine = self.nodes[node]
        machine.boot(self.switch)
        command = [
            *_ray("start"),
            "--block",
            "--disable-usage-stats",
            "--include-log-monitor=false",
        ]
        command += [f"--node-ip-address={machine.address}", f"--num-cpus={self.cpus[node]}"]
        command += [f"--object-store-memory={STORE_BYTES}"]
        if node == 0:
            command += ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1"]
            command += self.head_words
        else:
            command += [f"--address={self.nodes[0].address}:{PORT}"]
        log = self.base / f"{machine.name}-ray.log"
        return self.popen(node, command, log), log

    def kill(self, node: int) -> None:
        """Lose a machine."""
        self.changed.add(node)
        self.nodes[node].kill()

    def cut(self, node: int) -> None:
        """Cut a machine off from the network."""
        self.changed.add(node)
        self.switch.set_port(self.nodes[node], "down")

    def mend(self, node: int) -> None:
        """Connect a machine again."""
        self.switch.set_port(self.nodes[node], "up")

    def lose(self, node: int, share: float, ways: Sequence[str] = ("ingress", "egress")) -> None:
        """Drop a share of the packets of a machine (`Switch.lose`)."""
        self.switch.lose(self.nodes[node], share, ways)

    def start_again(self, *nodes: int) -> None:
        """Start machines that were killed or cut off. A new head comes first."""
        for node in nodes:
            self.nodes[node].kill()
        for together in ([node for node in nodes if node == 0], [node for node in nodes if node]):
            self.start(*together)

    def restore(self, keep_drivers: bool = False) -> None:
        """End the drivers, and start the machines again that were killed, cut off or changed."""
        for driver in [] if keep_drivers else self.drivers:
            driver.kill()
        self.start_again(*sorted(self.changed))

    def drain(self, node: int) -> None:
        """Let Ray drain a machine, as an autoscaler does."""
        self.changed.add(node)
        script = DRAIN.format(
            address=self.nodes[node].address, deadline=int(time.time() + 600) * 1000
        )
        self.run(0, [sys.executable, "-c", script], self.head)

    def signal_driver(self, driver: subprocess.Popen, number: int) -> None:
        """Send a signal to a command that `drive` started."""
        inside = psutil.Process(driver.pid).children(recursive=True)
        os.kill(min(inside, key=lambda one: one.pid).pid, number)

    def drive(self, command: Sequence[str], log: Path, node: int = 0) -> subprocess.Popen:
        """Start a command of the project on the head, as `python COMMAND…`; it joins the cluster.

        The log gets its output.
        """
        process = self.popen(node, [sys.executable, "-u", *command], log, self.head)
        self.drivers.append(process)
        return process

    def submit(
        self, command: Sequence[str], log: Path, job: str, options: Sequence[str] = ()
    ) -> subprocess.Popen:
        """Submit a job with this id on the head. The log gets what `ray job submit` prints."""
        words = ["submit", "--submission-id", job, *options, "--", sys.executable, "-u", *command]
        process = self.popen(0, [*_ray("job"), *words], log, _job_server())
        self.drivers.append(process)
        return process

    def stop(self, job: str) -> None:
        """Call `ray job stop` for a job."""
        command = self.nodes[0].enter([*_ray("job"), "stop", job])
        subprocess.run(command, env=self.env | _job_server(), check=True, capture_output=True)

    def run(self, node: int, command: Sequence[str], more: dict[str, str] | None = None) -> str:
        """Run a command on a machine; return its output."""
        return _run(self.nodes[node].enter(command), self._env_of(node) | (more or {}))

    def _env_of(self, node: int) -> dict[str, str]:
        return self.env | self.own_env.get(node, {})

    def end(self) -> None:
        """End all machines and the bridge."""
        for driver in self.drivers:
            driver.kill()
        for machine in self.nodes:
            machine.kill()
        _end(self.switch.holder)
        for driver in self.drivers:
            driver.wait()

    def popen(
        self, node: int, command: Sequence[str], log: Path, more: dict[str, str] | None = None
    ) -> subprocess.Popen:
        """Start a command on a machine. It ends with the tests."""
        with log.open("w") as out:
            return subprocess.Popen(
                self.nodes[node].enter(command),
                env=self._env_of(node) | (more or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,
            )


@contextlib.contextmanager
def machines(base: Path, cpus: Sequence[int]) -> Iterator[Machines]:
    """Start a cluster; the first machine is the head. Skip the test where this is not possible.

    Args:
        base: An empty folder.
        cpus: CPUs that Ray uses on each machine; 0 for the head.
    """
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(f"machines: {reason}")
    found = Machines(base, cpus)
    try:
        found.start(0)
        found.start(*range(1, len(cpus)))
        yield found
    finally:
        found.end()


def _ray(command: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", command]


def _job_server() -> dict[str, str]:
    return {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}


def _hold(setup: str, log: Path) -> subprocess.Popen:
    """Start a process in new namespaces that runs `setup` in a shell and then waits.

    The first process in the namespaces is its child, which ends with it. As on a real machine, it
    takes the exit status of orphans: `ray job stop` would wait for their process ids.
    """
    script = f"set -e\n{setup}\necho ready\nsleep infinity &\nwait"
    with log.open("w") as out:
        command = ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
        holder = subprocess.Popen(
            [*command, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent,
        )
    try:
        wait_until(lambda: "ready\n" in log.read_text(), holder)
    except AssertionError:
        holder.kill()
        pytest.fail(f"no namespaces: {log.read_text()}")
    return holder


def _child(holder: subprocess.Popen) -> int:
    pids = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
    if not pids:
        raise ProcessLookupError
    return int(pids[0])


def _end(holder: subprocess.Popen) -> None:
    with contextlib.suppress(OSError):  # it has ended already
        os.kill(_child(holder), signal.SIGKILL)
    holder.kill()
    holder.wait()


def _is_private(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in PRIVATE)


def _run(command: Sequence[str], env: dict[str, str] | None = None) -> str:
    return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Let the kernel kill this process when the tests end."""
    _libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
