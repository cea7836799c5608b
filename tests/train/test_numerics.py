"""Settings, seeds and fingerprint that decide the last bit."""

import contextlib
import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.runs.folder import RunFolder
from orchestrator.train import numerics, state
from orchestrator.train.numerics import (
    Worker,
    autocast,
    device_name,
    fingerprint,
    keyed_seed,
    prepare_process,
    resolve_auto,
    seed_device,
)
from orchestrator.train.step import Step


def test_prepared_process_does_not_depend_on_its_earlier_settings():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        torch.rand(5)
        prepare_process(Experiment(), Worker(cpus=1))
        first = torch.rand(3)
        assert (torch.get_num_threads(), first.dtype, torch.get_float32_matmul_precision()) == (
            1,
            torch.float32,
            "highest",
        )
        assert not torch.are_deterministic_algorithms_enabled()
        prepare_process(Experiment(), Worker(cpus=1))
        assert torch.equal(torch.rand(3), first)
        prepare_process(load_experiment(None, ["train.seed=1"]), Worker(cpus=1))
        assert not torch.equal(torch.rand(3), first)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("width", "dtype"), [(512, "bfloat16"), (256, "float32")])
def test_auto_is_replaced_in_this_process(tmp_path, monkeypatch, width, dtype):
    monkeypatch.setattr("orchestrator.cluster.dtypes.fast_dtype", lambda on_gpu: "bfloat16")
    experiment = load_experiment(None, [f"model.n_embd={width}", "model.n_head=1"])
    assert resolve_auto(experiment, RunFolder(tmp_path), Worker()).train.dtype == dtype


class Casts(TorchDispatchMode):
    """Counts how often the matrix of queries, keys and values becomes bfloat16."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__()
        self.shape = (3 * experiment.model.n_embd, experiment.model.n_embd)
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs["dtype"] is torch.bfloat16:
            self.count += args[0].shape == self.shape
        return func(*args, **kwargs)


def gradient_of_step(experiment: Experiment, model: torch.nn.Module) -> tuple[int, torch.Tensor]:
    """Return how often a matrix is cast in a step, and the gradient of the step."""
    training = state.build(experiment, model, Worker())
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(61, (2, 16), generator=generator) for _ in range(8)]
    step = Step(experiment, training)
    with Casts(experiment) as casts:
        step.gradient(iter([(one, one) for one in tokens]))
    gradient = training.gradients.current.flat[: training.gradients.layout.tail].clone()
    step.update(step.steps(0))
    return casts.count, gradient


def test_weights_are_cast_once_in_a_step_with_the_same_gradient(monkeypatch):
    words = ["model.n_layer=1", "model.n_head=2", "model.n_embd=32", "model.block_size=16"]
    words += ["train.micro_batch_size=2", "train.global_batch_size=16", "train.dtype=bfloat16"]
    experiment = load_experiment(None, words)
    model = experiment.new_model(61)
    again = copy.deepcopy(model)
    kept = [gradient_of_step(experiment, model) for _ in range(2)]
    monkeypatch.setattr("orchestrator.train.step.casts_kept", contextlib.nullcontext)
    plain = [gradient_of_step(experiment, again) for _ in range(2)]
    assert [count for count, _ in kept] == [1, 1]  # the updated weights are cast again
    assert [count for count, _ in plain] == [8, 8]
    for (_, ours), (_, reference) in zip(kept, plain, strict=True):
        assert torch.equal(ours, reference)


FAULTS = """
import resource

import torch

from orchestrator.config.experiment import load_experiment
from orchestrator.train.numerics import Worker, prepare_process


def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(8 << 20).mul_(2)  # 32 MiB: 8,192 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


prepare_process(load_experiment(None, ["train.dtype=float32"]), Worker(cpus=1))
page_faults()
print(page_faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_memory_that_was_freed_is_not_mapped_again():
    # In a process of its own: what other tests left in the heap may take the room of a freed block.
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 4096


def test_keyed_seeds_differ_and_are_the_same_in_all_processes():
    keys = [
        (seed, step, m) for seed in (0, 1, 1337) for step in (0, 1, 11, 10**6) for m in (0, 1, 11)
    ]
    seeds = [keyed_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert keyed_seed(1, 1, 11) != keyed_seed(1, 11, 1) != keyed_seed(11, 1, 1)
    assert keyed_seed(1, 1) != keyed_seed(1, 1, 0)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))
    code = "from orchestrator.train.numerics import keyed_seed; print(keyed_seed(1337, 5, 2))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "99"},
    ).stdout
    assert int(said) == keyed_seed(1337, 5, 2)


@pytest.mark.parametrize("variable", [None, "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_memory_settings_of_the_user_hold(monkeypatch, variable):
    calls = []
    library = SimpleNamespace(mallopt=lambda *words: calls.append(words))
    monkeypatch.setattr(numerics.ctypes, "CDLL", lambda _: library)
    if variable is not None:
        monkeypatch.setenv(variable, "glibc.malloc.trim_threshold=131072")
    numerics.keep_memory()
    assert calls == ([] if variable else [(-4, 0), (-1, -1)])


def test_seeded_device_draws_what_torch_draws_after_manual_seed():
    for seed in (0, 7, 2**62):
        torch.manual_seed(seed)
        expected = torch.nn.functional.dropout(torch.ones(100), 0.5)
        seed_device(seed, "cpu")
        assert torch.equal(torch.nn.functional.dropout(torch.ones(100), 0.5), expected)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_matrix_products_have_the_configured_dtype(dtype, expected):
    context = autocast(load_experiment(None, [f"train.dtype={dtype}"]), "cpu")
    for _ in range(2):  # it is entered once per micro-batch
        with context:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(
    "words",
    [
        ["train.micro_batch_size=6"],
        ["model.block_size=8"],
        ["train.reduction_slots=2", "train.micro_batch_size=3"],
        ["train.dtype=bfloat16"],
        ["train.compile=true"],
    ],
)
def test_fingerprint_changes_with_settings_that_change_bits(words):
    base = ["train.global_batch_size=12"]
    assert fingerprint(load_experiment(None, [*base, *words]), Worker()) != fingerprint(
        load_experiment(None, base), Worker()
    )


def test_fingerprint_has_cpus_and_device_but_not_the_rank():
    one = fingerprint(Experiment(), Worker(rank=0, world_size=1, cpus=2, attempt=1))
    assert fingerprint(Experiment(), Worker(rank=3, world_size=4, cpus=2, attempt=9)) == one
    assert fingerprint(Experiment(), Worker(cpus=1)) != one
    assert one["device"] == device_name("cpu")
    assert one["torch"] == torch.__version__
