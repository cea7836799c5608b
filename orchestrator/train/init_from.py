"""Where a run's first weights come from: `train.init_from`.

Eats an experiment and the real vocabulary size; yields a GPT of exactly the experiment's shape on the CPU: random, or
OpenAI's GPT-2 or another Hugging Face folder, or a nanoGPT `ckpt.pt`, or a run or checkpoint of ours.
"""

import contextlib
import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from model import weights
from model.gpt import GPT, GPTConfig
from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import Experiment
from orchestrator.errors import UserError
from orchestrator.train import state

MAX_PADDING = 1024  # vocabulary rows beyond the tokenizer's; more means another tokenizer
HUB = "https://huggingface.co/openai-community/{name}/resolve/main/{file}"
Source = tuple[GPTConfig, Callable[[], dict[str, torch.Tensor]]]


def initial_model(experiment: Experiment, n_vocab: int) -> GPT:
    """A GPT of the experiment's shape with the weights that `train.init_from` names.

    A longer context is cropped and vocabulary rows are padded or cut; every other difference of shape is refused.
    """
    wanted, source = experiment.gpt_config(n_vocab), experiment.train.init_from
    if source == "scratch":
        torch.manual_seed(experiment.train.seed)
        return experiment.new_model(n_vocab)
    check_shape(experiment, n_vocab)
    _, load = _open(source)
    model = experiment.new_model(n_vocab)
    with _explained(source):
        tensors = load()
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][
            : wanted.block_size
        ].clone()
        model.load_state_dict(weights.pad_vocab(tensors, wanted.vocab_size))
    return model


def check(experiment: Experiment) -> None:
    """Refuse a `train.init_from` that leads nowhere, before anything is prepared; reads no weights."""
    _check_exists(experiment.train.init_from)


def with_absolute_path(experiment: Experiment) -> Experiment:
    """Workers run in another folder: a relative `train.init_from` is one of this one's."""
    source = Path(experiment.train.init_from).expanduser()
    if not source.exists():
        return experiment  # scratch, a name, or a mistake that is told where it is read
    return experiment.replace(train__init_from=str(source.absolute()))


def _check_exists(source: str) -> None:
    if source == "scratch" or source in weights.GPT2_SIZES or Path(source).expanduser().exists():
        return
    raise UserError(
        f"train.init_from: '{source}' does not exist; use scratch, one of {', '.join(weights.GPT2_SIZES)}"
        f", a Hugging Face folder, a nanoGPT ckpt.pt, or a run or checkpoint folder"
    )


def check_shape(experiment: Experiment, n_vocab: int) -> None:
    """Refuse weights of another shape or vocabulary, naming every difference; reads their configuration alone."""
    wanted, source = experiment.gpt_config(n_vocab), experiment.train.init_from
    if source == "scratch":
        return
    config, _ = _open(source)
    if not n_vocab <= config.vocab_size <= n_vocab + MAX_PADDING:
        raise UserError(
            f"train.init_from: {source} has {config.vocab_size:,} vocabulary rows, data.tokenizer="
            f"{experiment.data.tokenizer} has {n_vocab:,} tokens; use the tokenizer that it was trained with"
        )
    fits = replace(
        config,
        vocab_size=wanted.vocab_size,
        dropout=wanted.dropout,
        block_size=min(config.block_size, wanted.block_size),
    )
    differences = [
        f"model.{k}={v} there and {asdict(wanted)[k]} here"
        for k, v in asdict(fits).items()
        if v != asdict(wanted)[k]
    ]
    if differences:
        raise UserError(f"train.init_from: {source} has another shape: {'; '.join(differences)}")


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the latest valid one of a run's folder."""
    if (path / checkpoint.MANIFEST).is_file():
        checkpoint.verify(path)
        return path
    found = checkpoint.latest_valid(path / "checkpoints")
    if found is None:
        raise UserError(
            f"{path}: neither a checkpoint nor a run with one; give <storage>/<name> or a folder "
            f"step-… below its checkpoints/"
        )
    return found


@contextlib.contextmanager
def _explained(source: str) -> Iterator[None]:
    """What is wrong with somebody's files is somebody's to mend."""
    try:
        yield
    except UserError:
        raise
    except (
        AttributeError,
        KeyError,
        OSError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(
            f"train.init_from: {source}: {' '.join(str(error).split())[:400]}"
        ) from None


def _open(source: str) -> Source:
    """The shape of the weights that `source` names, and a function that reads them."""
    _check_exists(source)
    path = Path(source).expanduser()
    with _explained(source):
        if source in weights.GPT2_SIZES:
            return _open_hugging_face(_download(source))
        if path.is_file():
            return _open_nanogpt(path)
        if (path / "config.json").is_file():
            return _open_hugging_face(path)
        found = checkpoint_of(path)
        return state.shape_of(found), lambda: checkpoint.load_tensors(found, "model")


def _open_hugging_face(folder: Path) -> Source:
    config = weights.config_from_huggingface(
        json.loads((folder / "config.json").read_text("utf-8"))
    )
    file = folder / "model.safetensors"
    if not file.is_file():
        raise UserError(
            f"train.init_from: {folder} has no model.safetensors; save it with safe_serialization=True"
        )
    return config, lambda: weights.from_huggingface(load_file(file))


def _open_nanogpt(file: Path) -> Source:
    # The one place that unpickles, on explicit request, and only tensors and plain values.
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        arguments = stored["model_args"]
    except Exception as error:
        raise UserError(
            f"train.init_from: {file} is no nanoGPT checkpoint that loads with weights_only "
            f"({error.__class__.__name__})"
        ) from None
    return GPTConfig(**arguments), lambda: weights.from_nanogpt(stored["model"])


def _download(name: str) -> Path:
    """OpenAI's weights, from the network once and from the cache ever after."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "espalier" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            url = HUB.format(name=name, file=file)
            part = folder / f".{file}.{os.getpid()}"
            try:
                with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as out:
                    shutil.copyfileobj(response, out)
            except OSError as error:
                raise UserError(
                    f"train.init_from: {name} is not in {folder} and {url} cannot be reached ({error}); "
                    f"put config.json and model.safetensors there"
                ) from None
            os.replace(part, folder / file)
    return folder
