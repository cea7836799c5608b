"""Timings of earlier measurements, in `$XDG_CACHE_HOME/espalier/calibration/`.

Other users may be able to write there. A file that holds anything other than the numbers of a
`Timing` is ignored.
"""

import contextlib
import hashlib
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import torch

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment
from orchestrator.cost.timing import Timing
from orchestrator.files import cache_folder, write_atomically
from orchestrator.train.numerics import device_name

FORMAT = 3  # increase it when the meaning of a `Timing` changes


def file_of(experiment: Experiment, n_vocab: int, layout: Layout) -> Path:
    """Return the file of a timing. Experiments with equal steps share one file."""
    train = experiment.train
    key = [
        FORMAT,
        asdict(experiment.gpt_config(n_vocab)),
        train.micro_batch_size,
        train.global_batch_size,
        experiment.slots,
        train.dtype,
        experiment.optim.model_dump(),
        layout.num_workers,
        layout.cpus_per_worker,
        device_name(layout.device),
        torch.__version__,
    ]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "calibration" / f"{name}.json"


def read(experiment: Experiment, n_vocab: int, layout: Layout) -> Timing | None:
    """Return the stored timing; None if there is none, or a GPU is needed that is not here."""
    if layout.use_gpu and not torch.cuda.is_available():
        return None
    try:
        return parse(file_of(experiment, n_vocab, layout).read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def write(experiment: Experiment, n_vocab: int, layout: Layout, timing: Timing) -> None:
    """Store a timing. If the folder cannot be written to, nothing is stored."""
    file = file_of(experiment, n_vocab, layout)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(timing)))


def parse(text: str) -> Timing | None:
    """Parse a timing in JSON; None if `text` is anything else."""
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        return None
    names = {field.name for field in fields(Timing)}
    if not isinstance(stored, dict) or stored.keys() != names:
        return None
    if any(type(value) not in (int, float) for value in stored.values()):  # a bool is not a number
        return None
    if not all(0 < value < math.inf for value in stored.values()):
        return None
    return Timing(**stored)
