"""A small run with twenty secrets in its environment: none is stored or printed, nothing is sent.

Training, which prepares the data, and sampling run once. They run in a network namespace whose only
way out is an interface that counts what is sent.
"""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.config.yaml_text import read_yaml

REPO = Path(__file__).resolve().parent.parent.parent
VARIABLES = [
    "CORPUS_USER",
    "CORPUS_PASSWORD",
    "CORPUS_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
    "GITHUB_TOKEN",
    "GITLAB_PRIVATE_TOKEN",
    "OPENAI_API_KEY",
    "DATABASE_PASSWORD",
    "AZURE_CLIENT_SECRET",
    "GOOGLE_APPLICATION_CREDENTIALS_KEY",
    "SSH_PASSPHRASE",
    "DOCKER_PASSWORD",
    "NPM_TOKEN",
]
PLACES = ["git remote"]
SECRETS = {
    name: hashlib.sha256(f"secret of {name}".encode()).hexdigest()[:40]
    for name in [*VARIABLES, *PLACES]
}
SMALL = [
    "data.tokenizer=byte",
    "data.val_fraction=0.2",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=2",
    "train.max_steps=5",
    "train.log_interval=1",
    "train.eval_interval=5",
    "train.eval_tokens=64",
    "train.checkpoint_interval=2",
    "schedule.warmup_steps=0",
    "compute.use_gpu=false",
    "compute.cpus_per_worker=1",
]
# The namespace has loopback and an interface with the default route, which counts what is sent; its
# other end leads nowhere. IPv6 is off, because it sends announcements. Names are looked up at an
# address outside. Only this machine's own name is known: torch looks up the name of rank 0's
# address (as IPv4 in IPv6), and no setting prevents that.
OUTSIDE = """\
set -e
mount --bind {folder}/resolv.conf /etc/resolv.conf
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6
ip link add out0 type veth peer name nowhere0
ip address add 198.51.100.2/24 dev out0
ip link set out0 up
ip link set nowhere0 up
ip route add default via 198.51.100.1
ip neighbour add 198.51.100.1 lladdr 02:00:00:00:00:01 dev out0
ip neighbour add 198.51.100.53 lladdr 02:00:00:00:00:02 dev out0
"""
COMMANDS = """\
cd {checkout}
{python} pipelines/train.py {base}/secret.yaml {overrides}
{python} pipelines/sample.py {base}/storage/small --prompt 1 --max-new-tokens 5 --device cpu
"""
COUNTS = """\
{count} > {out}/sent
{python} -c "{connect}"
{count} > {out}/sent-after-a-connection
{python} -c "{look_up}"
{count} > {out}/sent-after-a-name
"""
COUNT = "awk '/out0:/ {print $11}' /proc/net/dev"
CONNECT = """import socket
socket.setdefaulttimeout(1)
try: socket.create_connection(('{0}', 443))
except OSError: pass"""


def why_no_namespace() -> str | None:
    """Return why no network namespace can be created; None if it can."""
    if os.geteuid():
        return "needs root"
    if not (shutil.which("unshare") and shutil.which("ip")):
        return "needs unshare and ip (util-linux, iproute2)"
    interface = "ip link add out0 type veth peer name nowhere0"
    words = ["unshare", "--net", "--mount", "sh", "-c", interface]
    done = subprocess.run(words, capture_output=True, text=True)
    return None if done.returncode == 0 else f"no network namespace here: {done.stderr.strip()}"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Run the commands from a copy of the repository. Return what they stored and printed."""
    base = tmp_path_factory.mktemp("run")
    for name in ("home", "cache/espalier", "out"):
        (base / name).mkdir(parents=True)
    checkout = base / "checkout"
    for folder in ("model", "orchestrator", "pipelines", "configs"):
        shutil.copytree(
            REPO / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    remote = f"https://me:{SECRETS['git remote']}@example.invalid/a.git"
    for words in (
        ["init", "-q"],
        ["remote", "add", "origin", remote],
        ["add", "."],
        ["commit", "-q", "-m", "a copy"],
    ):
        subprocess.run(
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *words],
            cwd=checkout,
            check=True,
        )
    text = "".join(f"{n} times seven is {7 * n}.\n" for n in range(500)).encode()
    sha256 = hashlib.sha256(text).hexdigest()
    # In the cache, so that nothing has to be downloaded.
    (base / "cache" / "espalier" / f"{sha256[:16]}-input.txt").write_bytes(text)
    corpus = (
        "https://$CORPUS_USER:$CORPUS_PASSWORD@example.invalid/input.txt?token=$CORPUS_TOKEN&v=1"
        f"#sha256={sha256}"
    )
    (base / "secret.yaml").write_text(f"name: small\ndata:\n  corpus: '{corpus}'\n")
    (base / "resolv.conf").write_text("nameserver 198.51.100.53\noptions timeout:1 attempts:1\n")
    host = socket.gethostname()
    (base / "hosts").write_text(
        f"127.0.0.1 localhost\n198.51.100.2 {host}\n::ffff:198.51.100.2 {host}\n"
    )
    script = base / "run.sh"
    why = why_no_namespace()
    commands = COMMANDS.format(
        checkout=checkout, base=base, python=sys.executable, overrides=" ".join(SMALL)
    )
    if why is None:
        counts = COUNTS.format(
            count=COUNT,
            out=base / "out",
            python=sys.executable,
            connect=CONNECT.format("203.0.113.7"),
            look_up=CONNECT.format("example.org"),
        )
        script.write_text(OUTSIDE.format(folder=base) + commands + counts)
    else:
        script.write_text("set -e\n" + commands)
    removed = ("RAY_", "ESPALIER_", "MLFLOW_", "TIKTOKEN")
    env = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
    env = (
        env
        | {name: SECRETS[name] for name in VARIABLES}
        | {
            "HOME": str(base / "home"),
            "XDG_CACHE_HOME": str(base / "cache"),
            "ESPALIER_STORAGE": str(base / "storage"),
            "RAY_TMPDIR": f"/tmp/es{os.getpid()}",
            "RAY_AUTH_MODE": "token",
            "PYTHONPATH": str(checkout),
            "http_proxy": "",
            "https_proxy": "",
            "HTTP_PROXY": "",
            "HTTPS_PROXY": "",
            "ALL_PROXY": "",
        }
    )
    os.makedirs(env["RAY_TMPDIR"])
    try:
        words = ["sh", str(script)] if why else ["unshare", "--net", "--mount", "sh", str(script)]
        done = subprocess.run(words, env=env, text=True, capture_output=True, timeout=240)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        yield SimpleNamespace(
            base=base,
            storage=base / "storage",
            printed=done.stdout + done.stderr,
            why=why,
            ray=Path(env["RAY_TMPDIR"]),
            corpus=corpus,
        )
    finally:
        shutil.rmtree(env["RAY_TMPDIR"], ignore_errors=True)


def found_in(folder: Path) -> dict[str, list[str]]:
    """Return {name of a secret: files that have it in their content or path}."""
    found: dict[str, list[str]] = {}
    for file in folder.rglob("*"):
        data = str(file).encode() + (file.read_bytes() if file.is_file() else b"")
        for name, value in SECRETS.items():
            if value.encode() in data:
                found.setdefault(name, []).append(str(file.relative_to(folder)))
    return found


def test_run_wrote_everything_that_is_searched(ran):
    assert len(SECRETS) >= 20
    assert (ran.storage / "small" / "summary.json").is_file()
    assert (ran.storage / "mlflow" / "mlflow.db").stat().st_size > 100_000
    assert list(ran.storage.glob("data/*/manifest.json"))
    assert list(ran.ray.rglob("raylet.out"))


def test_no_secret_is_written_to_the_storage_or_mlflow(ran):
    assert found_in(ran.storage) == {}
    stored = read_yaml((ran.storage / "small" / "experiment.yaml").read_text(), "experiment.yaml")
    assert stored["data"]["corpus"] == ran.corpus


def test_no_secret_is_printed(ran):
    assert [name for name, value in SECRETS.items() if value in ran.printed] == []


def test_ray_writes_no_secret_into_its_session(ran):
    assert found_in(ran.ray) == {}


def test_planted_secret_is_found(ran):
    place = ran.base / "planted"
    place.mkdir()
    (place / "log.txt").write_bytes(b"\xff" + SECRETS["HF_TOKEN"].encode() + b"\0")
    assert found_in(place) == {"HF_TOKEN": ["log.txt"]}


def test_nothing_is_sent_without_an_uplink(ran):
    if ran.why:
        pytest.skip(ran.why)
    sent, after_connection, after_name = (
        int((ran.base / "out" / name).read_text())
        for name in ("sent", "sent-after-a-connection", "sent-after-a-name")
    )
    assert sent == 0
    assert sent < after_connection < after_name, "the counter does not count"


def test_messages_about_an_address_do_not_have_its_secrets(ran, monkeypatch):
    from orchestrator.data import corpus
    from orchestrator.errors import UserError

    for name in ("CORPUS_USER", "CORPUS_PASSWORD", "CORPUS_TOKEN"):
        monkeypatch.setenv(name, SECRETS[name])
    for entry in (ran.corpus.partition("#")[0], ran.corpus[:-64] + "0" * 64):
        with pytest.raises(UserError) as caught:
            corpus.fetch(*corpus.resolve(entry), ran.base)
        assert not [name for name, value in SECRETS.items() if value in str(caught.value)]
