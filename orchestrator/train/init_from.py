"""First weights of a run, from the source that `train.init_from` names.

Sources: random, OpenAI's GPT-2 or another Hugging Face folder, a nanoGPT `ckpt.pt`, a run or a
checkpoint of this program.

Drivers check names with this module, so torch is imported only when weights are opened.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.gpt_config import GPT2_SIZES, GPTConfig
from model.models import DEFAULT, fields_of
from orchestrator.checkpoint import store
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError
from orchestrator.files import replacement
from orchestrator.mirror import remote
from orchestrator.objects.address import is_address
from orchestrator.own_code import plain
from orchestrator.paths import cache_folder, expand_home
from orchestrator.runs.folder import RunFolder
from orchestrator.text import differences
from orchestrator.train import find

if TYPE_CHECKING:
    from model.protocol import Config, LanguageModel
    from model.weights import StateDict

SCRATCH = "scratch"
MAX_PADDING = 1024  # with more vocabulary rows beyond the tokens, it is another tokenizer
HUB = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"

# What a pickled number of numpy refers to. The name of the function is that of numpy 1 or 2.
NUMPY_NUMBERS: list[Any] = [
    np.dtype,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
    *(
        (np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar")
        for core in ("core", "_core")
    ),
]


@dataclass(frozen=True)
class FirstWeights:
    """Weights that `load` reads, of a model of this kind and these settings."""

    shape: Config
    load: Callable[[], StateDict]
    kind: str = DEFAULT


def initial_model(experiment: Experiment, n_vocab: int) -> LanguageModel:
    """Return a model of the experiment's shape on the CPU, with its first weights.

    A longer context is cropped, and vocabulary rows are padded or cut.

    Raises:
        UserError: See `require_init_from_exists` and `check_shape`, or the weights cannot be read.
    """
    import torch

    from model import models, weights

    name = experiment.train.init_from
    if name == SCRATCH:
        torch.manual_seed(experiment.train.seed)
        return experiment.new_model(n_vocab)
    source = _open_fitting(experiment, n_vocab)
    kind = experiment.model.kind
    model = models.empty_model(kind, experiment.model_config_for(n_vocab), "cpu")
    with _as_user_error(name):
        tensors = source.load()
        weights.check_values(tensors)
        if source.kind == DEFAULT:
            positions = tensors[weights.POSITIONS]
            tensors[weights.POSITIONS] = positions[: model.config.block_size].clone()
            tensors = weights.pad_vocab(tensors, model.config.vocab_size)
        model.load_state_dict(tensors)
    return model


def require_init_from_exists(experiment: Experiment) -> None:
    """Check that `train.init_from` names a model that exists. A run in a mirror is copied.

    Raises:
        UserError: It does not exist, or is something else.
    """
    name = experiment.train.init_from
    if name == SCRATCH or name in GPT2_SIZES:
        return
    path = _source(name)
    if path.is_file() or (path / "config.json").is_file():
        return
    try:
        is_found = find.is_model(RunFolder(path))
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from None
    if not is_found:
        problem = "is not the folder of a model" if path.exists() else "does not exist"
        raise UserError(
            f"train.init_from: '{name}' {problem}; use {SCRATCH}, one of {', '.join(GPT2_SIZES)}, "
            "a Hugging Face folder, a nanoGPT ckpt.pt, or a run or checkpoint folder, also s3://… "
            "in a mirror"
        )


@functools.cache  # a process uses one state of a run that may go on
def _source(name: str) -> Path:
    """Return where first weights are; a run in a mirror is copied to this machine."""
    return expand_home(remote.here(name, "train.init_from") if is_address(name) else name)


def check_shape(experiment: Experiment, n_vocab: int) -> None:
    """Check that the weights fit the model and the tokenizer. No weights are read.

    Raises:
        UserError: The vocabulary or the shape differs; the message names every difference.
    """
    if experiment.train.init_from != SCRATCH:
        _open_fitting(experiment, n_vocab)


def with_absolute_path(experiment: Experiment) -> Experiment:
    """Make `train.init_from` absolute, because workers run in another directory."""
    source = expand_home(experiment.train.init_from)
    if not source.exists():
        return experiment  # scratch, a name, or a mistake that `require_init_from_exists` finds
    return experiment.replace(train__init_from=str(source.absolute()))


def _open_fitting(experiment: Experiment, n_vocab: int) -> FirstWeights:
    """Open `train.init_from`; see `check_shape`."""
    name = experiment.train.init_from
    source = _open(experiment)
    rows = source.shape.vocab_size
    if not n_vocab <= rows <= n_vocab + MAX_PADDING:
        raise UserError(
            f"train.init_from: {name} has {rows:,} vocabulary rows, data.tokenizer="
            f"{experiment.data.tokenizer} has {n_vocab:,} tokens; use the tokenizer that it was "
            "trained with"
        )
    wanted = experiment.model_config_for(n_vocab)
    found = differences({"kind": plain(source.kind)}, {"kind": plain(experiment.model.kind)})
    if not found:
        found = differences(_usable(source, wanted), fields_of(wanted))
    if found:
        raise UserError(
            f"train.init_from: {name} has another shape: model.{'; model.'.join(found)}"
        )
    return source


def _usable(source: FirstWeights, wanted: Config) -> dict[str, Any]:
    """Return the settings that the weights can be used with. Dropout has no weights."""
    usable = fields_of(source.shape)
    now = fields_of(wanted)
    if "dropout" in now:
        usable["dropout"] = now["dropout"]
    if source.kind == DEFAULT:
        usable["vocab_size"] = wanted.vocab_size
        usable["block_size"] = min(source.shape.block_size, wanted.block_size)
    return usable


def _open(experiment: Experiment) -> FirstWeights:
    from orchestrator.train.state import stored_config

    require_init_from_exists(experiment)
    name = experiment.train.init_from
    path = _source(name)
    with _as_user_error(name):
        if name in GPT2_SIZES:
            return _open_hugging_face(_download(name))
        if path.is_file():
            return _open_nanogpt(path)
        if (path / "config.json").is_file():
            return _open_hugging_face(path)
        found = find.checkpoint_of(path)
        content = store.Content(found)
        kind, config = stored_config(content)
        return FirstWeights(config, lambda: content.tensors("model"), kind)


def _open_hugging_face(folder: Path) -> FirstWeights:
    from safetensors.torch import load_file

    from model import weights

    config = json.loads((folder / "config.json").read_text("utf-8"))
    names = _weight_files(folder)
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"train.init_from: {folder} has no {name}; copy it there, or save the model with "
                "safe_serialization=True"
            )
    shape = weights.config_from_huggingface(config)

    def load() -> StateDict:
        tensors: StateDict = {}
        for name in names:
            tensors |= load_file(folder / name)
        return weights.from_huggingface(tensors)

    return FirstWeights(shape, load)


def _weight_files(folder: Path) -> list[str]:
    """Return the files with the weights: one, or those that the index of a large model lists."""
    whole = "model.safetensors"
    index = folder / f"{whole}.index.json"
    if (folder / whole).is_file() or not index.is_file():
        return [whole]
    names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
            raise UserError(f"train.init_from: {index}: '{name}' is not the name of a file")
    return names


def _open_nanogpt(file: Path) -> FirstWeights:
    import torch

    from model import weights

    # The only unpickling in this program. weights_only admits tensors and plain values, and here
    # also numbers of numpy: nanoGPT stores the best loss as it was computed.
    try:
        with torch.serialization.safe_globals(NUMPY_NUMBERS):
            stored = torch.load(file, map_location="cpu", weights_only=True)
        arguments = stored["model_args"]
    except Exception as error:  # torch raises many types for files of another format
        raise UserError(
            f"train.init_from: {file} is not a nanoGPT checkpoint that loads with weights_only "
            f"({type(error).__name__})"
        ) from None
    return FirstWeights(GPTConfig(**arguments), lambda: weights.from_nanogpt(stored["model"]))


def _download(name: str) -> Path:
    """Return the cache folder with OpenAI's weights; download missing files."""
    folder = cache_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        if (folder / file).is_file():
            continue
        url = HUB.format(name=name, file=file)
        try:
            with (
                urllib.request.urlopen(url, timeout=30) as response,
                replacement(folder / file) as temporary,
                open(temporary, "wb") as out,
            ):
                shutil.copyfileobj(response, out)
        except OSError as error:
            raise UserError(
                f"train.init_from: {name} is not in {folder} and {url} cannot be reached "
                f"({error}); put config.json and model.safetensors there"
            ) from None
    return folder


@contextlib.contextmanager
def _as_user_error(name: str) -> Iterator[None]:
    """Convert errors in loading a user's file to UserError."""
    from orchestrator.train.state import NOT_LOADABLE

    try:
        yield
    except UserError:
        raise
    except NOT_LOADABLE as error:
        reason = " ".join(str(error).split())[:400]
        raise UserError(f"train.init_from: {name}: {reason}") from None
