"""A trained model, ready to be used: what sampling, evaluating and whatever else comes after training open first.

Eats the name or folder of a run, the folder of a checkpoint, or a GPT-2 of Hugging Face; yields the model on a device
beside its tokenizer and the experiment that made it. Every byte of a checkpoint is verified before it is loaded.
"""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import weights
from model.gpt import GPT
from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import Data, Experiment, Model, Train, load_experiment
from orchestrator.data.dataset import Manifest, data_identity, load_manifest
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import dataset_dir
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.runs.storage import storage_root
from orchestrator.train import state
from orchestrator.train.init_from import initial_model
from orchestrator.train.numerics import Worker, available_cpus, prepare_process


@dataclass(frozen=True)
class Trained:
    """`model` is on `device`, in evaluation mode. `checkpoint` and `manifest` are None for weights from elsewhere."""

    model: GPT
    tokenizer: Any
    experiment: Experiment
    device: str
    checkpoint: Path | None = None
    manifest: dict[str, Any] | None = None


def warn(line: str) -> None:
    """Beside the result, not in it."""
    print(line, file=sys.stderr, flush=True)


def find_checkpoint(word: str, *, best: bool = False) -> Path:
    """The verified checkpoint that `word` means.

    Args:
        word: a checkpoint's folder, a run's folder, or a run's name below the storage. Of a run it is the latest valid
            checkpoint; damaged ones are passed over with a word.
        best: of a run, the checkpoint with the lowest val loss instead.

    Raises:
        UserError: names the places that were looked at, or the part of the checkpoint that is damaged.
    """
    places = _places(word)
    for place in places:
        if (place / checkpoint.MANIFEST).is_file() and not best:
            checkpoint.verify(place)
            return place
        if (place / "checkpoints").is_dir():
            return _of_run(place / "checkpoints", best)
    if best and any((place / checkpoint.MANIFEST).is_file() for place in places):
        raise UserError(
            f"--best: {word} is one checkpoint; give the run's folder to choose among its checkpoints"
        )
    raise UserError(
        f"{word}: no run and no checkpoint at {' or '.join(map(str, places))}; give a run's folder, the "
        f"name of a run in the storage ($ESPALIER_STORAGE), or a folder step-… below a run's checkpoints/"
    )


def open_checkpoint(
    path: Path, device: str, overrides: list[str] | tuple[str, ...] = ()
) -> Trained:
    """Load a verified checkpoint; the process is set up as a worker of that run is (threads, TF32)."""
    manifest = checkpoint.read_manifest(path)
    experiment = load_experiment(path / "experiment.yaml", overrides)
    cpus = experiment.compute.cpus_per_worker
    if cpus == "auto":
        cpus = min(manifest["fingerprints"]["numerics"]["cpus_per_worker"], available_cpus())
    prepare_process(experiment, Worker(device=device, cpus=cpus))
    tokenizer = load_tokenizer(experiment.data.tokenizer, path)
    return Trained(state.load_model(path).to(device), tokenizer, experiment, device, path, manifest)


def open_gpt2(source: str, device: str, dtype: str) -> Trained:
    """Load `gpt2`, `gpt2-medium` … (downloaded once) or a Hugging Face folder with GPT-2's vocabulary."""
    config = weights.GPT2_SIZES.get(source) or _config_of(Path(source).expanduser())
    shape = {
        key: getattr(config, key)
        for key in ("block_size", "n_layer", "n_head", "n_embd", "bias", "activation")
    }
    experiment = Experiment(
        data=Data(tokenizer="gpt2", append_eot=True),
        train=Train(init_from=source, dtype=dtype),
        model=Model(pad_vocab_to=config.vocab_size, **shape),
    )
    tokenizer = load_tokenizer("gpt2", None)
    if not tokenizer.n_vocab <= config.vocab_size < tokenizer.n_vocab + 128:
        raise UserError(
            f"{source}: a vocabulary of {config.vocab_size:,} is not GPT-2's ({tokenizer.n_vocab:,}), so "
            f"its tokenizer is unknown; give a run or a checkpoint"
        )
    prepare_process(experiment, Worker(device=device, cpus=available_cpus()))
    model = initial_model(experiment, tokenizer.n_vocab)
    return Trained(model.eval().to(device), tokenizer, experiment, device)


def is_gpt2(word: str) -> bool:
    """Does `word` name weights of Hugging Face and not something of ours?"""
    if (Path(word).expanduser() / "config.json").is_file():
        return True
    return word in weights.GPT2_SIZES and not any(place.exists() for place in _places(word))


def tokens_of(trained: Trained) -> Manifest:
    """The dataset that a checkpoint was trained on, wherever `find_tokens` finds it.

    Raises:
        UserError: the tokens there are others.
    """
    wanted = trained.manifest["fingerprints"]["data"]
    found = find_tokens(trained.experiment, wanted, *trained.checkpoint.absolute().parents[2:3])
    if data_identity(found) != wanted:
        raise UserError(
            f"data.dir: the tokens in {found.directory} are not those that {trained.checkpoint} was "
            f"trained on; name the folder that holds them: data.dir=…"
        )
    return found


def find_tokens(experiment: Experiment, wanted: str, *beside: Path) -> Manifest:
    """The dataset of an experiment: in `data.dir`, else the one of identity `wanted` wherever it lies below the storage or
    the storages `beside`, else what its corpus gives today, which may be another."""
    data, storage = experiment.data, storage_root(experiment)
    if data.dir is not None:
        return load_manifest(dataset_dir(data, storage))
    near = (m for folder in (storage, *beside) for m in _datasets(folder / "data"))
    return next((m for m in near if data_identity(m) == wanted), None) or prepare(
        data, dataset_dir(data, storage)
    )


def find_device(name: str) -> str:
    """`auto` is the first GPU if torch sees one, else the CPU; anything else is a device of torch's that must work."""
    if name in ("auto", "cuda"):
        name = "cuda:0" if name == "cuda" or torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # torch has no common class for these
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--device: '{name}' cannot be used here ({reason}); try auto or cpu"
        ) from None
    return name


def _datasets(folder: Path) -> list[Manifest]:
    """The finished datasets in a storage's `data/`."""
    found = []
    for file in sorted(folder.glob("*/manifest.json")):
        with contextlib.suppress(UserError):  # of another format: not ours to judge here
            found.append(load_manifest(file.parent))
    return found


def _places(word: str) -> list[Path]:
    """Where `word` may lie: as a path and, a bare name, below the storage."""
    path = Path(word).expanduser()
    bare = len(path.parts) == 1 and not word.startswith(("~", "."))
    return [path, storage_root(Experiment()) / word] if bare else [path]


def _of_run(folder: Path, best: bool) -> Path:
    if best:
        step = checkpoint.best(folder)
        if step is None:
            raise UserError(
                f"--best: no checkpoint in {folder} has a val loss (train.eval_interval was off there)"
            )
        checkpoint.verify(checkpoint.path_of(folder, step))
        return checkpoint.path_of(folder, step)
    found = checkpoint.latest_valid(folder, warn)
    if found is None:
        raise UserError(f"{folder}: holds no checkpoint that can be used; train first")
    return found


def _config_of(folder: Path):
    try:
        return weights.config_from_huggingface(
            json.loads((folder / "config.json").read_text("utf-8"))
        )
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
