"""Tests deploy/skypilot.yaml without SkyPilot and without a cloud."""

import re
import subprocess
from pathlib import Path

import yaml

from orchestrator.errors import EXIT_AGAIN
from orchestrator.objects.address import is_address

REPO = Path(__file__).resolve().parents[2]
TASK = yaml.safe_load((REPO / "deploy" / "skypilot.yaml").read_text("utf-8"))
# Fields of SkyPilot 0.14.1 that a task and its resources may have.
FIELDS = re.findall(
    r"\w+", "name num_nodes workdir resources volumes envs secrets file_mounts setup run"
)
RESOURCES = re.findall(
    r"\w+",
    "infra accelerators cpus memory instance_type use_spot disk_size disk_tier network_tier "
    "image_id ports labels autostop any_of ordered job_recovery",
)
RECOVERY = ["strategy", "max_restarts_on_errors", "recover_on_exit_codes"]


def test_skypilot_knows_every_field():
    assert set(TASK) <= set(FIELDS)
    assert set(TASK["resources"]) <= set(RESOURCES)
    assert set(TASK["resources"]["job_recovery"]) <= set(RECOVERY)
    assert all(isinstance(value, str) for value in TASK["envs"].values())


def test_job_is_tried_again_after_status_75_only():
    recovery = TASK["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [EXIT_AGAIN]
    assert recovery["max_restarts_on_errors"] == 0


def test_storage_is_a_bucket_and_no_variable_is_a_secret():
    assert is_address(TASK["envs"]["ESPALIER_STORAGE"])
    assert not [name for name in TASK["envs"] if "TOKEN" in name or "PASSWORD" in name]


def test_machine_installs_the_tested_versions_and_runs_the_command(tmp_path):
    record = '#!/bin/sh\necho "$(basename "$0") $*" >> calls\n'
    for name in (".local/bin/uv", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(record)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **TASK["envs"]}
    for script in (TASK["setup"], TASK["run"]):
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "uv venv --quiet --allow-existing --python 3.12 .venv",
        "uv pip install --quiet --python .venv --constraint constraints.txt --editable .[fast,s3]",
        "python pipelines/train.py configs/gpt2-124m.yaml data.corpus=s3://CHANGE-ME/corpus",
    ]
    assert (REPO / TASK["envs"]["EXPERIMENT"]).is_file()
