"""Hashes of the modules that decide the bits of a result: of the weights and of the metrics.

Keys of stages and checkpoints hold them. A sweep therefore trains a stage again if the code has
changed, and a resumed run names the modules that have.

A module is hashed by its syntax tree without comments, docstrings and layout. The hash is the same
on all versions of Python that we support.
"""

import ast
import functools
import hashlib
from pathlib import Path
from typing import Any

from model.models import MODELS
from model.optim import OPTIMIZERS
from orchestrator.own_code import contents

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("model", "orchestrator", "pipelines")
# What computes weights, losses and the order of the samples. Each kind of model has files besides.
MODULES = (
    "model/loss.py",
    "model/models.py",
    "model/optim.py",
    "model/schedule.py",
    "orchestrator/config/experiment.py",
    "orchestrator/config/steps.py",
    "orchestrator/data/batches.py",
    "orchestrator/data/order.py",
    "orchestrator/data/shards.py",
    "orchestrator/train/begin.py",
    "orchestrator/train/due.py",
    "orchestrator/train/evaluate.py",
    "orchestrator/train/find.py",
    "orchestrator/train/gradients.py",
    "orchestrator/train/init_from.py",
    "orchestrator/train/loop.py",
    "orchestrator/train/meter.py",
    "orchestrator/train/nonfinite.py",
    "orchestrator/train/numerics.py",
    "orchestrator/train/ranks/exchange.py",
    "orchestrator/train/ranks/layout.py",
    "orchestrator/train/ranks/overlap.py",
    "orchestrator/train/ranks/regions.py",
    "orchestrator/train/ranks/shards.py",
    "orchestrator/train/ranks/slots.py",
    "orchestrator/train/state.py",
    "orchestrator/train/step.py",
)
# What a step imports besides, with the reason why it may change without training again. A folder
# stands for its modules.
WITHOUT_EFFECT = {
    "model/cache.py": "only samples of text",
    "model/flops.py": "only estimates and MFU",
    "model/generate.py": "only samples of text",
    "model/protocol.py": "what a model may have, without code",
    "orchestrator/checkpoint": "stores bytes; their hashes are checked",
    "orchestrator/cluster": "places workers; results do not depend on their number",
    "orchestrator/config": "the values of all fields are in the key",
    "orchestrator/data/corpus.py": "the tokens are in the key",
    "orchestrator/data/dataset.py": "the tokens are in the key",
    "orchestrator/data/input": "the tokens are in the key",
    "orchestrator/data/tokenizer.py": "the tokens are in the key",
    "orchestrator/data/tokenizers": "the tokens are in the key",
    "orchestrator/mirror": "moves bytes; their hashes are checked",
    "orchestrator/objects": "moves bytes; their hashes are checked",
    "orchestrator/runs": "stores and reports what was computed",
    "orchestrator/train/checkpointer.py": "stores what was computed",
    "orchestrator/train/ranks/reading.py": "moves bytes; their hashes are checked",
    "orchestrator/train/ranks/writing.py": "stores what was computed",
    "orchestrator/*.py": "files, paths and messages",
}


@functools.cache
def module_hashes(model: str, optimizer: str) -> dict[str, str]:
    """Return the hash of each module for a kind of model and optimizer, 16 hexadecimal digits.

    A file of the user stands under its field, such as `model.kind=gru.py:GRU`.
    """
    names = sorted((*MODULES, *MODELS[model].files, *OPTIMIZERS[optimizer].files))
    found = {name: (REPOSITORY / name).read_bytes() for name in names} | contents(model, optimizer)
    return {name: source_hash(source) for name, source in found.items()}


def source_hash(source: str | bytes) -> str:
    """Return the hash of a module's syntax tree."""
    tree = _content(ast.parse(source))
    return hashlib.sha256(repr(tree).encode()).hexdigest()[:16]


def _content(node: Any) -> Any:
    """Return a syntax tree as nested tuples, without strings that stand alone, such as docstrings.

    Fields that are empty are left out: later versions of Python have more of them.
    """
    if isinstance(node, list):
        return tuple(_content(part) for part in node if not _is_docstring(part))
    if not isinstance(node, ast.AST):
        return node
    if isinstance(node, ast.Constant):
        return ("Constant", type(node.value).__name__, node.value)
    fields = [
        (name, _content(value))
        for name, value in ast.iter_fields(node)
        if value not in (None, []) and name != "ctx"
    ]
    return (type(node).__name__, *fields)


def _is_docstring(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def sources_sha256(directory: Path) -> str:
    """Return the SHA-256 of names, sizes and contents of the Python files of our packages."""
    names = [
        path.relative_to(directory).as_posix()
        for package in PACKAGES
        for path in (directory / package).rglob("*.py")
    ]
    digest = hashlib.sha256()
    for name in sorted(names):
        content = (directory / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
