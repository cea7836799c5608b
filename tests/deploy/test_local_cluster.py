"""deploy/local-cluster.yaml: beside cluster.yaml, and for real by ssh on three machines."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.helpers import machines as helper
from tests.helpers.wait import wait_until
from tests.test_cluster_yaml import SCHEMA, strict

REPO = Path(__file__).resolve().parents[2]
FILE = REPO / "deploy" / "local-cluster.yaml"
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def config(file: Path = FILE) -> dict:
    return yaml.safe_load(file.read_text("utf-8"))


# ---- without machines ----


def test_ray_accepts_the_file_and_knows_every_key():
    prepared = prepare_config(config())
    validate_config(prepared)
    assert "0.0.0.0" not in json.dumps(prepared)
    jsonschema.validate(config(), strict(SCHEMA))


def test_commands_are_those_of_the_cluster_on_aws():
    """Which is tested against the programs. Here, Ray counts the CPUs, so the head is told 0."""
    here, aws = config(), config(REPO / "cluster.yaml")
    assert here["file_mounts"] == aws["file_mounts"]
    assert here["worker_start_ray_commands"] == aws["worker_start_ray_commands"]
    start = here["head_start_ray_commands"]
    assert "--num-cpus=0 --num-gpus=0 " in start[-1]
    start[-1] = start[-1].replace("--num-cpus=0 --num-gpus=0 ", "")
    assert start == aws["head_start_ray_commands"]
    exported = [
        dict(re.findall(r"export (\w+)=(\S+)", text["setup_commands"][0])) for text in (here, aws)
    ]
    del exported[1]["ESPALIER_AUTOSCALING"]
    assert exported[0].pop("ESPALIER_STORAGE") == "CHANGE-ME"
    del exported[1]["ESPALIER_STORAGE"]
    assert exported[0] == exported[1]
    install = [text["setup_commands"][-1] for text in (here, aws)]
    assert install[1].split(" && ")[1:] == install[0].split(" && ")[1:4]


# ---- with machines ----

SSHD = """Port 22
HostKey {base}/host_key
AuthorizedKeysFile {base}/key.pub
StrictModes no
UsePAM no
PidFile none
"""
# A home directory of its own, with an environment as the setup would install it.
HOME = """set -e
mkdir -p {home}/espalier-venv {home}/.ray
for name in bin lib lib64 pyvenv.cfg; do ln -s {prefix}/$name {home}/espalier-venv/; done
cp {repo}/constraints.txt {home}/espalier-venv/
{binds}
mount --rbind {home} /root
ip route add default dev eth0
mount -t tmpfs own /run
mkdir -p /run/sshd
exec /usr/sbin/sshd -D -e -f {base}/sshd_config
"""


def _binds(home: Path) -> str:
    """Return commands that keep what Python needs of /root, which `home` hides."""
    lines = []
    for place in helper.NEEDED:
        if place.is_relative_to("/root"):
            target = home / place.relative_to("/root")
            lines.append(f"mkdir -p {target} && mount --rbind {place} {target}")
    return "\n".join(lines)


@pytest.fixture
def three(tmp_path):
    """Three machines with sshd: of the user, the head and a worker."""
    reason = helper.reason_to_skip()
    if reason is None and not (
        os.path.exists("/usr/sbin/sshd") and os.path.exists("/usr/bin/rsync")
    ):
        reason = "needs sshd (openssh-server) and rsync"
    if reason is not None:
        pytest.skip(f"machines: {reason}")
    found = helper.Machines(tmp_path, (0, 0, 0))
    for key in ("key", "host_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True
        )
    (tmp_path / "sshd_config").write_text(SSHD.format(base=tmp_path))
    found.env = {"PATH": found.env["PATH"], "HOME": "/root", "LANG": "C.UTF-8"}
    try:
        for number, machine in enumerate(found.nodes):
            machine.boot(found.switch)
            script = HOME.format(
                base=tmp_path,
                home=machine.folder / "home",
                prefix=Path(sys.executable).parents[1],
                repo=REPO,
                binds=_binds(machine.folder / "home"),
            )
            log = tmp_path / f"sshd{number}.log"
            process = found.popen(number, ["bash", "-c", script], log)
            wait_until(lambda log=log: "Server listening" in log.read_text(), process)
        yield found
    finally:
        found.end()


@pytest.mark.slow
def test_ray_up_starts_a_cluster_by_ssh_on_which_a_job_trains(three, tmp_path, tiny_corpus):
    changed = config()
    changed["provider"]["head_ip"] = three.nodes[1].address
    changed["provider"]["worker_ips"] = [three.nodes[2].address]
    changed["auth"] = {"ssh_user": "root", "ssh_private_key": str(tmp_path / "key")}
    changed["setup_commands"][0] = changed["setup_commands"][0].replace(
        "CHANGE-ME", str(three.shared)
    )
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(changed))
    assert "CHANGE-ME" not in file.read_text()
    token = three.nodes[0].folder / "home" / ".ray" / "auth_token"
    token.write_text("f" * 64)
    token.chmod(0o600)

    up = three.popen(
        0,
        [*RAY, "up", str(file), "--yes", "--no-config-cache"],
        tmp_path / "up.log",
        {"RAY_UP_enable_autoscaler_v2": "0"},
    )
    assert up.wait(240) == 0, (tmp_path / "up.log").read_text()
    copies = [three.nodes[n].folder / "home" / ".ray" / "auth_token" for n in (1, 2)]
    wait_until(copies[1].exists)
    assert [copy.stat().st_mode & 0o777 for copy in copies] == [0o600, 0o600]

    corpus = three.shared / "corpus.txt"
    corpus.write_text(tiny_corpus.read_text())
    job = "pipelines/train.py tests/helpers/small.yaml name=small data.tokenizer=char"
    job += f" data.corpus={corpus} train.max_steps=20 schedule.warmup_steps=5 compute.num_workers=1"
    environment = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265", "RAY_AUTH_MODE": "token"}
    words = [*RAY, "job", "submit", "--working-dir", ".", "--", *job.split()]
    # The worker joins when the head has started it by ssh; a job that is earlier is refused.
    wait_until(lambda: "node2" in nodes(three), pause_s=2)
    submitted = three.popen(1, words, tmp_path / "job.log", environment)
    assert submitted.wait(240) == 0, (tmp_path / "job.log").read_text()
    summary = json.loads((three.shared / "small" / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("FINISHED", 20)
    assert (three.shared / "mlflow" / "mlflow.db").exists()


def nodes(three) -> str:
    """Return the host names of the nodes of Ray, as the head sees them."""
    ask = (
        "import ray; ray.init(address='auto', logging_level='ERROR', log_to_driver=False); "
        "print([node['NodeManagerHostname'] for node in ray.nodes() if node['Alive']])"
    )
    command = ["env", "RAY_AUTH_MODE=token", sys.executable, "-c", ask]
    return three.run(1, command)
