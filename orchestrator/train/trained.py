"""Loads a trained model that `find` has found, for sampling and evaluation."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from model import weights
from model.gpt_config import GPT2_SIZES, GPTConfig
from model.protocol import LanguageModel
from orchestrator.checkpoint import store
from orchestrator.checkpoint.format import CheckpointManifest
from orchestrator.config.experiment import Experiment, field_docs, parse_experiment
from orchestrator.config.load import apply_override
from orchestrator.data.dataset import Manifest, data_identity, load_manifest
from orchestrator.data.prepare import prepare_in
from orchestrator.data.prepared import dataset_dir
from orchestrator.data.tokenizer import Tokenizer, load_tokenizer
from orchestrator.errors import UserError
from orchestrator.machine import available_cpus
from orchestrator.paths import expand_home
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import storage_root
from orchestrator.train.init_from import initial_model
from orchestrator.train.numerics import Worker, prepare_process
from orchestrator.train.state import load_model


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        model: The model on `device`, in evaluation mode.
        tokenizer: Its tokenizer.
        experiment: Configuration of the run that trained it.
        device: torch's name of the device.
        checkpoint: Folder of the checkpoint; None for weights from elsewhere.
        manifest: Manifest of the checkpoint; None for weights from elsewhere.
        is_ema: The model has the moving average of the weights.
    """

    model: LanguageModel
    tokenizer: Tokenizer
    experiment: Experiment
    device: str
    checkpoint: Path | None = None
    manifest: CheckpointManifest | None = None
    is_ema: bool = False


def open_checkpoint(
    path: Path, device: str, overrides: Sequence[str] = (), *, ema: bool = False
) -> Trained:
    """Load a verified checkpoint.

    The process is prepared as a worker of the run was, so that results have the same bits.

    Args:
        path: Folder of the checkpoint.
        device: torch's name of the device.
        overrides: `section.field=value` for the experiment of the checkpoint.
        ema: Load the moving average of the weights.

    Raises:
        UserError: An override is wrong, there is no average, or another version of this program
            wrote the checkpoint.
    """
    content = store.Content(path)
    tree = RunFolder(path).read_experiment().model_dump()
    for override in overrides:
        apply_override(tree, override, field_docs(tree["model"]["kind"]))
    experiment = parse_experiment(tree, str(path))
    cpus: int = content.manifest["fingerprints"]["numerics"]["cpus_per_worker"]
    if isinstance(experiment.compute.cpus_per_worker, int):
        cpus = experiment.compute.cpus_per_worker
    else:
        cpus = min(cpus, available_cpus())
    prepare_process(experiment, Worker(device=device, cpus=cpus))
    tokenizer = load_tokenizer(experiment.data.tokenizer, path)
    if ema and experiment.train.ema is None:
        raise UserError(f"--ema: {path} has no average of the weights, as train.ema was null")
    model = load_model(content, part="ema" if ema else "model").to(device)
    return Trained(model, tokenizer, experiment, device, path, content.manifest, ema)


# ---- weights of GPT-2 ----


def open_gpt2(source: str, device: str, dtype: str) -> Trained:
    """Load "gpt2", "gpt2-medium", … (downloaded once) or a Hugging Face folder.

    Args:
        source: Name or folder.
        device: torch's name of the device.
        dtype: Type of matrix products.

    Raises:
        UserError: The weights cannot be read, or have another vocabulary than GPT-2.
    """
    shape = GPT2_SIZES.get(source) or _shape_of_folder(expand_home(source))
    tokenizer = load_tokenizer("gpt2")
    if not tokenizer.n_vocab <= shape.vocab_size < tokenizer.n_vocab + 128:
        raise UserError(
            f"{source}: has {shape.vocab_size:,} vocabulary rows, GPT-2 has "
            f"{tokenizer.n_vocab:,}: its tokenizer is unknown; give a run or a checkpoint"
        )
    fields = ("block_size", "n_layer", "n_head", "n_embd", "bias", "activation")
    sections = {
        "data": {"tokenizer": "gpt2", "append_eot": True},
        "train": {"init_from": source, "dtype": dtype},
        "model": {name: getattr(shape, name) for name in fields}
        | {"pad_vocab_to": shape.vocab_size},
    }
    experiment = parse_experiment(sections, source)
    prepare_process(experiment, Worker(device=device, cpus=available_cpus()))
    model = initial_model(experiment, tokenizer.n_vocab)
    return Trained(model.eval().to(device), tokenizer, experiment, device)


def _shape_of_folder(folder: Path) -> GPTConfig:
    file = folder / "config.json"
    try:
        return weights.config_from_huggingface(json.loads(file.read_text("utf-8")))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None


# ---- datasets and devices ----


def tokens_of(trained: Trained) -> Manifest:
    """Return the dataset that a checkpoint was trained on; see `find_tokens`.

    Raises:
        UserError: That dataset was not found.
    """
    assert trained.checkpoint is not None and trained.manifest is not None
    wanted = trained.manifest["fingerprints"]["data"]
    found = find_tokens(trained.experiment, wanted, trained.checkpoint)
    if data_identity(found) != wanted:
        raise UserError(
            f"data.dir: the tokens in {found.directory} are not those that {trained.checkpoint} "
            "was trained on; name the folder that has them: data.dir=…"
        )
    return found


def find_tokens(experiment: Experiment, wanted: str, place: Path) -> Manifest:
    """Return the dataset of an experiment.

    Args:
        experiment: The configuration. If `data.dir` is set, that dataset is returned.
        wanted: `data_identity` of the dataset. If no storage has it, the corpus is prepared again;
            the result differs if the corpus has changed.
        place: Folder of a run or checkpoint. After the storage of the experiment, each folder
            around it is searched as if it were a storage: a trial is deeper in it than a run.

    Raises:
        UserError: No storage has the dataset, and its corpus cannot be prepared again.
    """
    data = experiment.data
    storage = storage_root(experiment)
    if data.dir is not None:
        return load_manifest(dataset_dir(data, storage))
    for folder in (storage, *place.absolute().parents):
        for dataset in _datasets(folder / "data"):
            if data_identity(dataset) == wanted:
                return dataset
    try:
        return prepare_in(data, storage)
    except UserError as error:
        reason = " ".join(str(error).splitlines())
        raise UserError(
            f"data.dir: the tokens that {place} was trained on are not in {storage}/data nor in a "
            f"folder data around it, and cannot be prepared again ({reason}); name the folder that "
            "has them: data.dir=…"
        ) from None


def _datasets(folder: Path) -> list[Manifest]:
    """Return the complete datasets in `data/` of a storage; those of other formats are skipped."""
    found = []
    for file in sorted(folder.glob("*/manifest.json")):
        with contextlib.suppress(UserError):
            found.append(load_manifest(file.parent))
    return found


def find_device(name: str) -> str:
    """Return torch's name of a device that works.

    Args:
        name: "auto" is the first GPU if torch finds one, else the CPU. Others are torch's names.

    Raises:
        UserError: The device cannot be used.
    """
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    elif name == "cuda":
        name = "cuda:0"
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # these errors of torch have no common class
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--device: '{name}' cannot be used here ({reason}); try auto or cpu"
        ) from None
    return name
