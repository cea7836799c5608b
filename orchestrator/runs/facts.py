"""Facts about a run for MLflow: fields, model size, dataset, sources."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from model import flops, models, optim
from model.gpt_config import GPTConfig
from orchestrator.cluster import connection
from orchestrator.config.experiment import Experiment
from orchestrator.config.sections import ParameterGroups
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
        params[f"derived.{name}"] = value
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
    """Return the size of the model. For a GPT-2 with usual weight decay, torch is not imported."""
    config = experiment.model_config_for(n_vocab)
    if not isinstance(config, GPTConfig):
        return _facts_of(experiment, config)
    facts = _facts_of_gpt2(config)
    if experiment.optim.weight_decay and experiment.optim.groups == ParameterGroups():
        return facts
    model = models.empty_model(experiment.model.kind, config)
    return {**facts, **_decay_of(experiment, model)}


@functools.cache
def _facts_of_gpt2(config: GPTConfig) -> ModelFacts:
    decay = flops.decay_summary(config)
    return {
        "vocab_size": config.vocab_size,
        "parameters": flops.parameter_count(config),
        "parameters_without_positions": flops.parameter_count(config, positions=False),
        "decayed_tensors": decay.decayed_tensors,
        "decayed_parameters": decay.decayed_parameters,
        "undecayed_tensors": decay.undecayed_tensors,
        "undecayed_parameters": decay.undecayed_parameters,
        "matrix_parameters": 12 * config.n_layer * config.n_embd**2,
        "flops_per_token": flops.flops_per_token(config),
    }


def _facts_of(experiment: Experiment, config: "Config") -> ModelFacts:
    """Count the parameters of a model without values."""
    from model.protocol import HasFlops, HasParameterGroups

    model = models.empty_model(experiment.model.kind, config)
    count = sum(parameter.numel() for parameter in model.parameters())
    matrices = 0
    if isinstance(model, HasParameterGroups):
        names = model.parameter_groups()["matrix"]
        matrices = sum(model.get_parameter(name).numel() for name in names)
    return {
        "vocab_size": config.vocab_size,
        "parameters": count,
        "parameters_without_positions": count,
        **_decay_of(experiment, model),
        "matrix_parameters": matrices,
        "flops_per_token": (
            model.flops_per_token(config.block_size) if isinstance(model, HasFlops) else None
        ),
    }


def _decay_of(experiment: Experiment, model: "LanguageModel") -> DecayFacts:
    groups = optim.parameter_groups(experiment.optim.kind, model, experiment.optimizer_settings())
    counts: dict[bool, list[int]] = {True: [], False: []}
    for group in groups:
        counts[group["weight_decay"] > 0] += [tensor.numel() for tensor in group["params"]]
    return {
        "decayed_tensors": len(counts[True]),
        "decayed_parameters": sum(counts[True]),
        "undecayed_tensors": len(counts[False]),
        "undecayed_parameters": sum(counts[False]),
    }
