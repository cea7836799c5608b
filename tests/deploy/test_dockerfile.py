"""Tests deploy/Dockerfile without a builder: rules, sources of files, list of dependencies.

test_image.py builds it.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
FILE = REPO / "deploy" / "Dockerfile"
# Instructions, with their continuation lines joined.
LINES = re.sub(r"\\\n *", "", re.sub(r"(?m)^ *#.*\n", "", FILE.read_text("utf-8"))).splitlines()


def arguments(instruction: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{instruction} ")]


def test_hadolint_finds_nothing():
    program = shutil.which("hadolint", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([program, FILE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_base_is_a_patch_version_that_the_project_supports():
    (base,) = arguments("FROM")
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", base)[1]
    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    low, high = re.findall(r"3\.(\d+)", project["requires-python"])
    assert int(low) <= int(version.split(".")[1]) < int(high)


def test_processes_run_as_a_user_without_rights_and_rays_token_is_required():
    assert arguments("USER")[-1] == "1000"
    assert "useradd --create-home --uid 1000" in FILE.read_text("utf-8")
    assert "RAY_AUTH_MODE=token" in " ".join(arguments("ENV"))
    names = re.findall(r"(\w+)=", " ".join(arguments("ARG") + arguments("ENV")))
    assert "NVIDIA_VISIBLE_DEVICES" not in names  # a pod without GPUs would have those of others
    assert not [name for name in names if re.search("TOKEN|PASSWORD|SECRET|KEY", name)]


def test_image_gets_the_code_and_nothing_else():
    ignored, *rules = (
        line
        for line in FILE.with_name("Dockerfile.dockerignore").read_text("utf-8").splitlines()
        if not line.startswith("#")
    )
    assert ignored == "*"
    permitted = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    copied = {source for line in arguments("COPY") for source in line.split()[:-1]}
    assert copied == permitted
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    assert copied <= top
    assert not [name for name in copied if fnmatch(name, "*token*") or name.startswith(".")]


def test_list_of_dependencies_is_that_of_the_project(tmp_path):
    """As the machines of cluster.yaml have it, with PostgreSQL's driver and object storage."""
    (run,) = (line for line in arguments("RUN") if "tomllib" in line)
    before = re.search(r'python -c "(.*?)" >', run)[1]
    done = subprocess.run(
        [sys.executable, "-c", before], cwd=REPO, capture_output=True, text=True, check=True
    )
    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert done.stdout.splitlines() == [
        *project["dependencies"],
        *extras["fast"],
        *extras["postgres"],
        *extras["s3"],
    ]
    assert "--constraint constraints.txt" in run


@pytest.mark.parametrize(("device", "status"), [("cpu", 0), ("cuda", 0), ("gpu", 2)])
def test_device_is_cpu_or_cuda(device, status):
    (run,) = (line for line in arguments("RUN") if "tomllib" in line)
    case = run[: run.index("esac") + 4] + '; echo "${PIP_EXTRA_INDEX_URL:-none}"'
    done = subprocess.run(
        ["/bin/sh", "-c", case], env={"DEVICE": device}, capture_output=True, text=True
    )
    assert done.returncode == status
    assert ("whl/cpu" in done.stdout) == (device == "cpu")


def test_no_image_without_dependencies_if_their_list_cannot_be_made(tmp_path):
    """In plain `sh`: builders of OCI images ignore the instruction SHELL."""
    (run,) = (line for line in arguments("RUN") if "tomllib" in line)
    for name, script in [("python", "exit 1"), ("pip", "echo pip"), ("rm", "")]:
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", "-c", run.replace("/tmp/", f"{tmp_path}/")],
        env={"DEVICE": "cpu", "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")


def test_plain_postgresql_address_needs_the_driver_that_the_extra_installs():
    from sqlalchemy.engine import make_url

    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    driver = make_url("postgresql://mlflow@mlflow-db/mlflow").get_dialect().driver
    (wanted,) = project["optional-dependencies"]["postgres"]
    assert wanted.startswith(f"{driver}[")
