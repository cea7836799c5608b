"""Tests cluster.yaml without a cloud.

Ray validates the file, and so does a stricter schema. Its commands run in an empty home directory,
where scripts in place of `ray`, `mlflow`, `pip` and `sudo` only record their calls.
"""

import copy
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import time
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
RECORD = '#!/bin/sh\n{ echo "$(basename "$0") $*"; env; } > "$HOME/calls/$(basename "$0")-$1-$$"\n'


# The first `apt-get update` fails, as if another one had the lock.
SUDO = RECORD + 'test "$2" != update || ! mkdir "$HOME/lock" 2> /dev/null\n'


def config() -> dict:
    return yaml.safe_load(TEXT)


def strict(schema: dict) -> dict:
    """Return Ray's schema, changed to refuse unknown keys in each object that has known ones."""
    schema = copy.deepcopy(schema)
    parts = [schema]
    while parts:
        part = parts.pop()
        if "properties" in part and "if" not in part:
            part["additionalProperties"] = False
        for group in ("properties", "patternProperties"):
            parts += part.get(group, {}).values()
    return schema


# ---- validation ----


def test_ray_accepts_the_file():
    prepared = prepare_config(config())
    validate_config(prepared)
    # Ray's default opens the dashboard to all hosts, and the dashboard can run code.
    assert "0.0.0.0" not in json.dumps(prepared)


def test_ray_knows_every_key():
    jsonschema.validate(config(), strict(SCHEMA))


@pytest.mark.parametrize(
    "path", [(), ("provider",), ("auth",), ("available_node_types", "gpu_worker")]
)
def test_misspelled_key_is_refused_at_every_level(path):
    wrong = config()
    section = wrong
    for key in path:
        section = section[key]
    section["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(wrong, strict(SCHEMA))


def test_head_offers_no_cpu_and_workers_start_on_demand():
    types = config()["available_node_types"]
    head = types.pop(config()["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert head["max_workers"] == 0
    for worker in types.values():
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= config()["max_workers"]
    assert max(worker["resources"].get("GPU", 0) for worker in types.values()) == 8


# ---- commands ----


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The home directory of a machine after the file mounts and the setup commands."""
    home = tmp_path_factory.mktemp("home")
    programs = home / "espalier-venv" / "bin"
    stubs = home / "stubs"
    for folder in (programs, stubs, home / "calls"):
        folder.mkdir(parents=True)
    scripts = {
        # The server does not answer the first call, and answers the later ones.
        programs
        / "curl": '#!/bin/sh\ntest -e "$HOME/asked" || { touch "$HOME/asked"; exit 22; }\n',
        programs / "mkdir": '#!/bin/sh\necho "$*" >> "$HOME/made"\n',
        programs / "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        **{programs / name: RECORD for name in ("ray", "mlflow", "pip")},
        stubs / "sudo": SUDO,
        stubs / "python3": RECORD,
    }
    for path, script in scripts.items():
        path.write_text(script)
        path.chmod(0o755)
    for target, source in config()["file_mounts"].items():
        if "auth_token" not in source:
            path = home / target.removeprefix("~/")
            path.parent.mkdir(exist_ok=True)
            shutil.copy(REPO / source, path)
    merged = prepare_config(config())
    # The first list contains the second, so these commands run twice: `ray up` may repeat them.
    for command in [*merged["head_setup_commands"], *merged["setup_commands"]]:
        execute(command, home, f"{stubs}:/usr/bin:/bin")
    return home


def execute(command: str, home: Path, path: str = "/usr/bin:/bin") -> None:
    """Run one command as Ray runs it on a machine over ssh: in an interactive login shell."""
    # A login shell sets its own PATH, so the stubs are put first again.
    set_path = f"export PATH={path}; " if "stubs" in path else ""
    environment = {"HOME": str(home), "PATH": path, "RAY_HEAD_IP": "10.0.0.1"}
    done = subprocess.run(
        " ".join(_with_interactive(set_path + command)),
        shell=True,
        env=environment,
        timeout=60,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def calls(home: Path, program: str) -> list[tuple[list[str], dict[str, str]]]:
    """Return the arguments and the environment of every call of `program`."""
    found = []
    for file in sorted((home / "calls").glob(f"{program}-*")):
        lines = file.read_text("utf-8").splitlines()
        if not lines:  # it is being written
            continue
        first, *rest = lines
        found.append((first.split()[1:], dict(line.split("=", 1) for line in rest if "=" in line)))
    return found


@pytest.fixture(scope="module")
def started(home) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Calls of `ray start` on the head and on a worker, and of `mlflow server` on the head."""
    seen = {}
    for kind in ("head", "worker"):
        for command in config()[f"{kind}_start_ray_commands"]:
            execute(command, home)
        seen[kind] = next(call for call in calls(home, "ray") if call[0][0] == "start")
        for file in (home / "calls").glob("ray-start-*"):
            file.unlink()
    # The command leaves MLflow in the background.
    deadline = time.monotonic() + 30
    while not calls(home, "mlflow") and time.monotonic() < deadline:
        time.sleep(0.05)
    return {**seen, "mlflow": calls(home, "mlflow")[0]}


def test_ray_and_mlflow_understand_the_start_commands(started):
    from mlflow.cli import server
    from ray.scripts.scripts import start

    head = start.make_context("start", started["head"][0][1:]).params
    worker = start.make_context("start", started["worker"][0][1:]).params
    assert head["head"]
    assert head["dashboard_host"] == "127.0.0.1"
    assert worker["address"] == f"10.0.0.1:{head['port']}"
    tracking = server.make_context("server", started["mlflow"][0][1:]).params
    environment = started["mlflow"][1]
    assert f"http://{tracking['host']}:{tracking['port']}" == environment["MLFLOW_TRACKING_URI"]
    assert tracking["host"] == "127.0.0.1"
    assert str(tracking["workers"]) == "1"
    assert environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    database = tracking["backend_store_uri"].removeprefix("sqlite:///")
    for path in (database, tracking["artifacts_destination"]):
        assert Path(path).is_relative_to(environment["ESPALIER_STORAGE"])


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_every_machine_needs_the_token_and_mounts_the_storage(kind, started, home):
    environment = started[kind][1]
    assert environment["RAY_AUTH_MODE"] == "token"
    # Ray reads the token from its file. The environment of a process can be read in many ways.
    assert "RAY_AUTH_TOKEN" not in environment
    assert "~/.ray/auth_token" in config()["file_mounts"]
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    mounts = [args for args, _ in calls(home, "sudo") if args[0] == "mount"]
    assert {args[-1] for args in mounts} == {environment["ESPALIER_STORAGE"]}
    assert environment["PATH"].startswith(str(home / "espalier-venv" / "bin"))
    assert started["worker"][1]["MLFLOW_TRACKING_URI"] == started["head"][1]["MLFLOW_TRACKING_URI"]


def test_every_exported_variable_is_read_by_a_program(started):
    import mlflow.environment_variables
    from ray._common.usage import usage_constants, usage_lib
    from ray._private.authentication import authentication_token_setup
    from ray.dashboard.modules.job import job_supervisor

    sources = [path.read_text("utf-8") for path in (REPO / "orchestrator").rglob("*.py")]
    modules = (
        mlflow.environment_variables,
        authentication_token_setup,
        usage_constants,
        usage_lib,
        job_supervisor,
    )
    code = "".join([*sources, *map(inspect.getsource, modules)])
    exported = set(re.findall(r"(?:export |(?=MLFLOW_))(\w+)=", TEXT)) - {"PATH"}
    assert [name for name in sorted(exported) if f'"{name}"' not in code] == []
    ours = {name for name in exported if name.startswith("ESPALIER_")}
    assert ours == {"ESPALIER_STORAGE", "ESPALIER_AUTOSCALING"}
    assert int(started["head"][1]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30


def test_machines_install_the_dependencies_in_the_tested_versions(home):
    installs = [args for args, _ in calls(home, "pip")]
    constraints = {Path(args[args.index("--constraint") + 1]).name for args in installs}
    assert constraints == {"constraints.txt"}
    assert not [a for args in installs for a in args if "==" in a or "://" in a]
    requirements = (home / "espalier-setup" / "requirements.txt").read_text("utf-8").splitlines()
    project = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
    fast = project["optional-dependencies"]["fast"]
    assert requirements == project["dependencies"] + fast
    assert all("==" in requirement for requirement in fast)
    lines = (REPO / "constraints.txt").read_text("utf-8").lower().split()
    pinned = dict(line.split("==") for line in lines)
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in requirements} <= set(pinned)
    assert pinned["ray"] == ray.__version__  # the version whose schema these tests use


def test_file_contains_no_secret():
    assert not re.search(r"AKIA[A-Z0-9]{12}|(?i:password|secret[_-]?key)\s*[:=]|PRIVATE KEY", TEXT)
    assert os.sep.join(("~", ".ssh")) not in TEXT
