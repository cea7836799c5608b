#!/usr/bin/env python3
"""Export a trained model as a folder that loads without this project.

The folder has the weights (safetensors), the settings of the model, its code, the tokenizer and the
experiment. load.py in it loads the model; it needs only torch, safetensors and what a user's file
imports. The folder is also a model of MLflow:
`mlflow.pyfunc.load_model(folder).predict(token_ids)`.

  pipelines/export.py quickstart exported
  pipelines/export.py runs/quickstart exported --best --mlflow
"""

from pipelines import starting

starting.end_on_ctrl_c(__name__)

from pipelines.common import parse_first, require_model, run_command
from pipelines.options import Options


def options() -> Options:
    """Return the parser of the command's arguments."""
    parser = Options(__doc__)
    parser.add_model()
    parser.add_argument("folder", metavar="FOLDER", help="folder to create")
    parser.add_argument(
        "--mlflow", action="store_true", help="store the folder as a model of the run in MLflow"
    )
    parser.add_best()
    parser.add_ema()
    return parser


parse_first(__name__, options().parse_args, require_model)

import ast
import os
import platform
import shutil
import sys
import tempfile
from importlib.metadata import packages_distributions, version
from pathlib import Path

from safetensors.torch import save_file

from model.models import fields_of
from orchestrator.config.yaml_text import write_yaml
from orchestrator.errors import EXIT_DONE, UserError
from orchestrator.files import write_json
from orchestrator.folders import folder_bytes
from orchestrator.mirror import remote
from orchestrator.own_code import parts, sources
from orchestrator.paths import local_path
from orchestrator.runs.folder import RunFolder
from orchestrator.text import table
from orchestrator.track import exported
from orchestrator.track.server import resolve_uri
from orchestrator.train.find import find_checkpoint
from orchestrator.train.trained import Trained, open_checkpoint

REPOSITORY = Path(__file__).resolve().parent.parent
COPIED = ("experiment.yaml", "tokenizer.json")
LOAD = """\
import json
import sys
from pathlib import Path
from safetensors.torch import load_file
def load(folder=Path(__file__).resolve().parent):
    sys.path.insert(0, str(folder / "code"))
    from {module} import {names}
    model = {name}({config}(**json.loads((folder / "config.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
"""
LOADER = "pyfunc_loader"
PYFUNC = '''\
"""Loads this folder for `mlflow.pyfunc`: token ids (B, T) -> logits of the next token (B, V)."""

import runpy

import numpy
import torch


class Predictor:
    def __init__(self, model):
        self.model = model

    def predict(self, model_input, params=None):
        tokens = torch.as_tensor(numpy.asarray(model_input), dtype=torch.int64)
        with torch.no_grad():
            return self.model(tokens)[:, -1].numpy()


def _load_pyfunc(path):
    return Predictor(runpy.run_path(f"{path}/load.py")["load"]())
'''
README = """\
# {run}, step {step:,}

A language model for the tokenizer {tokenizer} ({n_vocab:,} ids of {vocab_size:,} rows), trained by
Espalier. experiment.yaml has all settings of the run.

load.py loads it, with {libraries} and no other code:

```python
{load}```

`load()(tokens)` returns the logits of the next token, (B, 1, {vocab_size}), for int64 `tokens`,
(B, T), T <= {block_size}. `mlflow.pyfunc.load_model` loads this folder, too.
"""


def main(argv: list[str]) -> int:
    """Write the folder and print what is in it."""
    args = options().parse_args(argv)
    folder = local_path("FOLDER", args.folder).absolute()
    if folder.exists():
        raise UserError(f"{folder}: exists; name a folder that does not")
    trained = open_checkpoint(find_checkpoint(args.model, best=args.best), "cpu", ema=args.ema)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created ({error.strerror}); name another folder"
        ) from None
    uri = None
    try:
        export(trained, temporary)
        if args.mlflow:
            uri = register(trained, temporary)
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    rows = {
        "checkpoint": trained.checkpoint,
        "folder": folder,
        "bytes": f"{folder_bytes(folder):,}",
        "MLflow": uri,
    }
    print(f"{table(rows)}\n\nnext: cd {folder}; python -c 'from load import load; print(load())'")
    return EXIT_DONE


def register(trained: Trained, folder: Path) -> str:
    """Store the folder in MLflow. Return the URI of the model."""
    assert trained.checkpoint is not None and trained.manifest is not None
    run = RunFolder(trained.checkpoint.absolute().parents[1])
    sweep = run.sweep()
    uri = resolve_uri(trained.experiment, remote.storage_of(sweep or run))
    name = trained.experiment.tracking.experiment
    return exported.register(run, uri, name, folder, trained.manifest["step"])


def export(trained: Trained, folder: Path) -> None:
    """Write a model to an empty folder."""
    assert trained.checkpoint is not None and trained.manifest is not None
    config = trained.model.config
    state = trained.model.state_dict()
    # Tied weights share memory, which safetensors does not store.
    save_file(
        {name: value.clone().contiguous() for name, value in state.items()},
        folder / "model.safetensors",
    )
    write_json(folder / "config.json", fields_of(config))
    for name in COPIED:
        shutil.copyfile(trained.checkpoint / name, folder / name)
    load = write_code(trained, folder / "code")
    (folder / "load.py").write_text(load, "utf-8")
    libraries = libraries_of(trained)
    write_mlmodel(folder, libraries)
    readme = README.format(
        libraries=", ".join(("torch", "safetensors", *libraries)),
        run=trained.experiment.name,
        step=trained.manifest["step"],
        tokenizer=trained.experiment.data.tokenizer,
        n_vocab=trained.tokenizer.n_vocab,
        vocab_size=config.vocab_size,
        block_size=config.block_size,
        load=load,
    )
    (folder / "README.md").write_text(readme, "utf-8")


def libraries_of(trained: Trained) -> list[str]:
    """Return the other libraries that a user's file imports, by their names in a package index."""
    names = {name.partition(".")[0] for name in imported(own_content(trained))}
    names -= {*sys.stdlib_module_names, "model", "torch"}
    known = packages_distributions() if names else {}
    return sorted({library for name in names for library in known.get(name, [])} - {"safetensors"})


def own_content(trained: Trained) -> bytes:
    """Return the user's file that has the model; nothing for our models."""
    wanted = ("model", trained.experiment.model.kind)
    found = (source.content for source in sources() if (source.section, source.kind) == wanted)
    return next(found, b"")


def write_mlmodel(folder: Path, libraries: list[str]) -> None:
    """Write what makes the folder a model of MLflow."""
    needed = dict.fromkeys(("mlflow", "torch", "safetensors", "numpy", *libraries))
    versions = {name: version(name) for name in needed}
    (folder / "code" / f"{LOADER}.py").write_text(PYFUNC, "utf-8")
    requirements = [f"{name}=={found.partition('+')[0]}\n" for name, found in versions.items()]
    (folder / "requirements.txt").write_text("".join(requirements), "utf-8")
    flavor = {
        "loader_module": LOADER,
        "code": "code",
        "data": ".",
        "python_version": platform.python_version(),
    }
    content = {"flavors": {"python_function": flavor}, "mlflow_version": versions["mlflow"]}
    (folder / "MLmodel").write_text(write_yaml(content), "utf-8")


def write_code(trained: Trained, folder: Path) -> str:
    """Write the code of the model to a new folder. Return the text of load.py."""
    folder.mkdir()
    kind = trained.experiment.model.kind
    own = own_content(trained)
    if own:
        module = f"own_{parts(kind)['hash'][:8]}"  # several exports may be loaded together
        name = names = parts(kind)["name"]  # that of the class may be another
        config = f"{name}.Config"
        needed = imported(own)
        (folder / f"{module}.py").write_bytes(own)
    else:
        module = type(trained.model).__module__
        name = type(trained.model).__name__
        config = type(trained.model.config).__name__
        names = f"{name}, {config}"
        needed = {module}
    copy_modules(needed, folder)
    return LOAD.format(module=module, names=names, name=name, config=config)


def copy_modules(names: set[str], folder: Path) -> None:
    """Copy modules of the package `model`, and those that they import."""
    done: set[str] = set()
    waiting = {name for name in names if name.partition(".")[0] == "model"}
    while waiting:
        name = waiting.pop()
        done.add(name)
        source = REPOSITORY / f"{name.replace('.', '/')}.py"
        if not source.is_file():  # `from model import gpt` names the package, too
            source = REPOSITORY / "model" / "__init__.py"
        content = source.read_bytes()
        target = folder / source.relative_to(REPOSITORY)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
        waiting |= {one for one in imported(content) if one.startswith("model")} - done
        waiting |= {"model"} - done


def imported(content: bytes) -> set[str]:
    """Return the modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


if __name__ == "__main__":
    run_command(main)
