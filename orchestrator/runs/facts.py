"""What the tracking server is told of a run: every field and what follows from it, the dataset, the sources.

Eats an experiment and its dataset; yields `params`, `tags` and `dataset` for run.json, without secrets.
"""

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model import optim
from model.flops import flops_per_token
from model.gpt import GPT, GPTConfig
from orchestrator.cluster import layout as launch
from orchestrator.config.experiment import Experiment
from orchestrator.data.dataset import Manifest
from orchestrator.redact import redact
from orchestrator.runs.sources import source_facts, source_tags

SOURCES = Path(__file__).resolve().parents[2]


def facts_of(
    experiment: Experiment, dataset: Manifest, script: str = "pipelines/train.py"
) -> dict[str, Any]:
    """`params`, `tags` and `dataset` of an experiment that `script` runs."""
    derived = model_facts(experiment, dataset.tokenizer["n_vocab"])
    params = {
        **experiment.flat(),
        **{f"derived.{k}": v for k, v in derived.items()},
        "derived.tokens_per_step": experiment.tokens_per_step,
        "derived.reduction_slots": experiment.slots,
    }
    splits = {f"{name}_tokens": split.tokens for name, split in dataset.splits.items()}
    sources = _sources()
    corpus = (
        [experiment.data.corpus]
        if isinstance(experiment.data.corpus, str)
        else experiment.data.corpus
    )
    named = ", ".join(entry.partition("#")[0].rstrip("/").rpartition("/")[2] for entry in corpus)
    return {
        "params": redact({k: v for k, v in params.items() if v is not None}),
        "tags": redact(source_tags(sources, script, ray_job_id=launch.job_id())),
        "dataset": redact(
            {
                "name": f"{named} as {dataset.tokenizer['name']}",
                "digest": dataset.digest,
                "source": str(dataset.directory),
            }
        )
        | splits,
    }


@functools.cache
def _sources() -> dict[str, Any]:
    """Asks git, once for all trials of a sweep."""
    return source_facts(SOURCES)


def model_facts(experiment: Experiment, n_vocab: int) -> dict[str, Any]:
    """Parameter counts of the model, without building it: total, without positions, decayed and not."""
    return _facts_of_shape(experiment.gpt_config(n_vocab))


@functools.cache
def _facts_of_shape(config: GPTConfig) -> dict[str, Any]:
    with torch.device("meta"):
        model = GPT(config)
    return {
        "vocab_size": model.config.vocab_size,
        "parameters": model.num_parameters(),
        "parameters_without_positions": model.num_parameters(positions=False),
        **asdict(optim.decay_summary(model)),
        "flops_per_token": flops_per_token(model.config),
    }
