"""Which module may import which, and calls that no module may make. Reads the sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.machine import gpus, may_have_gpus, torch_version
from orchestrator.runs.folder import SweepFolder

REPO = Path(__file__).resolve().parent.parent
# Each may import itself and those before it.
ROOTS = ["model", "orchestrator", "pipelines"]
# Packages of orchestrator. Each may import itself and those before it.
PACKAGES = [
    "config",
    "cluster",
    "objects",
    "data",
    "checkpoint",
    "runs",
    "mirror",
    "train",
    "track",
    "cost",
    "workers",
    "sweep",
    "replay",
    "jobs",
]
# (package, package that it may not import although it comes before)
SEPARATE = {("track", "train"), ("checkpoint", "data")}
# Library -> packages and modules that may import it.
ONLY_IN = {
    "ray": {"cluster", "data/ray_tasks", "workers", "sweep/tune", "sweep/processes/trainable"},
    "mlflow": {"track"},
    "tiktoken": {"data/tokenizers/pairs"},
    "gigatoken": {"data/tokenizers/encoder"},
    "boto3": {"objects/s3"},
    "botocore": {"objects/s3"},
    "pydantic": {"config"},
    "pydantic_core": {"config"},
}
# Package -> libraries that it may never import, whatever ONLY_IN says.
NEVER = {"train": {"ray", "mlflow"}, "track": {"torch"}, "mirror": {"torch"}}
UNPICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FILES_AND_NETWORK = {
    "os",
    "pathlib",
    "urllib",
    "socket",
    "subprocess",
    "requests",
    "http",
    "shutil",
}
FILES = sorted(path for root in ROOTS for path in (REPO / root).rglob("*.py"))


def imported_modules(tree: ast.AST) -> set[str]:
    """Return the dotted names of all imports, also those inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    """Return `train/loop` for orchestrator/train/loop.py; outside, the name of the file."""
    parts = path.with_suffix("").parts
    if "orchestrator" not in parts:
        return path.stem
    return "/".join(parts[parts.index("orchestrator") + 1 :])


def package_of(path: Path) -> str | None:
    """Return the package of orchestrator; "" for files beside the packages, None outside."""
    if "orchestrator" not in path.parts:
        return None
    package, slash, _ = module_of(path).partition("/")
    return package if slash else ""


def import_problems(path: Path, module: str) -> list[str]:
    """Return why `path` may not import `module`."""
    root = path.parts[0]
    package = package_of(path)
    library = module.split(".")[0]
    found = []
    if module.startswith("."):
        found.append(f"relative import {module}: write the whole name")
    if library in ROOTS and ROOTS.index(library) > ROOTS.index(root):
        found.append(f"{root} may not import {module}")
    if library in ONLY_IN and not {package, module_of(path)} & ONLY_IN[library]:
        found.append(f"only {sorted(ONLY_IN[library])} may import {library}")
    if library in NEVER.get(package or "", ()):
        found.append(f"{package} may not import {library}")
    if library in UNPICKLES:
        found.append(f"{module} executes code when it loads data")
    if root == "model" and library not in sys.stdlib_module_names | {"torch", "model"}:
        found.append(f"model may not import {module}")
    if root == "model" and library in FILES_AND_NETWORK:
        found.append(f"model may not use files or the network: {module}")
    if imports_upward(package, module):
        found.append(f"{package or 'a file beside the packages'} may not import {module}")
    return found


def imports_upward(package: str | None, module: str) -> bool:
    """Return whether `module` is in a later package of orchestrator, or in a separate one."""
    parts = module.split(".")
    if package is None or parts[0] != "orchestrator" or len(parts) < 2:
        return False
    imported = parts[1]
    if imported not in PACKAGES:
        return False
    if package not in PACKAGES:  # errors, files, text, redact
        return True
    is_later = PACKAGES.index(imported) > PACKAGES.index(package)
    return is_later or (package, imported) in SEPARATE


def call_problem(path: Path, call: ast.Call) -> str | None:
    """Return why `path` may not make a call."""
    name = ast.unparse(call.func)
    arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in ("exec", "compile") and module_of(path) == "own_code":
        return None  # the user's own model or optimizer
    if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
        return f"{name}() executes text"
    if arguments.get("shell", "False") != "False":
        return f"{name} with a shell"
    if arguments.get("allow_pickle", "False") != "False":
        return f"{name} with allow_pickle"
    if name.endswith("torch.load"):
        if module_of(path) == "train/init_from" and arguments.get("weights_only") == "True":
            return None
        return "torch.load is allowed only in train/init_from and with weights_only=True"
    if name.startswith("yaml.") and "load" in name.removeprefix("yaml."):
        loader = ast.unparse(call.args[1]) if len(call.args) > 1 else arguments.get("Loader")
        if name == "yaml.load" and module_of(path) == "config/yaml_text" and loader == "_Loader":
            return None
        return f"{name} with {loader}: use config.yaml_text.read_yaml"
    return None


def problems(path: Path, source: str) -> list[str]:
    """Return all forbidden imports and calls of a file; `path` is relative to the repository."""
    tree = ast.parse(source)
    found = []
    for module in sorted(imported_modules(tree)):
        found += import_problems(path, module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            problem = call_problem(path, node)
            if problem is not None:
                found.append(problem)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPO)))
def test_imports_and_calls_are_allowed(path):
    assert problems(path.relative_to(REPO), path.read_text("utf-8")) == []


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
        ("orchestrator/data/tokenizer.py", "import gigatoken"),
        ("orchestrator/x.py", "import pydantic"),
        ("orchestrator/objects/store.py", "import boto3"),
        ("orchestrator/x.py", "from orchestrator.config import experiment"),
        ("orchestrator/data/x.py", "from orchestrator.runs import journal"),
        ("orchestrator/data/x.py", "import orchestrator.train.loop"),
        ("orchestrator/data/x.py", "from orchestrator.checkpoint import store"),
        ("orchestrator/checkpoint/x.py", "from orchestrator.data import shards"),
        ("orchestrator/track/x.py", "from orchestrator.train.state import build"),
        ("orchestrator/train/x.py", "from orchestrator.track import outbox"),
        ("orchestrator/train/x.py", "import ray"),
        ("orchestrator/track/x.py", "import torch"),
        ("orchestrator/jobs/x.py", "import ray"),
        ("orchestrator/x.py", "import pickle"),
        ("orchestrator/x.py", "eval('1')"),
        ("orchestrator/x.py", "exec('1')"),
        ("orchestrator/own_files.py", "exec('1')"),
        ("orchestrator/own_code.py", "eval('1')"),
        ("orchestrator/x.py", "torch.load('x', weights_only=True)"),
        ("orchestrator/train/init_from.py", "torch.load('x')"),
        ("orchestrator/train/init_from.py", "torch.load('x', weights_only=False)"),
        ("orchestrator/x.py", "yaml.load(t, _Loader)"),
        ("orchestrator/config/yaml_text.py", "yaml.load(t, yaml.Loader)"),
        ("orchestrator/config/yaml_text.py", "yaml.load(t)"),
        ("orchestrator/x.py", "yaml.unsafe_load(t)"),
        ("orchestrator/x.py", "np.load(p, allow_pickle=True)"),
        ("orchestrator/x.py", "subprocess.run(c, shell=True)"),
    ],
)
def test_forbidden_import_or_call_is_found(file, source):
    assert problems(Path(file), source)


def test_training_never_talks_to_the_store():
    """The mirror is a thread of the driver. Workers only copy first weights and tokens."""
    found = set()
    for path in FILES:
        modules = imported_modules(ast.parse(path.read_text("utf-8")))
        if any(module.startswith("orchestrator.mirror") for module in modules):
            found.add(module_of(path))
    drivers = {"jobs/job", "sweep/source", "train/find"}
    drivers |= {"export", "prepare", "replay", "replay_metrics"}
    before_a_step = {"train/init_from", "workers/places"}
    others = {module for module in found if not module.startswith("mirror/")}
    assert others == drivers | before_a_step


DRIVERS = """
import subprocess
import sys
import orchestrator.jobs.sweep, orchestrator.jobs.train, orchestrator.sweep.tune
import orchestrator.workers.crew
sys.exit("torch" in sys.modules)
"""


def test_what_starts_workers_imports_no_torch():
    """Importing it takes seconds, in which no worker can start."""
    assert subprocess.run([sys.executable, "-c", DRIVERS], cwd=REPO, timeout=60).returncode == 0


ARGUMENTS = """
import runpy
import sys
from pathlib import Path
for file in sorted(Path("pipelines").glob("[a-z]*.py")):
    for word, status in (("--help", 0), ("--nope", 2)):
        sys.argv = [str(file), word]
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            assert end.code == status, (file, word, end.code)
        assert "torch" not in sys.modules, (file, word)
"""


def test_help_and_wrong_arguments_of_all_commands_import_no_torch():
    assert subprocess.run([sys.executable, "-c", ARGUMENTS], cwd=REPO, timeout=60).returncode == 0


def test_version_and_gpus_of_torch_are_known_without_importing_it():
    import torch

    assert torch_version() == torch.__version__
    assert gpus() == torch.cuda.device_count()


DRY_RUN = """
import sys
from orchestrator.config.experiment import load_experiment
from orchestrator.cost import estimate
from orchestrator.cost.timing import Timing
estimate.measure = lambda *_: Timing(*[1.0] * 7)
words = ["data.tokenizer=byte", "data.corpus=builtin:stdlib", "optim.weight_decay=0"]
for kind in ("gpt2", "modern"):
    estimate.show(load_experiment(None, [f"model.kind={kind}", *words]))
sys.exit("torch" in sys.modules)
"""


@pytest.mark.skipif(may_have_gpus(), reason="only torch can count the GPUs")
def test_dry_run_of_a_measured_configuration_imports_no_torch():
    assert subprocess.run([sys.executable, "-c", DRY_RUN], cwd=REPO, timeout=60).returncode == 0


def test_yaml_loader_creates_no_objects():
    import yaml

    from orchestrator.config import yaml_text

    assert issubclass(yaml_text._Loader, yaml.SafeLoader)
    assert not any("python" in str(tag) for tag in yaml_text._Loader.yaml_constructors)


def test_no_command_has_the_name_of_a_standard_module():
    names = {path.stem for path in (REPO / "pipelines").glob("*.py")} - {"__init__"}
    assert not names & set(sys.stdlib_module_names)


def test_all_packages_were_read():
    assert {path.relative_to(REPO).parts[0] for path in FILES} == set(ROOTS)
    assert {package_of(path) for path in FILES} == {None, "", *PACKAGES}
    assert len(FILES) > 30


def test_init_files_have_only_a_docstring():
    """Importing one module of a package must not import others: `--help` has to be fast."""
    for path in FILES:
        if path.name == "__init__.py":
            body = ast.parse(path.read_text("utf-8")).body
            assert all(isinstance(node, ast.Expr) for node in body), path


def unnamed_modules(package: Path) -> list[str]:
    """Return the modules and packages in a package that its docstring does not name."""
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text("utf-8"))) or ""
    modules = {file.stem for file in package.glob("*.py")} - {"__init__"}
    packages = {file.parent.name for file in package.glob("*/__init__.py")}
    # `name`, `name.function` or name.py
    return [
        name
        for name in sorted(modules | packages)
        if not re.search(rf"`{name}[`.]|\b{name}\.py\b", text)
    ]


@pytest.mark.parametrize(
    "package",
    # Not pipelines: its modules are commands, each with its own `--help`.
    [file.parent for file in FILES if file.name == "__init__.py" and package_of(file) is not None]
    + [REPO / "model"],
    ids=lambda package: str(package.relative_to(REPO)),
)
def test_docstring_of_package_names_every_module(package):
    assert unnamed_modules(package) == []


def test_only_run_folder_has_the_file_names_of_a_run():
    allowed = {
        ("train/state", "experiment.yaml"),  # in a checkpoint
        ("data/prepare", ".lock"),  # in a dataset
        ("own_files", "experiment.yaml"),  # of a stranger; `runs` is above `own_files`
        ("own_files", "sweep.yaml"),
    }
    paths = [value for value in vars(SweepFolder("sweep")).values() if isinstance(value, Path)]
    names = {path.name for path in paths if "." in path.name}
    assert {"run.json", "metrics.jsonl", "sweep.yaml", ".writer"} <= names
    found = set()
    for path in FILES:
        if package_of(path) is None or module_of(path) == "runs/folder":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value.rpartition("/")[2]
                if name in names:
                    found.add((module_of(path), name))
    assert found == allowed
