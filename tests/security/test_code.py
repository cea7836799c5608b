"""No module unpickles, runs text as code, unpacks archives or starts a shell."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("model", "orchestrator", "pipelines", "benchmarks")
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "tarfile",
    "zipfile",
    "runpy",
    "code",
    "pty",
    "imp",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system",
    "os.popen",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.full_load_all",
    "yaml.unsafe_load_all",
    "shutil.unpack_archive",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "importlib.import_module",
    "numpy.load",
    "pandas.read_pickle",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.hub.load",
}
TORCH_LOAD = "orchestrator/train/init_from.py"
# It runs the file that a user names as the model or the optimizer.
OWN_CODE = {("orchestrator/own_code.py", "compile"), ("orchestrator/own_code.py", "exec")}


def violations(source: str, name: str) -> list[str]:
    """Return the forbidden calls and imports of a module, each as `name:line call`."""
    tree = ast.parse(source)
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            aliases |= {a.asname: a.name for a in node.names if a.asname}
    found = []
    for node in ast.walk(tree):
        found += [f"{name}:{node.lineno} {call}" for call in _violations_of(node, aliases, name)]
    return found


def _violations_of(node: ast.AST, aliases: dict[str, str], name: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.split(".")[0] in MODULES]
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.module and node.module.split(".")[0] in MODULES else []
    if isinstance(node, ast.Call):
        called = _dotted(node.func, aliases)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        found = []
        builtin = called.removeprefix("builtins.")
        if (builtin in BUILTINS or called in CALLS) and (name, called) not in OWN_CODE:
            found.append(called)
        if called == "torch.load" and not (
            name == TORCH_LOAD and _is(keywords.get("weights_only"), True)
        ):
            found.append(called)
        if called == "torch.save" and not name.startswith("benchmarks/"):
            found.append(called)
        if called == "yaml.load" and not (
            len(node.args) == 2 and _dotted(node.args[1], aliases) == "_Loader"
        ):
            found.append(called)
        found += [
            key
            for key in ("shell", "allow_pickle")
            if key in keywords and not _is(keywords[key], False)
        ]
        return found
    return []


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """Return `a.b.c` for a name or attribute, with imports resolved; "" for anything else."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return ""


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_module_has_a_forbidden_call_or_import():
    files = [f for folder in FOLDERS for f in (REPO / folder).rglob("*.py")]
    assert len(files) > 60
    found = []
    for file in files:
        found += violations(file.read_text("utf-8"), file.relative_to(REPO).as_posix())
    assert found == []


def test_yaml_loader_is_a_safe_loader():
    import yaml

    from orchestrator.config.yaml_text import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    assert not issubclass(_Loader, (yaml.FullLoader, yaml.UnsafeLoader))


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import os, dill",
        "from cloudpickle import dumps",
        "import marshal",
        "import shelve",
        "eval('1')",
        "exec(text)",
        "compile(text, 'f', 'exec')",
        "import builtins\nbuiltins.exec(text)",
        "from builtins import eval as e\ne('1')",
        "__import__('os')",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import yaml\nyaml.load(text)",
        "import yaml\nyaml.unsafe_load(text)",
        "from yaml import full_load\nfull_load(text)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.save(x, f)",
        "import torch\ntorch.load(f, weights_only=True)",
        "from torch import load\nload(f)",
        "import torch as t\nt.load(f, weights_only=False)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "import subprocess\nsubprocess.run(c, shell=flag)",
        "import os\nos.system(c)",
        "from os import popen\npopen(c)",
        "import numpy as np\nnp.load(f)",
        "f(g, allow_pickle=True)",
        "import tarfile",
        "from zipfile import ZipFile",
        "import shutil\nshutil.unpack_archive(f)",
        "def f():\n    import pickle",
        "import importlib\nimportlib.import_module(name)",
    ],
)
def test_forbidden_code_is_found(planted):
    assert violations(planted, "orchestrator/planted.py")


@pytest.mark.parametrize(
    "harmless",
    [
        "import re\nre.compile('a')",
        "import torch\ntorch.compile(m)",
        "model.eval()",
        "import subprocess\nsubprocess.run(['git'])",
        "from safetensors.torch import load_file\nload_file(f)",
        "import yaml\nyaml.load(text, _Loader)",
        "import json\njson.load(f)",
    ],
)
def test_harmless_code_is_allowed(harmless):
    assert violations(harmless, "orchestrator/harmless.py") == []


def test_code_of_a_text_is_run_in_one_module():
    for call in ("compile(text, 'f', 'exec')", "exec(code)"):
        assert violations(call, "orchestrator/own_code.py") == []
        assert violations(call, "orchestrator/own_files.py")
    assert violations("eval(text)", "orchestrator/own_code.py")


def test_torch_load_is_allowed_in_one_module_with_weights_only():
    assert violations("import torch\ntorch.load(f, weights_only=True)", TORCH_LOAD) == []
    assert violations("import torch\ntorch.load(f, weights_only=False)", TORCH_LOAD)
    assert violations("import torch\ntorch.load(f)", TORCH_LOAD)
