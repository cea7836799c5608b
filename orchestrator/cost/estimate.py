"""The dry run: shapes and costs of a run, before anything is written or downloaded.

≈ marks an estimate. Time and memory come from some seconds of training, see `measure`.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace

from orchestrator.cluster import device, dtypes
from orchestrator.cluster.layout import Layout, places, resolve_layout
from orchestrator.config.experiment import Experiment
from orchestrator.cost import timing as cost
from orchestrator.cost.measure import measure
from orchestrator.cost.timing import Estimate, Timing
from orchestrator.cost.tokens import TokenCounts, token_counts
from orchestrator.data.corpus import entries_of, without_hash
from orchestrator.data.order import check_tokens
from orchestrator.errors import UserError
from orchestrator.runs.facts import ModelFacts, model_facts
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.identity import recorded_train, resolve_auto
from orchestrator.runs.storage import storage_root
from orchestrator.text import duration
from orchestrator.train import init_from


def show(experiment: Experiment, timed: bool = True) -> int:
    """Print the dry run, and return the exit status.

    Args:
        experiment: The configuration.
        timed: Also time some seconds of training.
    """
    print(experiment.to_yaml())
    for title, lines in dry_run(experiment, timed).items():
        print(title)
        for line in lines:
            print(f"  {line}")
    return 0


def dry_run(experiment: Experiment, timed: bool = True) -> dict[str, list[str]]:
    """Return the sections of the dry run: title and lines."""
    init_from.require_init_from_exists(experiment)
    tokens = token_counts(experiment)
    batch = _batch_lines(experiment)
    data = _data_lines(experiment, tokens)
    if tokens.n_vocab is None:
        unknown = (
            "unknown: the vocabulary is the set of characters of the corpus, which is not "
            "downloaded yet; run pipelines/prepare.py first"
        )
        return {"batch": batch, "data": data, "model and cost": [unknown]}
    facts = model_facts(experiment, tokens.n_vocab)
    layout = local_layout(experiment)
    sections = {
        "batch": batch,
        "model": _model_lines(facts),
        "data": data,
        "cost": _cost_lines(experiment, facts, layout),
    }
    if timed:
        sections["expected"] = _expected_lines(experiment, tokens, tokens.n_vocab, layout)
    return sections


# ---- estimate and result ----


def expected_line(estimate: Estimate) -> str:
    """Return a line such as `1m50s, 0.52 GiB per worker, 28.5 MiB of disk`."""
    return (
        f"{duration(estimate['time_s'])}, {estimate['memory_gib']:.3g} GiB per worker, "
        f"{_size(estimate['disk_bytes'])} of disk"
    )


def comparison_line(
    estimated: Mapping[str, float | None], measured: Mapping[str, float | None]
) -> str:
    """Return a line such as `expected 1m50s, took 1m58s (+7%); memory …; disk …`.

    Numbers that were not measured are left out. A run measures the disk at its end, a sweep the
    largest use of the disk. The first steps may have corrected the time.
    """
    rows: list[tuple[str, str, Callable[[float], str]]] = [
        ("time_s", "expected {}, took {}", duration),
        ("memory_gib", "memory {} expected, {} seen", _gib),
        ("final_disk_bytes", "disk at the end {} expected, {} seen", _size),
        ("disk_bytes", "checkpoints at most {} expected, {} seen", _size),
    ]
    parts = []
    corrected = estimated.get("corrected_s")
    took = measured.get("time_s")
    if corrected is not None and took is not None:
        del rows[0]
        parts.append(_corrected_time(estimated.get("time_s"), corrected, took))
    for key, words, shown in rows:
        before = estimated.get(key)
        after = measured.get(key)
        if before and after is not None:
            text = words.format(shown(before), shown(after))
            parts.append(f"{text} ({after / before - 1:+.0%})")
    if "share_over" in estimated:
        parts.append(f"estimated when {estimated['share_over']:.0%} of the time was over")
    return "; ".join(parts)


def _corrected_time(planned: float | None, corrected: float, took: float) -> str:
    """Return a line such as `planned 7m56s (+226%), corrected 25m10s (+3%), took 25m52s`."""
    first = "unknown"
    if planned is not None:
        first = f"{duration(planned)} ({took / planned - 1:+.0%})"
    second = f"{duration(corrected)} ({took / corrected - 1:+.0%})"
    return f"planned {first}, corrected {second}, took {duration(took)}"


# ---- sections ----


def _batch_lines(experiment: Experiment) -> list[str]:
    stretches = experiment.batch_sizes.stretches
    steps = experiment.train.max_steps
    total = f"{experiment.tokens(steps):,} tokens in all"
    if len(stretches) == 1:
        tokens = f"{experiment.tokens_per_step:,} tokens × {steps:,} steps = {total}"
        return [*_step_lines(experiment, stretches[0][1]), tokens]
    lines = [[f"from step {n:,} on:", *_step_lines(experiment, size)] for n, size in stretches]
    return [*sum(lines, []), total]


def _step_lines(experiment: Experiment, size: int) -> list[str]:
    micro, length = experiment.train.micro_batch_size, experiment.model.block_size
    count, slots = size // micro, experiment.slots
    even = [number for number in range(1, slots + 1) if slots % number == 0]
    uneven = [number for number in experiment.compute.worker_counts if slots % number]
    share = "with {0} worker(s): {1} / {0} = {2} micro-batches per worker (grad_accum_steps)"
    most = "with {} worker(s): at most {} of {} micro-batches per worker"
    return [
        f"{size} sequences per step / {micro} per micro-batch = {count} micro-batches",
        f"{count} micro-batches in {slots} reduction slots (of at most {slots} workers)",
        *(share.format(number, count, count // number) for number in even),
        *(most.format(number, -(-slots // number) * count // slots, count) for number in uneven),
        f"{size} sequences × {length} tokens = {size * length:,} tokens per step",
    ]


def _model_lines(facts: ModelFacts) -> list[str]:
    vocab_size = facts["vocab_size"]
    return [
        f"{facts['parameters']:,} parameters, {facts['parameters_without_positions']:,} without "
        f"positions; vocabulary padded to {vocab_size:,}",
        f"weight decay on {facts['decayed_tensors']} tensors / {facts['decayed_parameters']:,} "
        f"parameters, none on {facts['undecayed_tensors']} / {facts['undecayed_parameters']:,}",
        f"loss of a uniform guess: ln {vocab_size:,} = {math.log(vocab_size):.4f} nats per token",
    ]


def _data_lines(experiment: Experiment, tokens: TokenCounts) -> list[str]:
    name = ", ".join(map(without_hash, entries_of(experiment.data.corpus)))
    place = f"in {tokens.directory}"
    if tokens.directory is None:
        place = "in a folder named after its content (not hashed yet)"
    if tokens.train is None or tokens.val is None:
        return [
            *tokens.corpus,
            f"{name}: not downloaded or not unpacked yet, so its size is unknown; tokens will be "
            f"{place}",
        ]
    about = "" if tokens.is_exact else "≈ "
    check_tokens(tokens.train, tokens.val, experiment.model.block_size)
    steps = experiment.train.max_steps
    epochs = experiment.tokens(steps) / tokens.train
    return [
        *tokens.corpus,
        f"{name}: {about}{tokens.train:,} tokens of train, {about}{tokens.val:,} of val, {place}",
        f"{steps:,} steps = {about}{epochs:.2f} epochs",
    ]


def _cost_lines(experiment: Experiment, facts: ModelFacts, layout: Layout) -> list[str]:
    tokens = experiment.tokens(experiment.train.max_steps)
    flops = facts["flops_per_token"]
    total = "FLOPs per token are not known: the model does not say"
    if flops is not None:
        total = f"{flops:.4g} FLOPs per token × {tokens:,} tokens = {flops * tokens:.4g} FLOPs"
    state = cost.state_bytes(experiment, facts)
    counts = experiment.compute.worker_counts or [1]
    crews = [cost.Crew.of(experiment, replace(layout, num_workers=number)) for number in counts]
    crew = max(crews, key=lambda crew: cost.worker_bytes(experiment, facts, crew))
    keep = experiment.train.keep
    return [
        total,
        f"checkpoint ≈ {_size(state)}; {keep} recent and the best one stay, one more is being "
        f"written: ≈ {_size(state * (keep + 2))} of disk",
        "memory for weights, moments and gradients ≈ "
        f"{_size(cost.worker_bytes(experiment, facts, crew))} for each of {crew.count} worker(s) "
        f"on {len(crew.nodes)} node(s) like this machine, activations not counted",
    ]


def _expected_lines(
    experiment: Experiment, tokens: TokenCounts, n_vocab: int, layout: Layout
) -> list[str]:
    folder = RunFolder(storage_root(experiment) / experiment.name)
    experiment = resolve_auto(experiment, layout, folder)
    dtypes.warn_if_emulated(experiment, layout, has_begun=recorded_train(folder) is not None)
    timing = measure(experiment, n_vocab, layout)
    if isinstance(timing, str):
        return [f"time and memory are unknown: {timing}"]
    expected = tokens.expected(experiment, timing)
    missing = ""
    if tokens.val is None and experiment.train.eval_interval is not None:
        missing = ", evaluations not counted"
    memory = "allocated on each worker's GPU" if layout.use_gpu else "resident per worker"
    parts = ", ".join(_time_parts(experiment, tokens, timing))
    return [
        f"≈ {duration(expected['time_s'])}{missing}: {parts}",
        f"≈ {expected['memory_gib']:.3g} GiB {memory}, activations counted",
        f"≈ {_size(expected['disk_bytes'])} of disk at most, "
        f"{_size(expected['final_disk_bytes'])} at the end",
        f"timed on {device.here(layout).device_name} for {layout.num_workers} worker(s) with "
        f"{layout.cpus_per_worker} CPU(s) each in {experiment.train.dtype}, at a load of "
        f"{timing.load:.1f} per CPU{_caveats(experiment, layout)}",
    ]


def _time_parts(experiment: Experiment, tokens: TokenCounts, timing: Timing) -> list[str]:
    steps = experiment.train.max_steps
    step_s = cost.steps_seconds(experiment, timing, 0, steps) / steps
    parts = [f"{steps:,} steps of {_seconds(step_s)}"]
    if experiment.train.eval_interval is not None and tokens.val is not None:
        each = cost.evaluation_seconds(experiment, tokens.val, tokens.train or 0, timing)
        parts.append(f"{cost.evaluations(experiment)} evaluations of {_seconds(each)}")
    count = cost.checkpoints(experiment)
    parts.append(f"{count} checkpoint(s) of {_seconds(timing.checkpoint_s)}")
    parts.append(f"{_seconds(cost.start_seconds(timing))} to start")
    return parts


def _caveats(experiment: Experiment, layout: Layout) -> str:
    cpus = layout.num_workers * layout.cpus_per_worker
    caveats = {
        f"as if this machine had {cpus} CPUs": cpus > cost.this_machine().cpus,
        "traffic between workers not counted": layout.num_workers > 1,
        "without train.compile, which makes steps shorter and the start longer": (
            experiment.train.compile
        ),
        "not on the cluster of $RAY_ADDRESS": bool(os.environ.get("RAY_ADDRESS")),
    }
    return "".join(f"; {words}" for words, applies in caveats.items() if applies)


# ---- this machine ----


def local_layout(experiment: Experiment) -> Layout:
    """Return the workers that the run would have on this machine, even if they do not fit."""
    here = cost.this_machine()
    try:
        layout = resolve_layout(experiment, [here])
    except UserError:
        compute = experiment.compute
        workers = max(experiment.compute.worker_counts, default=1)
        use_gpu = here.gpus > 0 if compute.use_gpu == "auto" else compute.use_gpu
        cpus = compute.cpus_per_worker
        if cpus == "auto":
            cpus = here.cpus if workers == 1 and not use_gpu else 1
        layout = Layout(workers, cpus, use_gpu)
    return replace(layout, fast_dtype=dtypes.fast_dtype(layout.use_gpu and here.gpus > 0))


def local_slots(layout: Layout) -> int:
    """Return how many groups of workers fit on this machine at the same time; at least 1."""
    return max(1, places([cost.this_machine()], layout) // layout.num_workers)


# ---- text ----


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    return duration(seconds)


def _gib(gib: float) -> str:
    return _size(gib * 2**30)


def _size(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
