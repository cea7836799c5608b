"""The dry run: what an experiment is and costs, before anything is written, downloaded or started; and how wrong that was.

Eats an experiment; yields rows of text. What is estimated is marked with ≈. Time and memory come from a few seconds of
training in a process of its own (`calibrate.py`), which leaves nothing but its numbers in the user's cache.
"""

import math
import os
from collections.abc import Callable
from typing import Any

import torch

from model.optim import OPTIMIZERS
from orchestrator.cluster import layout as launch
from orchestrator.config.experiment import Experiment
from orchestrator.cost import measure as calibrate
from orchestrator.cost.measure import Timing
from orchestrator.data.estimate import estimate_tokens
from orchestrator.data.prepared import dataset_dir, find_prepared
from orchestrator.data.tasks import tail_cut
from orchestrator.errors import UserError
from orchestrator.runs.facts import model_facts
from orchestrator.runs.storage import storage_root
from orchestrator.text import duration
from orchestrator.train import init_from
from orchestrator.train.numerics import available_cpus, device_name


def show(experiment: Experiment, timed: bool = True) -> int:
    """Print the resolved experiment, its arithmetic and its cost; what `--dry-run` does. `timed`: with seconds of training."""
    print(experiment.to_yaml())
    for title, lines in dry_run(experiment, timed):
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines))
    return 0


def dry_run(experiment: Experiment, timed: bool = True) -> list[tuple[str, list[str]]]:
    """Sections of lines: batch arithmetic, model, data, cost, and what was measured of it."""
    init_from.check(experiment)
    tokens = token_counts(experiment)
    if tokens["n_vocab"] is None:
        unknown = [
            "the vocabulary is the corpus's characters, so parameters and cost are known once it is here: "
            "run pipelines/prepare.py first"
        ]
        return [
            ("batch", _batch(experiment)),
            ("data", _data(experiment, tokens)),
            ("model and cost", unknown),
        ]
    facts = model_facts(experiment, tokens["n_vocab"])
    return [
        ("batch", _batch(experiment)),
        ("model", _model(facts)),
        ("data", _data(experiment, tokens)),
        ("cost", _cost(experiment, facts)),
        *([("expected", _expected(experiment, tokens))] if timed else []),
    ]


def expected_line(estimate: dict[str, float]) -> str:
    """`1m50s, 0.52 GiB per worker, 28.5 MiB of disk`, of what `calibrate.expected` gives."""
    return (
        f"{duration(estimate['time_s'])}, {estimate['memory_gib']:.3g} GiB per worker, "
        f"{_size(estimate['disk_bytes'])} of disk"
    )


def comparison_line(estimated: dict[str, float], measured: dict[str, float | None]) -> str:
    """`expected 1m50s, took 1m58s (+7 %); memory …; disk …`; what was not measured is left out.

    Of the disk a run measures what is there at the end, a sweep the most that was there at a time.
    """

    def part(key: str, words: str, shown: Callable[[float], str]) -> list[str]:
        before, after = estimated.get(key), measured.get(key)
        return (
            [f"{words.format(shown(before), shown(after))} ({after / before - 1:+.0%})"]
            if after is not None
            else []
        )

    return "; ".join(
        [
            *part("time_s", "expected {}, took {}", duration),
            *part("memory_gib", "memory {} expected, {} seen", lambda gib: _size(gib * 2**30)),
            *part("final_disk_bytes", "disk at the end {} expected, {} seen", _size),
            *part("disk_bytes", "checkpoints at most {} expected, {} seen", _size),
        ]
    )


def _batch(e: Experiment) -> list[str]:
    t, m, s = e.train, e.micro_batches, e.slots
    workers = [w for w in range(1, s + 1) if s % w == 0]
    lines = [
        f"{t.global_batch_size} sequences per step / {t.micro_batch_size} per micro-batch = {m} micro-batches",
        f"{m} micro-batches in {s} reduction slots = {m // s} per slot; workers may be {', '.join(map(str, workers))}",
    ]
    lines += [
        f"with {w} worker(s): {m} / {w} = {m // w} micro-batches per worker (grad_accum_steps)"
        for w in workers
    ]
    return [
        *lines,
        f"{t.global_batch_size} sequences × {e.model.block_size} tokens = {e.tokens_per_step:,} tokens per step",
        f"{e.tokens_per_step:,} tokens × {t.max_steps:,} steps = {e.tokens_per_step * t.max_steps:,} tokens in all",
    ]


def _model(f: dict[str, Any]) -> list[str]:
    return [
        f"{f['parameters']:,} parameters, {f['parameters_without_positions']:,} without positions; "
        f"vocabulary padded to {f['vocab_size']:,}",
        f"weight decay on {f['decayed_tensors']} tensors / {f['decayed_parameters']:,} parameters, "
        f"none on {f['undecayed_tensors']} / {f['undecayed_parameters']:,}",
        f"loss of a uniform guess: ln {f['vocab_size']:,} = {math.log(f['vocab_size']):.4f} nats per token",
    ]


def _data(e: Experiment, tokens: dict[str, Any]) -> list[str]:
    if tokens["train"] is None:
        return [
            f"{_corpus(e)}: not downloaded yet, so its size is unknown; tokens go to {tokens['directory']}"
        ]
    about = "" if tokens["exact"] else "≈ "
    steps_per_epoch = tokens["train"] / e.tokens_per_step
    if tokens["train"] < 2 * e.model.block_size:
        raise UserError(
            f"model.block_size: {e.model.block_size} needs at least {2 * e.model.block_size} tokens of train, "
            f"{_corpus(e)} has {about}{tokens['train']:,}"
        )
    return [
        f"{_corpus(e)}: {about}{tokens['train']:,} tokens of train, {about}{tokens['val']:,} of val, in {tokens['directory']}",
        f"{e.train.max_steps:,} steps = {about}{e.train.max_steps / steps_per_epoch:.2f} epochs",
    ]


def _cost(e: Experiment, f: dict[str, Any]) -> list[str]:
    tokens, parameters = e.tokens_per_step * e.train.max_steps, f["parameters"]
    state = 1 + OPTIMIZERS[e.optim.kind].moments  # float32 weights and the optimizer's moments
    checkpoint = state * 4 * parameters
    buffers = (
        e.slots.bit_length()
    )  # W = 1 is the worst case: the running slot and log2(S) partial sums
    return [
        f"{f['flops_per_token']:.4g} FLOPs per token × {tokens:,} tokens = {f['flops_per_token'] * tokens:.4g} FLOPs",
        f"checkpoint ≈ {_size(checkpoint)}; {e.train.keep} latest and the best one stay, one more while it is written: "
        f"≈ {_size(checkpoint * (e.train.keep + 2))} of disk",
        f"memory for weights, moments and gradients ≈ {_size((state + buffers) * 4 * parameters)} per worker, "
        f"activations not counted",
    ]


def _expected(e: Experiment, tokens: dict[str, Any]) -> list[str]:
    """Time, memory and disk, from steps that are really made."""
    layout = local_layout(e)
    if layout.use_gpu and not torch.cuda.is_available():
        return [
            "time and memory are unknown: the run asks for a GPU, and this machine has none to time it on"
        ]
    timing = calibrate.measure(
        e, tokens["n_vocab"], layout.num_workers, layout.cpus_per_worker, layout.use_gpu
    )
    if timing is None:
        return [
            f"time and memory are unknown: this machine has no room for a step, is in use, or makes none within "
            f"{calibrate.LIMIT_S:.0f} s"
        ]
    estimate = calibrate.expected(e, tokens["val"] or 0, tokens["train"] or 0, timing)
    unknown = tokens["val"] is None and e.train.eval_interval
    memory = "allocated on each worker's GPU" if layout.use_gpu else "resident per worker"
    return [
        f"≈ {duration(estimate['time_s'])}"
        + (", evaluations not counted: " if unknown else ": ")
        + _parts_of_time(e, tokens, timing),
        f"≈ {estimate['memory_gib']:.3g} GiB {memory}, activations counted",
        f"≈ {_size(estimate['disk_bytes'])} of disk at most, {_size(estimate['final_disk_bytes'])} at the end",
        f"timed on {device_name('cuda:0' if layout.use_gpu else 'cpu')} for {layout.num_workers} worker(s) with "
        f"{layout.cpus_per_worker} CPU(s) each{_caveats(e, layout)}",
    ]


def _parts_of_time(e: Experiment, tokens: dict[str, Any], timing: Timing) -> str:
    parts = [
        f"{e.train.max_steps:,} steps of {_seconds(timing.step_s)}",
        f"{calibrate.checkpoints(e)} checkpoint(s) of {_seconds(timing.checkpoint_s)}",
        f"{_seconds(calibrate.start_seconds(timing))} to start",
    ]
    if e.train.eval_interval and tokens["val"] is not None:
        each = calibrate.evaluation_seconds(e, tokens["val"], tokens["train"], timing)
        parts.insert(1, f"{calibrate.evaluations(e)} evaluations of {_seconds(each)}")
    return ", ".join(parts)


def local_layout(e: Experiment) -> launch.Layout:
    """What the run would take of this machine; where that is too much, what it asks for."""
    cpus, gpus, c = available_cpus(), torch.cuda.device_count(), e.compute
    try:
        return launch.resolve_layout(e, [(cpus, gpus)])
    except UserError:
        workers = 1 if c.num_workers == "auto" else c.num_workers
        use_gpu = gpus > 0 if c.use_gpu == "auto" else c.use_gpu
        whole = cpus if workers == 1 and not use_gpu else 1
        return launch.Layout(
            workers, whole if c.cpus_per_worker == "auto" else c.cpus_per_worker, use_gpu
        )


def local_slots(layout: launch.Layout) -> int:
    """How many groups of workers this machine holds at a time; one, if it holds none: of a cluster nothing is known here."""
    return max(
        1,
        launch.places([(available_cpus(), torch.cuda.device_count())], layout)
        // layout.num_workers,
    )


def _caveats(e: Experiment, layout: launch.Layout) -> str:
    wanted = layout.num_workers * layout.cpus_per_worker
    known = {
        f"as if this machine had {wanted} CPUs": wanted > available_cpus(),
        "traffic between workers not counted": layout.num_workers > 1,
        "without train.compile, which makes steps shorter and the start longer": e.train.compile,
        "not on the cluster of $RAY_ADDRESS": bool(os.environ.get("RAY_ADDRESS")),
    }
    return "".join(f"; {words}" for words, holds in known.items() if holds)


def token_counts(e: Experiment) -> dict[str, Any]:
    """Counts from the manifest where there is one, else what `estimate` makes of the corpus."""
    directory = dataset_dir(e.data, storage_root(e))
    if manifest := find_prepared(e.data, directory):
        return {
            "directory": directory,
            "exact": True,
            "n_vocab": manifest.tokenizer["n_vocab"],
            **{split: manifest.splits[split].tokens for split in ("train", "val")},
        }
    guess = estimate_tokens(e.data)
    total = guess.tokens
    val = None if total is None else total - tail_cut(total, e.data.val_fraction)
    # The split is made on characters or documents, so the shares of tokens are known only once they are counted.
    exact = guess.exact and e.data.tokenizer == "char" and e.data.split == "tail"
    return {
        "directory": directory,
        "exact": exact,
        "n_vocab": guess.n_vocab,
        "val": val,
        "train": None if total is None else total - val,
    }


def _corpus(e: Experiment) -> str:
    entries = [e.data.corpus] if isinstance(e.data.corpus, str) else e.data.corpus
    return ", ".join(entry.partition("#")[0] for entry in entries)


def _seconds(s: float) -> str:
    return f"{s * 1000:.3g} ms" if s < 1 else f"{s:.2g} s" if s < 10 else duration(s)


def _size(n: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} TiB"
