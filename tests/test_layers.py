"""Who may know whom, and what no file may contain: read from the sources, not from what happens to be imported."""

import ast
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
ROOMS = ["model", "orchestrator", "pipelines"]  # each may import itself and what stands before it
# The packages of orchestrator, lowest first: each may import itself and what stands before it.
PACKAGES = [
    "config",
    "cluster",
    "data",
    "checkpoint",
    "runs",
    "train",
    "track",
    "cost",
    "workers",
    "sweep",
    "replay",
    "jobs",
]
APART = {
    ("track", "train"),
    ("data", "checkpoint"),
    ("checkpoint", "data"),
}  # neither knows the other
ONLY_IN = {  # library: packages and modules that may import it
    "ray": {"cluster", "data/prepare", "workers", "sweep/tune"},
    "mlflow": {"track"},
    "tiktoken": {"data/tokenizer"},
    "pydantic": {"config"},
}
NEVER = {
    "train": {"ray", "mlflow"},
    "track": {"torch"},
}  # library: also not through a later change of ONLY_IN
FILES = sorted(path for room in ROOMS for path in (REPO / room).rglob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of everything that is imported, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {
                "." * node.level + (node.module or ""),
                *(f"{node.module}.{alias.name}" for alias in node.names),
            }
    return found


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """(dotted name, call) of everything that is called."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def place_of(path: Path) -> str:
    """`train/loop` for orchestrator/train/loop.py; the bare name for a file that is in no package."""
    parts = path.with_suffix("").parts
    return (
        "/".join(parts[parts.index("orchestrator") + 1 :]) if "orchestrator" in parts else path.stem
    )


def package_of(path: Path) -> str | None:
    """The package of orchestrator that a file belongs to; empty for files beside the packages, None outside."""
    if "orchestrator" not in path.parts:
        return None
    return place_of(path).split("/")[0] if "/" in place_of(path) else ""


def upward(package: str | None, module: str) -> str | None:
    """What is wrong with an import of `module` in `package`: it stands higher, or beside."""
    parts = module.split(".")
    if parts[0] != "orchestrator" or len(parts) < 2 or parts[1] not in PACKAGES:
        return None
    if package == "":
        return f"files beside the packages may not import {module}"
    if package in PACKAGES and (
        PACKAGES.index(parts[1]) > PACKAGES.index(package) or (package, parts[1]) in APART
    ):
        return f"{package} may not import {module}"
    return None


def problems(path: Path, room: str, source: str) -> list[str]:
    """What a file of `room` may not import or call."""
    tree = ast.parse(source)
    found, modules = [], imports(tree)
    for module in sorted(modules):
        top = module.split(".")[0]
        if module.startswith("."):
            found.append(f"relative import {module}: say the room's name")
        if top in ROOMS and ROOMS.index(top) > ROOMS.index(room):
            found.append(f"{room} may not know {module}")
        if top in ONLY_IN and not {package_of(path), place_of(path)} & ONLY_IN[top]:
            found.append(f"{top} is for {sorted(ONLY_IN[top])} only")
        if top in NEVER.get(package_of(path), ()):
            found.append(f"{package_of(path)} may not import {top}")
        if problem := upward(package_of(path), module):
            found.append(problem)
        if top in ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"):
            found.append(f"{module} unpickles")
        if room == "model" and top not in sys.stdlib_module_names | {"torch", "model"}:
            found.append(f"model may not know {module}")
        if room == "model" and top in (
            "os",
            "pathlib",
            "urllib",
            "socket",
            "subprocess",
            "requests",
            "http",
            "shutil",
        ):
            found.append(f"model has no files and no network: {module}")
    return found + [p for name, call in calls(tree) for p in bad_call(path, name, call)]


def bad_call(path: Path, name: str, call: ast.Call) -> list[str]:
    words = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
        return [f"{name}()"]
    if words.get("shell", "False") != "False" or words.get("allow_pickle", "False") != "False":
        return [f"{ast.unparse(call)[:80]}"]
    if name.endswith("torch.load") and (
        place_of(path) != "train/init_from" or words.get("weights_only") != "True"
    ):
        return ["torch.load outside of init_from, or without weights_only=True"]
    if name.startswith("yaml.") and "load" in name.removeprefix("yaml."):
        loader = ast.unparse(call.args[1]) if len(call.args) > 1 else words.get("Loader", "")
        if (name, place_of(path), loader) != ("yaml.load", "config/load", "_Loader"):
            return [f"{name} with {loader or 'no loader'}; config.load.read_yaml is the one reader"]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(REPO)))
def test_a_file_knows_only_what_its_room_may_know_and_runs_no_data_as_code(path):
    assert problems(path, path.relative_to(REPO).parts[0], path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/x.py", "import orchestrator.config.experiment"),
        ("model/x.py", "from pipelines import common"),
        ("model/x.py", "import numpy"),
        ("model/x.py", "import os"),
        ("orchestrator/x.py", "import pipelines.common"),
        ("orchestrator/x.py", "from . import config"),
        ("orchestrator/x.py", "def f():\n    import ray"),
        ("orchestrator/x.py", "from ray.train import report"),
        ("orchestrator/cluster/layout.py", "import mlflow"),
        ("orchestrator/x.py", "import tiktoken.load"),
        ("orchestrator/x.py", "import pydantic"),
        ("orchestrator/x.py", "from orchestrator.config import experiment"),
        ("orchestrator/data/x.py", "from orchestrator.runs import journal"),
        ("orchestrator/data/x.py", "import orchestrator.train.loop"),
        ("orchestrator/track/x.py", "from orchestrator.train.state import build"),
        ("orchestrator/train/x.py", "from orchestrator.track import outbox"),
        ("orchestrator/train/x.py", "import ray"),
        ("orchestrator/track/x.py", "import torch"),
        ("orchestrator/jobs/x.py", "import ray"),
        ("orchestrator/x.py", "import pickle"),
        ("orchestrator/x.py", "eval('1')"),
        ("orchestrator/x.py", "exec('1')"),
        ("orchestrator/x.py", "torch.load('x', weights_only=True)"),
        ("orchestrator/train/init_from.py", "torch.load('x')"),
        ("orchestrator/train/init_from.py", "torch.load('x', weights_only=False)"),
        ("orchestrator/x.py", "yaml.load(t, _Loader)"),
        ("orchestrator/config/load.py", "yaml.load(t, yaml.Loader)"),
        ("orchestrator/config/load.py", "yaml.load(t)"),
        ("orchestrator/x.py", "yaml.unsafe_load(t)"),
        ("orchestrator/x.py", "np.load(p, allow_pickle=True)"),
        ("orchestrator/x.py", "subprocess.run(c, shell=True)"),
    ],
)
def test_each_rule_finds_its_breach(file, source):
    path = Path(file)
    assert len(problems(path, path.parts[0], source)) >= 1


def test_the_one_reader_of_yaml_is_a_safe_one():
    import yaml

    from orchestrator.config import load

    assert issubclass(load._Loader, yaml.SafeLoader)
    assert not any("python" in str(tag) for tag in load._Loader.yaml_constructors)


def test_no_pipeline_is_called_like_a_standard_module():
    names = {path.stem for path in (REPO / "pipelines").glob("*.py")} - {"__init__"}
    assert names & set(sys.stdlib_module_names) == set()


def test_every_room_and_package_was_read():
    assert {path.relative_to(REPO).parts[0] for path in FILES} == set(ROOMS)
    assert {package_of(path) for path in FILES} == {None, "", *PACKAGES}
    assert len(FILES) > 30
