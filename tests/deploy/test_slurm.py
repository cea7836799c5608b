"""deploy/slurm/espalier.sbatch: with stand-ins for Slurm and Ray, and with a real Ray."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import machines as helper
from tests.helpers import slurm, small_run
from tests.helpers.machines import Machines
from tests.helpers.wait import wait_until

REPO = Path(__file__).resolve().parents[2]
FILE = REPO / "deploy" / "slurm" / "espalier.sbatch"
# Starts the command on this machine, as srun does on others.
SRUN = """#!/bin/bash
options=()
while [[ "$1" == -* ]]; do options+=("$1"); shift; done
echo "${options[*]}" >> "$SLURM_SUBMIT_DIR/srun"
exec "$@"
"""
SCONTROL = '#!/bin/sh\necho "$*" >> "$SLURM_SUBMIT_DIR/scontrol"\n'
# The state of the job: COMPLETING after `scancel`.
SQUEUE = '#!/bin/sh\necho "${JOB_STATE:-RUNNING}"\n'
RAY = """#!/bin/sh
stat -c %a "$RAY_AUTH_TOKEN_PATH" > "$SLURM_SUBMIT_DIR/mode"
cp "$RAY_AUTH_TOKEN_PATH" "$SLURM_SUBMIT_DIR/token"
echo "$RAY_AUTH_MODE $*" >> "$SLURM_SUBMIT_DIR/ray"
exec sleep 60
"""


def write(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


@pytest.fixture
def share(tmp_path) -> Path:
    """The folder of a submission, with stand-ins for Slurm."""
    write(tmp_path / "slurm" / "srun", SRUN)
    write(tmp_path / "slurm" / "scontrol", SCONTROL)
    write(tmp_path / "slurm" / "squeue", SQUEUE)
    return tmp_path


@pytest.fixture
def stand_ins(share) -> Path:
    """The same, with stand-ins for Ray and for the wait until it has all nodes."""
    write(share / ".venv" / "bin" / "ray", RAY)
    write(
        share / ".venv" / "bin" / "python",
        '#!/bin/sh\ntest -z "$NODES_WAIT" || { touch began; exec sleep 60; }\n'
        "exit ${NODES_MISSING:-0}\n",
    )
    return share


def begin_environment(share: Path, node: str, job: int = 7, **more: str) -> dict[str, str]:
    """Return the environment of the script of a job of two nodes."""
    return {
        "PATH": f"{share / 'slurm'}:/usr/sbin:/usr/bin:/bin",
        "HOME": str(share),
        "SLURM_JOB_ID": str(job),
        "SLURM_NNODES": "2",
        "SLURMD_NODENAME": node,
        "SLURM_SUBMIT_DIR": str(share),
        "SLURM_CPUS_PER_TASK": "1",
        **more,
    }


def begin(share: Path, *command: str, **environment: str) -> subprocess.Popen:
    """Start the script as Slurm does on the first node of a job."""
    return subprocess.Popen(
        ["/bin/bash", FILE, *command],
        cwd=share,
        env=begin_environment(share, "n1", **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def test_every_node_starts_ray_with_the_token_of_the_job(stand_ins):
    from ray.scripts.scripts import start

    until = 'until [ "$(wc -l < ray)" = 2 ]; do sleep 0.1; done; env > driver'
    process = begin(stand_ins, "bash", "-c", until, SLURM_GPUS_ON_NODE="8")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert sorted(lines(stand_ins / "srun")) == [
        "--nodes=1 --ntasks=1 --exclude=n1",
        "--nodes=1 --ntasks=1 --nodelist=n1",
    ]
    calls = {"--head" in line: line.split() for line in lines(stand_ins / "ray")}
    head = start.make_context("start", calls[True][2:]).params
    worker = start.make_context("start", calls[False][2:]).params
    assert {calls[True][0], calls[False][0]} == {"token"}
    assert head["include_dashboard"] is False
    assert worker["address"] == f"{head['node_ip_address']}:{head['port']}"
    for node in (head, worker):
        assert (node["num_cpus"], node["num_gpus"], node["block"]) == (1, 8, True)
    driver = dict(line.split("=", 1) for line in lines(stand_ins / "driver") if "=" in line)
    assert driver["RAY_ADDRESS"] == worker["address"]
    assert re.fullmatch(r"[0-9a-f]{64}", (stand_ins / "token").read_text())
    assert lines(stand_ins / "mode") == ["600"]
    assert not Path(driver["RAY_AUTH_TOKEN_PATH"]).exists(), "the token outlives the job"
    assert "RAY_AUTH_TOKEN" not in driver


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [(0, "0", False), (1, "0", False), (2, "0", False), (75, "0", True), (75, "10", False)],
)
def test_job_is_requeued_after_status_75_only(stand_ins, status, restarts, requeued):
    process = begin(stand_ins, "bash", "-c", f"exit {status}", SLURM_RESTART_COUNT=restarts)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status, out
    assert lines(stand_ins / "scontrol") == ["requeue 7"] * requeued


@pytest.mark.parametrize(
    ("number", "state", "requeued"),
    [
        (signal.SIGTERM, "RUNNING", True),
        (signal.SIGTERM, "COMPLETING", False),  # scancel
        (signal.SIGUSR1, "RUNNING", False),
    ],
)
@pytest.mark.parametrize("begun", [True, False], ids=["command", "before the command"])
def test_signal_ends_the_job_with_time_to_save(stand_ins, number, state, requeued, begun):
    waits = (
        "trap 'sleep 0.5; echo > saved; exit 75' TERM; echo > began; while :; do sleep 0.1; done"
    )
    environment = {"JOB_STATE": state} | ({} if begun else {"NODES_WAIT": "yes"})
    process = begin(stand_ins, "bash", "-c", waits, **environment)
    wait_until((stand_ins / "began").exists, process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 75, out
    assert (stand_ins / "saved").exists() == begun
    assert lines(stand_ins / "scontrol") == ["requeue 7"] * requeued


def test_node_that_does_not_join_ends_the_job_before_the_command(stand_ins):
    process = begin(stand_ins, "touch", "began", NODES_MISSING="1")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Ray did not start on all nodes" in out
    assert not (stand_ins / "began").exists()
    assert list(stand_ins.glob(".ray-token*")) == []


def test_slurm_signals_the_script_before_the_time_ends():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", FILE.read_text(), re.MULTILINE))
    assert "requeue" in options
    # All memory of the nodes: `exclusive` takes the CPUs only.
    assert "exclusive" in options and options["mem"] == "0"
    seconds = int(re.fullmatch(r"B:TERM@(\d+)", options["signal"])[1])
    notice = re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", FILE.read_text())[1]
    assert int(notice) < seconds


def test_git_and_uploads_leave_out_the_token_and_the_log():
    """Else each run has the tag of changed code, and `git add .` takes the token."""
    token = re.search(r'secrets="\$PWD/(\S+)\$SLURM_JOB_ID"', FILE.read_text())[1]
    log = re.search(r"--output=(\S+)", FILE.read_text())[1]
    names = [f"{token}7", log.replace("%x", "espalier").replace("%j", "7")]
    done = subprocess.run(["git", "check-ignore", *names], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.splitlines() == names


@pytest.fixture
def machines(tmp_path) -> Iterator[Machines]:
    """Two machines without Ray, with `slurm.py` as srun; `shared` is the folder of submissions."""
    reason = helper.reason_to_skip()
    if reason is not None:
        pytest.skip(f"machines: {reason}")
    found = Machines(tmp_path, cpus=[1, 1])
    del found.env["RAY_AUTH_TOKEN"]
    write(
        found.shared / "slurm" / "srun", f'#!/bin/sh\nexec {sys.executable} {slurm.__file__} "$@"\n'
    )
    write(found.shared / "slurm" / "scontrol", SCONTROL)
    write(found.shared / "slurm" / "squeue", SQUEUE)
    (found.shared / ".venv").symlink_to(Path(sys.executable).parents[1])
    try:
        for node in found.nodes:
            node.boot(found.switch)
        with slurm.server(found, found.shared / "srun-socket"):
            yield found
    finally:
        found.end()


def begin_there(machines: Machines, command: list[str], **environment: str) -> subprocess.Popen:
    """Start the script as Slurm does on the first of two machines."""
    there = begin_environment(machines.shared, machines.nodes[0].name, **environment)
    there |= {slurm.SOCKET: str(machines.shared / "srun-socket")}
    script = f"cd {machines.shared} && exec /bin/bash {FILE} {shlex.join(command)}"
    log = machines.base / "job.log"
    return machines.popen(0, ["/bin/sh", "-c", script], log, there)


@pytest.mark.slow
def test_run_on_two_machines_is_requeued_and_ends_with_the_bits_of_one(
    machines, tiny_corpus, tiny_dataset
):
    """Each machine offers one CPU, so it has one of the two ranks."""
    share, log = machines.shared, machines.base / "job.log"
    corpus = Path(shutil.copy(tiny_corpus, share))
    shutil.copytree(tiny_dataset, share / "tokens")
    words = [f"data.dir={share / 'tokens'}", "train.max_steps=200", "train.eval_interval=100"]
    command = small_run.command(share / "two", corpus, *words, "compute.num_workers=2")
    process = begin_there(machines, command)
    run_dir = share / "two" / "small"
    wait_until(lambda: small_run.logged(run_dir) >= 20, process)
    machines.signal_driver(process, signal.SIGTERM)
    assert process.wait(120) == 75, log.read_text()
    assert lines(share / "scontrol") == ["requeue 7"]
    process = begin_there(machines, command, SLURM_RESTART_COUNT="1")
    assert process.wait(240) == 0, log.read_text()
    assert small_run.run_here(share / "one", corpus, *words) == 0
    assert small_run.curve(run_dir) == small_run.curve(share / "one" / "small")
    assert (
        small_run.summary(run_dir)["weights_sha256"]
        == small_run.summary(share / "one" / "small")["weights_sha256"]
    )
