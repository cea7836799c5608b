"""What the tracking server is told of a run: every field and what follows from it, the dataset, the sources.

Eats an experiment and its dataset; yields `params`, `tags` and `dataset` for run.json, without secrets.
"""

import functools
from pathlib import Path
from typing import Any

from orchestrator.cluster import layout as launch
from orchestrator.config.experiment import Experiment
from orchestrator.data.dataset import Manifest
from orchestrator.cost.estimate import model_facts
from orchestrator.runs.sources import redact, source_facts, source_tags

SOURCES = Path(__file__).resolve().parents[2]


def facts_of(experiment: Experiment, dataset: Manifest, script: str = "pipelines/train.py") -> dict[str, Any]:
    """`params`, `tags` and `dataset` of an experiment that `script` runs."""
    derived = model_facts(experiment, dataset.tokenizer["n_vocab"])
    params = {**experiment.flat(), **{f"derived.{k}": v for k, v in derived.items()},
              "derived.tokens_per_step": experiment.tokens_per_step, "derived.reduction_slots": experiment.slots}
    splits = {f"{name}_tokens": split.tokens for name, split in dataset.splits.items()}
    sources = _sources()
    corpus = [experiment.data.corpus] if isinstance(experiment.data.corpus, str) else experiment.data.corpus
    named = ", ".join(entry.partition("#")[0].rstrip("/").rpartition("/")[2] for entry in corpus)
    return {
        "params": redact({k: v for k, v in params.items() if v is not None}),
        "tags": redact(source_tags(sources, script, ray_job_id=launch.job_id())),
        "dataset": redact({"name": f"{named} as {dataset.tokenizer['name']}", "digest": dataset.digest,
                           "source": str(dataset.directory)}) | splits,
    }


@functools.cache
def _sources() -> dict[str, Any]:
    """Asks git, once for all trials of a sweep."""
    return source_facts(SOURCES)
