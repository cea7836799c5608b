"""The dry run: what an experiment is and costs, before anything is written, downloaded or started.

Eats an experiment; yields rows of text. What is estimated is marked with ≈.
"""

import math
from typing import Any

import torch

from model import optim
from model.flops import flops_per_token
from model.gpt import GPT
from orchestrator import init_from
from orchestrator.config import Experiment
from orchestrator.errors import UserError
from orchestrator.parts import tail_cut
from orchestrator.prepared import prepared
from orchestrator.runs import storage_root
from orchestrator.tokens import dataset_dir, estimate


def model_facts(experiment: Experiment, n_vocab: int) -> dict[str, Any]:
    """Parameter counts of the model, without building it: total, without positions, decayed and not."""
    with torch.device("meta"):
        model = GPT(experiment.gpt_config(n_vocab))
    decayed_tensors, decayed, kept_tensors, kept = optim.decay_summary(model)
    return {"vocab_size": model.config.vocab_size, "parameters": model.num_parameters(),
            "parameters_without_positions": model.num_parameters(positions=False),
            "decayed_tensors": decayed_tensors, "decayed_parameters": decayed,
            "undecayed_tensors": kept_tensors, "undecayed_parameters": kept,
            "flops_per_token": flops_per_token(model.config)}


def show(experiment: Experiment) -> int:
    """Print the resolved experiment, its arithmetic and its cost; what `--dry-run` does."""
    print(experiment.to_yaml())
    for title, lines in dry_run(experiment):
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines))
    return 0


def dry_run(experiment: Experiment) -> list[tuple[str, list[str]]]:
    """Sections of lines: batch arithmetic, model, data, cost."""
    init_from.check(experiment)
    tokens = _token_counts(experiment)
    if tokens["n_vocab"] is None:
        unknown = ["the vocabulary is the corpus's characters, so parameters and cost are known once it is here: "
                   "run pipelines/prepare.py first"]
        return [("batch", _batch(experiment)), ("data", _data(experiment, tokens)), ("model and cost", unknown)]
    facts = model_facts(experiment, tokens["n_vocab"])
    return [("batch", _batch(experiment)), ("model", _model(facts)), ("data", _data(experiment, tokens)),
            ("cost", _cost(experiment, facts))]


def _batch(e: Experiment) -> list[str]:
    t, m, s = e.train, e.micro_batches, e.slots
    workers = [w for w in range(1, s + 1) if s % w == 0]
    lines = [f"{t.global_batch_size} sequences per step / {t.micro_batch_size} per micro-batch = {m} micro-batches",
             f"{m} micro-batches in {s} reduction slots = {m // s} per slot; workers may be {', '.join(map(str, workers))}"]
    lines += [f"with {w} worker(s): {m} / {w} = {m // w} micro-batches per worker (grad_accum_steps)" for w in workers]
    return [*lines, f"{t.global_batch_size} sequences × {e.model.block_size} tokens = {e.tokens_per_step:,} tokens per step",
            f"{e.tokens_per_step:,} tokens × {t.max_steps:,} steps = {e.tokens_per_step * t.max_steps:,} tokens in all"]


def _model(f: dict[str, Any]) -> list[str]:
    return [f"{f['parameters']:,} parameters, {f['parameters_without_positions']:,} without positions; "
            f"vocabulary padded to {f['vocab_size']:,}",
            f"weight decay on {f['decayed_tensors']} tensors / {f['decayed_parameters']:,} parameters, "
            f"none on {f['undecayed_tensors']} / {f['undecayed_parameters']:,}",
            f"loss of a uniform guess: ln {f['vocab_size']:,} = {math.log(f['vocab_size']):.4f} nats per token"]


def _data(e: Experiment, tokens: dict[str, Any]) -> list[str]:
    if tokens["train"] is None:
        return [f"{_corpus(e)}: not downloaded yet, so its size is unknown; tokens go to {tokens['directory']}"]
    about = "" if tokens["exact"] else "≈ "
    steps_per_epoch = tokens["train"] / e.tokens_per_step
    if tokens["train"] < 2 * e.model.block_size:
        raise UserError(f"model.block_size: {e.model.block_size} needs at least {2 * e.model.block_size} tokens of train, "
                        f"{_corpus(e)} has {about}{tokens['train']:,}")
    return [f"{_corpus(e)}: {about}{tokens['train']:,} tokens of train, {about}{tokens['val']:,} of val, in {tokens['directory']}",
            f"{e.train.max_steps:,} steps = {about}{e.train.max_steps / steps_per_epoch:.2f} epochs"]


def _cost(e: Experiment, f: dict[str, Any]) -> list[str]:
    tokens, parameters = e.tokens_per_step * e.train.max_steps, f["parameters"]
    checkpoint = 3 * 4 * parameters  # float32 weights and AdamW's two moments
    # W = 1 is the worst case: one buffer for the running slot and log2(S) + 1 partial sums.
    buffers = 1 + (e.slots.bit_length() if e.slots > 1 else 0)
    return [f"{f['flops_per_token']:.4g} FLOPs per token × {tokens:,} tokens = {f['flops_per_token'] * tokens:.4g} FLOPs",
            f"checkpoint ≈ {_size(checkpoint)}; {e.train.keep} latest and the best one stay, one more while it is written: "
            f"≈ {_size(checkpoint * (e.train.keep + 2))} of disk",
            f"memory for weights, moments and gradients ≈ {_size((3 + buffers) * 4 * parameters)} per worker, "
            f"activations not counted"]


def _token_counts(e: Experiment) -> dict[str, Any]:
    """Counts from the manifest where there is one, else what `estimate` makes of the corpus."""
    directory = dataset_dir(e.data, storage_root(e))
    if manifest := prepared(e.data, directory):
        return {"directory": directory, "exact": True, "n_vocab": manifest.tokenizer["n_vocab"],
                **{split: manifest.splits[split].tokens for split in ("train", "val")}}
    guess = estimate(e.data)
    total = guess["tokens"]
    val = None if total is None else total - tail_cut(total, e.data.val_fraction)
    # The split is made on characters or documents, so the shares of tokens are known only once they are counted.
    exact = guess["exact"] and e.data.tokenizer == "char" and e.data.split == "tail"
    return {"directory": directory, "exact": exact, "n_vocab": guess["n_vocab"], "val": val,
            "train": None if total is None else total - val}


def _corpus(e: Experiment) -> str:
    entries = [e.data.corpus] if isinstance(e.data.corpus, str) else e.data.corpus
    return ", ".join(entry.partition("#")[0] for entry in entries)


def _size(n: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} TiB"
