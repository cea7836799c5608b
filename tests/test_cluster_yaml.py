"""cluster.yaml, as far as it can be held without a cloud: Ray's own validation, a stricter one, and its commands run in
an empty home in which `ray`, `mlflow`, `pip` and `sudo` only note how they were called."""

import copy
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config

REPO = Path(__file__).resolve().parent.parent
TEXT = (REPO / "cluster.yaml").read_text("utf-8")
SCHEMA = json.loads(
    (Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text("utf-8")
)
NOTE = '#!/bin/sh\n{ echo "$(basename "$0") $*"; env; } > "$HOME/calls/$(basename "$0")-$1-$$"\n'


def config() -> dict:
    return yaml.safe_load(TEXT)


def strict(schema: dict) -> dict:
    """Ray's schema with every object closed whose keys it names."""
    schema = copy.deepcopy(schema)
    parts = [schema]
    while parts:
        part = parts.pop()
        if "properties" in part and "if" not in part:
            part["additionalProperties"] = False
        parts += [
            v for group in ("properties", "patternProperties") for v in part.get(group, {}).values()
        ]
    return schema


# ---- what Ray says to it ----
def test_ray_accepts_it():
    prepared = prepare_config(config())
    validate_config(prepared)
    assert "0.0.0.0" not in json.dumps(
        prepared
    )  # Ray's default opens the dashboard to all: remote code execution


def test_every_key_is_one_that_ray_knows():
    jsonschema.validate(config(), strict(SCHEMA))


@pytest.mark.parametrize(
    "path", [(), ("provider",), ("auth",), ("available_node_types", "gpu_worker")]
)
def test_a_misspelled_key_is_noticed_at_every_level(path):
    wrong = config()
    at = wrong
    for key in path:
        at = at[key]
    at["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(wrong, strict(SCHEMA))


def test_the_head_gives_no_cpu_and_workers_start_on_demand():
    types, head = config()["available_node_types"], config()["head_node_type"]
    assert (types[head]["resources"]["CPU"], types[head]["max_workers"]) == (0, 0)
    workers = [t for name, t in types.items() if name != head]
    assert all(t["min_workers"] == 0 < t["max_workers"] <= config()["max_workers"] for t in workers)
    assert max(t["resources"].get("GPU", 0) for t in workers) == 8


# ---- what its commands do ----
@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A machine's home after the file mounts and the setup commands."""
    home = tmp_path_factory.mktemp("home")
    programs = home / "espalier-venv" / "bin"
    for folder in (programs, home / "stubs", home / "calls"):
        folder.mkdir(parents=True)
    noted = [
        *(programs / n for n in ("ray", "mlflow", "pip")),
        *(home / "stubs" / n for n in ("sudo", "python3")),
    ]
    for path in noted:
        path.write_text(NOTE)
        path.chmod(0o755)
    # Not yet there when asked first, there when asked again.
    (programs / "curl").write_text(
        '#!/bin/sh\ntest -e "$HOME/asked" || { touch "$HOME/asked"; exit 22; }\n'
    )
    (programs / "mkdir").write_text('#!/bin/sh\necho "$*" >> "$HOME/made"\n')
    (programs / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for name in ("curl", "mkdir", "python"):
        (programs / name).chmod(0o755)
    for there, here in config()["file_mounts"].items():
        if "auth_token" not in here:
            target = home / there.removeprefix("~/")
            target.parent.mkdir(exist_ok=True)
            shutil.copy(REPO / here, target)
    merged = prepare_config(config())
    for command in [
        *merged["head_setup_commands"],
        *merged["setup_commands"],
    ]:  # twice: `ray up` may come again
        execute(command, home, f"{home / 'stubs'}:/usr/bin:/bin")
    return home


def execute(command: str, home: Path, path: str = "/usr/bin:/bin") -> None:
    """Run one command as Ray runs it on a machine over ssh: in an interactive login shell."""
    # A login shell sets its own PATH; what stands for the system's programs is put before it again.
    again = f"export PATH={path}; " if "stubs" in path else ""
    environment = {"HOME": str(home), "PATH": path, "RAY_HEAD_IP": "10.0.0.1"}
    done = subprocess.run(
        " ".join(_with_interactive(again + command)),
        shell=True,
        env=environment,
        timeout=60,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def calls(home: Path, program: str) -> list[tuple[list[str], dict[str, str]]]:
    """Arguments and environment of every call of `program`."""
    found = []
    for file in sorted((home / "calls").glob(f"{program}-*")):
        first, *rest = file.read_text("utf-8").splitlines()
        found.append((first.split()[1:], dict(line.split("=", 1) for line in rest if "=" in line)))
    return found


@pytest.fixture(scope="module")
def started(home) -> dict[str, tuple[list[str], dict[str, str]]]:
    """`ray start` on the head and on a worker, and the head's `mlflow server`."""
    seen = {}
    for kind in ("head", "worker"):
        for command in config()[f"{kind}_start_ray_commands"]:
            execute(command, home)
        seen[kind] = next(call for call in calls(home, "ray") if call[0][0] == "start")
        for file in (home / "calls").glob("ray-start-*"):
            file.unlink()
    return {**seen, "mlflow": calls(home, "mlflow")[0]}


def test_the_start_commands_are_ones_that_ray_and_mlflow_understand(started):
    from mlflow.cli import server
    from ray.scripts.scripts import start

    head, worker = (
        start.make_context("start", started[kind][0][1:]).params for kind in ("head", "worker")
    )
    assert head["head"]
    assert head["dashboard_host"] == "127.0.0.1"
    assert worker["address"] == f"10.0.0.1:{head['port']}"
    tracking = server.make_context("server", started["mlflow"][0][1:]).params
    environment = started["mlflow"][1]
    assert f"http://{tracking['host']}:{tracking['port']}" == environment["MLFLOW_TRACKING_URI"]
    assert tracking["host"] == "127.0.0.1"
    assert str(tracking["workers"]) == "1"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    for place in (
        tracking["backend_store_uri"].removeprefix("sqlite:///"),
        tracking["artifacts_destination"],
    ):
        assert Path(place).is_relative_to(environment["ESPALIER_STORAGE"])


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_machine_asks_for_the_token_and_knows_where_runs_live(kind, started, home):
    environment = started[kind][1]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert (
        "RAY_AUTH_TOKEN" not in environment
    )  # it is read from its file: an environment is shown in too many places
    assert "~/.ray/auth_token" in config()["file_mounts"]
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    mounts = [args for args, _ in calls(home, "sudo") if args[0] == "mount"]
    assert {args[-1] for args in mounts} == {environment["ESPALIER_STORAGE"]}
    assert environment["PATH"].startswith(str(home / "espalier-venv" / "bin"))
    assert started["worker"][1]["MLFLOW_TRACKING_URI"] == started["head"][1]["MLFLOW_TRACKING_URI"]


def test_every_variable_is_one_that_somebody_reads(started):
    import mlflow.environment_variables
    from ray._common.usage import usage_constants, usage_lib
    from ray._private.authentication import authentication_token_setup
    from ray.dashboard.modules.job import job_supervisor

    ours = "".join(p.read_text("utf-8") for p in (REPO / "orchestrator").glob("*.py"))
    theirs = "".join(
        map(
            inspect.getsource,
            (
                mlflow.environment_variables,
                authentication_token_setup,
                usage_constants,
                usage_lib,
                job_supervisor,
            ),
        )
    )
    exported = set(re.findall(r"export (\w+)=", TEXT)) | set(re.findall(r"(MLFLOW_\w+)=", TEXT))
    assert {n for n in exported if n not in ("PATH",) and f'"{n}"' not in ours + theirs} == set()
    assert {n for n in exported if n.startswith("ESPALIER_")} == {
        "ESPALIER_STORAGE",
        "ESPALIER_AUTOSCALING",
    }
    assert int(started["head"][1]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30


def test_the_machines_get_the_projects_dependencies_in_the_tested_versions(home):
    installs = [args for args, _ in calls(home, "pip")]
    constraints = {Path(args[args.index("--constraint") + 1]).name for args in installs}
    assert constraints == {"constraints.txt"}
    assert not [a for args in installs for a in args if "==" in a or "://" in a]
    asked = (home / "espalier-setup" / "requirements.txt").read_text("utf-8").splitlines()
    assert (
        asked
        == tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    )
    pinned = dict(
        line.lower().split("==") for line in (REPO / "constraints.txt").read_text("utf-8").split()
    )
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in asked} <= set(pinned)
    assert pinned["ray"] == ray.__version__  # the version whose schema has checked this file


def test_it_holds_no_secret():
    assert not re.search(r"AKIA[A-Z0-9]{12}|(?i:password|secret[_-]?key)\s*[:=]|PRIVATE KEY", TEXT)
    assert os.sep.join(("~", ".ssh")) not in TEXT
