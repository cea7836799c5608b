"""Facts about a run for MLflow: fields, model size, dataset, sources."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from model import flops, models, optim
from model.gpt_config import GPTConfig
from model.modern_config import ModernConfig
from orchestrator.cluster import connection
from orchestrator.code_hashes import source_hash
from orchestrator.config.experiment import Experiment
from orchestrator.data.corpus import entries_of, without_hash
from orchestrator.data.dataset import Manifest
from orchestrator.runs.folder import RunFacts
from orchestrator.runs.sources import CodeVersion, source_facts, source_tags

if TYPE_CHECKING:
    from model.protocol import Config, LanguageModel

REPOSITORY = Path(__file__).resolve().parents[2]


class DecayFacts(TypedDict):
    """Number of tensors and parameters with weight decay, and without."""

    decayed_tensors: int
    decayed_parameters: int
    undecayed_tensors: int
    undecayed_parameters: int


class ModelFacts(DecayFacts):
    """Size of a model."""

    vocab_size: int  # with padding
    parameters: int
    parameters_without_positions: int
    matrix_parameters: int  # of the group "matrix"; 0 if the model has no groups
    matrix_sizes: list[int]  # of each matrix of this group
    flops_per_token: int | None  # forward and backward; None: the model does not say


def facts_of(
    experiment: Experiment, dataset: Manifest, script: str = "pipelines/train.py"
) -> RunFacts:
    """Return params, tags and dataset of an experiment.

    Args:
        experiment: The experiment.
        dataset: The dataset for it.
        script: The command; MLflow shows it as the source.
    """
    params = experiment.flat()
    for name, value in model_facts(experiment, dataset.tokenizer["n_vocab"]).items():
        if name != "matrix_sizes":
            params[f"derived.{name}"] = value
    if experiment.train.batch_schedule is None:
        params["derived.tokens_per_step"] = experiment.tokens_per_step
    params["derived.reduction_slots"] = experiment.slots

    described = {
        "name": f"{_corpus_names(experiment)} as {dataset.tokenizer['name']}",
        "digest": dataset.digest,
        "source": str(dataset.directory),
    }
    tokens = {f"{name}_tokens": split.tokens for name, split in dataset.splits.items()}
    return {
        "params": {key: value for key, value in params.items() if value is not None},
        "tags": source_tags(own_sources(), script, ray_job_id=connection.job_id()),
        "dataset": described | tokens,
    }


def _corpus_names(experiment: Experiment) -> str:
    """Return the last part of each corpus, such as `tinyshakespeare.txt`."""
    entries = map(without_hash, entries_of(experiment.data.corpus))
    names = [entry.rstrip("/").rpartition("/")[2] for entry in entries]
    return ", ".join(names)


@functools.cache
def own_sources() -> CodeVersion:
    """Return which code this process runs. Git is called once, also for a sweep of many trials."""
    return source_facts(REPOSITORY)


def model_facts(experiment: Experiment, n_vocab: int) -> ModelFacts:
    """Return the size of the model. Torch is imported only to count a model that `flops` cannot."""
    config = experiment.model_config_for(n_vocab)
    if not _is_counted(experiment.model.kind):
        return _facts_of(experiment, config)
    assert isinstance(config, (GPTConfig, ModernConfig))
    sizes = flops.sizes_of(config)
    decayed: dict[bool, list[int]] = {True: [], False: []}
    for group, numbers in sizes.items():
        decayed[_has_decay(experiment, group)] += numbers
    count = sum(map(sum, sizes.values()))
    return {
        "vocab_size": config.vocab_size,
        "parameters": count,
        "parameters_without_positions": count - flops.position_parameters(config),
        **_decay_facts(decayed),
        "matrix_parameters": sum(sizes["matrix"]),
        "matrix_sizes": sizes["matrix"],
        "flops_per_token": flops.flops_per_token(config),
    }


@functools.cache
def _is_counted(kind: str) -> bool:
    """Return whether `flops.sizes_of` holds: not for a user's model, or one that was edited."""
    if kind not in flops.COUNTED:
        return False
    source = (REPOSITORY / models.MODELS[kind].files[0]).read_bytes()
    return source_hash(source) == flops.COUNTED[kind]


def _has_decay(experiment: Experiment, group: str) -> bool:
    """Return whether `optim.parameter_groups` gives a group a weight decay above 0."""
    own = getattr(experiment.optim.groups, group).weight_decay
    general = 0.0 if group == "scalar" else experiment.optim.weight_decay
    return (general if own is None else own) > 0


def _facts_of(experiment: Experiment, config: "Config") -> ModelFacts:
    """Count the parameters of a model without values."""
    from model.protocol import HasFlops, HasParameterGroups

    model = models.empty_model(experiment.model.kind, config)
    count = sum(parameter.numel() for parameter in model.parameters())
    names: Sequence[str] = []
    if isinstance(model, HasParameterGroups):
        names = model.parameter_groups().get("matrix", [])
    matrices = [model.get_parameter(name).numel() for name in names]
    return {
        "vocab_size": config.vocab_size,
        "parameters": count,
        "parameters_without_positions": count,
        **_decay_of(experiment, model),
        "matrix_parameters": sum(matrices),
        "matrix_sizes": matrices,
        "flops_per_token": (
            model.flops_per_token(config.block_size) if isinstance(model, HasFlops) else None
        ),
    }


def _decay_of(experiment: Experiment, model: "LanguageModel") -> DecayFacts:
    groups = optim.parameter_groups(experiment.optim.kind, model, experiment.optimizer_settings())
    decayed: dict[bool, list[int]] = {True: [], False: []}
    for group in groups:
        decayed[group["weight_decay"] > 0] += [tensor.numel() for tensor in group["params"]]
    return _decay_facts(decayed)


def _decay_facts(decayed: dict[bool, list[int]]) -> DecayFacts:
    return {
        "decayed_tensors": len(decayed[True]),
        "decayed_parameters": sum(decayed[True]),
        "undecayed_tensors": len(decayed[False]),
        "undecayed_parameters": sum(decayed[False]),
    }
