"""What `train.dtype=auto` stands for: tables of devices and models."""

import pytest

from orchestrator.cluster import device as device_module
from orchestrator.cluster import dtypes
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import load_experiment
from orchestrator.machine import cpu_flags

CPU, GPU = Layout(1, 1, False), Layout(1, 1, True)
BFLOAT16 = {"fpu", "avx512_bf16"}


@pytest.fixture
def device(monkeypatch):
    """Make this machine one with these CPU flags, and a GPU with or without bfloat16."""
    import torch

    def become(flags, gpu_has_bfloat16=False):
        monkeypatch.setattr(dtypes, "cpu_flags", lambda: flags)
        monkeypatch.setattr(device_module, "has_several_nodes", lambda: False)
        answer = lambda including_emulation: gpu_has_bfloat16 or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", answer)

    return become


@pytest.mark.parametrize(
    ("flags", "gpu_has_bfloat16", "layout", "width", "dtype"),
    [
        ({"avx512f"}, False, CPU, 768, "float32"),
        ({"amx_bf16"}, False, CPU, 768, "bfloat16"),
        (BFLOAT16, False, CPU, 512, "bfloat16"),
        (BFLOAT16, False, CPU, 384, "float32"),  # as before
        (BFLOAT16, False, GPU, 768, "float16"),
        (set(), True, GPU, 768, "bfloat16"),
        (set(), True, GPU, 384, "bfloat16"),
        (set(), True, CPU, 768, "float32"),
    ],
)
def test_type_suits_device_and_width(device, flags, gpu_has_bfloat16, layout, width, dtype):
    device(flags, gpu_has_bfloat16)
    found = device_module.of_workers(layout)
    experiment = load_experiment(None, [f"model.n_embd={width}", "model.n_head=1"])
    assert dtypes.suitable(experiment, found) == dtype


def test_flags_are_those_of_the_kernel():
    import torch

    assert ("avx512_bf16" in cpu_flags()) == torch.cpu._is_avx512_bf16_supported()


def test_a_worker_finds_the_type_on_a_cluster_of_several_nodes(ray_cluster, device, monkeypatch):
    expected = dtypes.fast_dtype(False)
    device(set() if expected == "bfloat16" else BFLOAT16)  # the driver's machine is of another kind
    monkeypatch.setattr(device_module, "has_several_nodes", lambda: True)
    assert device_module.of_workers(CPU).fast_dtype == expected


@pytest.mark.parametrize(
    ("dtype", "flags", "layout", "words"),
    [
        ("bfloat16", {"avx512f"}, CPU, "4 times as long as with float32"),
        ("bfloat16", BFLOAT16, CPU, None),
        ("bfloat16", BFLOAT16, GPU, "emulate"),
        ("float16", BFLOAT16, CPU, "times as long as with float32"),
        ("float16", set(), GPU, None),
        ("float32", set(), CPU, None),
        ("auto", set(), CPU, None),
    ],
)
def test_emulated_type_is_one_line(device, capsys, dtype, flags, layout, words):
    device(flags)
    experiment = load_experiment(None, [f"train.dtype={dtype}"])
    dtypes.warn_if_emulated(experiment, device_module.of_workers(layout))
    line = capsys.readouterr().err
    assert line.count("\n") == (words is not None)
    assert words is None or (f"train.dtype={dtype}" in line and words in line)
