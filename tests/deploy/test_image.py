"""Builds deploy/Dockerfile and runs the image as KubeRay starts the pod of a head.

ESPALIER_TEST_BUILD='docker build' (or 'podman build', 'buildah bud') builds, which takes minutes;
ESPALIER_TEST_IMAGE=NAME takes an image that is there.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.deploy.test_kuberay import cluster_of

REPO = Path(__file__).resolve().parents[2]
COMMIT = "0123456789012345678901234567890123456789"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
# What is in the image.
LOOK = """
import importlib.metadata, json, os, pathlib, model, orchestrator, pipelines, psycopg
top = pathlib.Path("/opt/espalier")
files = [path for path in top.rglob("*") if path.is_file()]
print(json.dumps({
    "user": [os.getuid(), os.environ["HOME"], os.access(os.environ["HOME"], os.W_OK)],
    "commit": os.environ["ESPALIER_IMAGE_COMMIT"],
    "top": sorted(path.name for path in top.iterdir()),
    "imported": [str(pathlib.Path(p.__file__).parent) for p in (model, orchestrator, pipelines)],
    "unreadable": [str(path) for path in files if not os.access(path, os.R_OK)],
    "compiled": sum(path.suffix == ".pyc" for path in files)
    >= sum(path.suffix == ".py" for path in files),
    "versions": {d.name: d.version.split("+")[0] for d in importlib.metadata.distributions()},
}))
"""
# The start of a pod, KubeRay's probe, its containers that wait and scale, and the one that submits.
POD = """
export ESPALIER_STORAGE=/tmp/storage RAY_ADDRESS=127.0.0.1:6379
ray start --head {parameters} --block > /tmp/head.log 2>&1 &
get="import sys, urllib.request as r; sys.exit(b'success' not in r.urlopen(sys.argv[1]).read())"
ready() { python -c "$get" http://localhost:$1; }
until { ready 52365/api/healthz && ready 8265/api/gcs_healthz; } 2> /dev/null; do sleep 1; done
ray health-check --address 127.0.0.1:6379 && ray kuberay-autoscaler --help > /dev/null || exit 1
ray job submit --address http://127.0.0.1:8265 -- ESPALIER_GIT_COMMIT=$ESPALIER_IMAGE_COMMIT \
    /opt/espalier/pipelines/train.py /opt/espalier/configs/quickstart.yaml data.tokenizer=byte \
    model.n_layer=1 train.max_steps=4 train.eval_interval=2 || exit 1
grep --quiet "$ESPALIER_IMAGE_COMMIT" $ESPALIER_STORAGE/quickstart/*.json && echo recorded
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Return the command that runs the image, without network and rights."""
    name = os.environ.get("ESPALIER_TEST_IMAGE")
    build = shlex.split(os.environ.get("ESPALIER_TEST_BUILD", "podman" if name else ""))
    if not build:
        pytest.skip("the image: ESPALIER_TEST_BUILD is not set, such as 'docker build'")
    if name is None:
        name = "localhost/espalier-test"
        context = tmp_path_factory.mktemp("context")
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=REPO, stdout=subprocess.PIPE)
        # Only the owner can read these files, as in a checkout made with umask 077.
        untar = ["sh", "-c", "umask 077; tar --extract --no-same-permissions"]
        subprocess.run(untar, cwd=context, input=archive.stdout, check=True)
        words = ["--file=deploy/Dockerfile", f"--build-arg=COMMIT={COMMIT}", "--tag", name, "."]
        subprocess.run([*build, *words], cwd=context, check=True)
    run = ["docker" if Path(build[0]).name == "docker" else "podman", "run", "--rm"]
    rights = ["--network=none", "--cap-drop=all", "--security-opt=no-new-privileges"]
    return [*run, *rights, "--shm-size=2g", name]


def output(image, *command) -> str:
    done = subprocess.run([*image, *command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_image_has_the_code_once_for_a_user_without_rights(image):
    seen = json.loads(output(image, "python", "-c", LOOK))
    assert seen["user"] == [1000, "/home/espalier", True]
    assert seen["commit"] == COMMIT or "ESPALIER_TEST_IMAGE" in os.environ
    assert seen["imported"] == [
        f"/opt/espalier/{n}" for n in ("model", "orchestrator", "pipelines")
    ]
    assert set(seen["top"]) - {"espalier.egg-info"} == {
        *("LICENSE", "README.md", "constraints.txt", "pyproject.toml"),
        *("configs", "model", "orchestrator", "pipelines"),
    }
    assert seen["unreadable"] == []
    assert seen["compiled"]
    pinned = dict(
        x.split("==") for x in (REPO / "constraints.txt").read_text().split() if "==" in x
    )
    assert {n: v for n, v in seen["versions"].items() if pinned.get(n, v) != v} == {}


def test_head_of_kuberay_runs_a_job(image):
    parameters = dict(
        cluster_of("train.yaml")["headGroupSpec"]["rayStartParams"], **{"num-cpus": "1"}
    )
    words = " ".join(f"--{name}={value}" for name, value in parameters.items())
    script = f"export RAY_AUTH_TOKEN={'0123456789abcdef' * 4}\n" + POD.replace(
        "{parameters}", words
    )
    assert output(image, "bash", "-c", "--", script).endswith("recorded\n")
