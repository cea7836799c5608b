"""What the code may not do, read from its syntax: unpickle, run text as code, unpack archives, start a shell."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
ROOMS = ("model", "orchestrator", "pipelines", "benchmarks")
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
Torchestrator_LOAD = "orchestrator/train/init_from.py"


def sins(source: str, name: str) -> list[str]:
    """Lines of a module that do what none may, each as `name:line what`."""
    tree = ast.parse(source)
    aliases = {
        a.asname or a.name: f"{node.module}.{a.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for a in node.names
        if node.module
    }
    aliases |= {
        a.asname: a.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for a in node.names
        if a.asname
    }
    return [
        f"{name}:{node.lineno} {what}"
        for node in ast.walk(tree)
        for what in _sins_of(node, aliases, name)
    ]


def _sins_of(node: ast.AST, aliases: dict[str, str], name: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.split(".")[0] in MODULES]
    if isinstance(node, ast.ImportFrom):
        return [node.module] if node.module and node.module.split(".")[0] in MODULES else []
    if isinstance(node, ast.Call):
        called, words = _dotted(node.func, aliases), {k.arg: k.value for k in node.keywords}
        found = []
        if called in BUILTINS or called.removeprefix("builtins.") in BUILTINS or called in CALLS:
            found.append(called)
        if called == "torch.load" and not (
            name == Torchestrator_LOAD and _is(words.get("weights_only"), True)
        ):
            found.append(called)
        if called == "torch.save" and not name.startswith(
            "benchmarks/"
        ):  # they measure ours beside it
            found.append(called)
        if called == "yaml.load" and not (
            len(node.args) == 2 and _dotted(node.args[1], aliases) == "_Loader"
        ):
            found.append(called)
        found += [
            key for key in ("shell", "allow_pickle") if key in words and not _is(words[key], False)
        ]
        return found
    return []


def _dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """`a.b.c` of a name or attribute, imports resolved; of anything else nothing."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return ""


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_module_does_any_of_it():
    files = [f for room in ROOMS for f in (REPO / room).rglob("*.py")]
    assert len(files) > 60
    assert [
        s for f in files for s in sins(f.read_text("utf-8"), f.relative_to(REPO).as_posix())
    ] == []


def test_the_one_loader_of_yaml_is_a_safe_one():
    import yaml

    from orchestrator.config.load import _Loader

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
def test_each_of_these_would_be_found(planted):
    assert sins(planted, "orchestrator/planted.py")


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
def test_and_none_of_these(harmless):
    assert sins(harmless, "orchestrator/harmless.py") == []


def test_torch_may_load_in_one_place_and_only_weights():
    assert sins("import torch\ntorch.load(f, weights_only=True)", Torchestrator_LOAD) == []
    assert sins("import torch\ntorch.load(f, weights_only=False)", Torchestrator_LOAD)
    assert sins("import torch\ntorch.load(f)", Torchestrator_LOAD)
