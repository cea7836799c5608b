"""Timings of earlier measurements, in `$XDG_CACHE_HOME/espalier/calibration/`.

Other users may be able to write there. A file that holds anything other than the numbers of a
`Timing` is ignored.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

from model.models import stored_config
from orchestrator.cluster import device
from orchestrator.cluster.layout import Layout
from orchestrator.config.checks import is_sharded
from orchestrator.config.experiment import Experiment
from orchestrator.cost.timing import Crew, Timing
from orchestrator.files import write_atomically
from orchestrator.machine import gpus, torch_version
from orchestrator.paths import cache_folder
from orchestrator.runs.journal import Line
from orchestrator.runs.metrics import median_step_s

FORMAT = 7  # increase it when the meaning of a `Timing` changes
LOAD_STEP = 1.0  # a timing is not used if the load has fallen by more, and by more than half
AGREES = 1.5  # a timing is measured again if a run was slower or faster by more than this factor


def file_of(experiment: Experiment, n_vocab: int, layout: Layout) -> Path:
    """Return the file of a timing. Experiments with equal steps share one file."""
    train = experiment.train
    key = [
        FORMAT,
        stored_config(experiment.model.kind, experiment.model_config_for(n_vocab)),
        train.micro_batch_size,
        experiment.largest_batch,
        experiment.slots,
        train.dtype,
        *([] if train.ema is None else ["ema"]),
        train.activation_checkpointing,
        is_sharded(experiment, layout.num_workers),
        experiment.optim.model_dump(),
        layout.num_workers,
        *(["overlaps"] if Crew.of(experiment, layout).overlaps else []),
        layout.cpus_per_worker,
        device.here(layout).device_name,
        torch_version(),
    ]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "calibration" / f"{name}.json"


def read(experiment: Experiment, n_vocab: int, layout: Layout) -> Timing | None:
    """Return the stored timing; None if there is none, or it does not hold here and now.

    It holds on a machine with the GPU that is needed, until the machine is less busy. On a busier
    one, a new timing would take longer than a run waits for it.
    """
    if layout.use_gpu and not gpus():
        return None
    timing = _read(file_of(experiment, n_vocab, layout))
    if timing is None:
        return None
    has_fallen = timing.load - machine_load()
    return None if has_fallen > max(LOAD_STEP, 0.5 * timing.load) else timing


def _read(file: Path) -> Timing | None:
    try:
        return parse(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def machine_load() -> float:
    """Return how many processes per CPU ran or waited in the last minute; 0 if unknown."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except OSError:
        return 0.0


def learn(experiment: Experiment, n_vocab: int, layout: Layout, lines: Iterable[Line]) -> None:
    """Compare the stored timing with the time of a step in a real run.

    A similar time replaces the measured one. Another time shows that the machine was not as it was
    when the timing was measured: the timing is removed, and the next run measures again.
    """
    step_s = median_step_s(_with_largest_steps(experiment, lines))
    if step_s is None or experiment.train.compile:  # `bench` times steps without it
        return
    file = file_of(experiment, n_vocab, layout)
    timing = _read(file)
    if timing is None:
        return
    if 1 / AGREES <= step_s / timing.step_s <= AGREES:
        write(experiment, n_vocab, layout, replace(timing, step_s=step_s))
    else:
        with contextlib.suppress(OSError):
            file.unlink()


def _with_largest_steps(experiment: Experiment, lines: Iterable[Line]) -> Iterator[Line]:
    """Yield the lines of windows that have only steps of the largest batch, as `bench` times."""
    sizes = experiment.batch_sizes
    before = 0
    for line in lines:
        start = min(before, line["step"] - 1)  # a line may be the first one of another stage
        if sizes.at(start) == sizes.at(line["step"] - 1) == experiment.largest_batch:
            yield line
        before = line["step"]


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
    load = stored.pop("load")
    if not all(0 < value < math.inf for value in stored.values()) or not 0 <= load < math.inf:
        return None
    return Timing(**stored, load=load)
