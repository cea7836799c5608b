"""What `train.dtype=auto` stands for: tables of devices and models."""

import threading
from dataclasses import replace

import pytest
import ray

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

    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)

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
    found = device_module.of_workers(layout, 1)
    experiment = load_experiment(None, [f"model.n_embd={width}", "model.n_head=1"])
    assert dtypes.suitable(experiment, found) == dtype


@pytest.mark.parametrize(
    ("limit", "dtype"),
    [("", "bfloat16"), ("avx512_core_amx", "bfloat16"), ("AVX512_CORE", "float32")],
)
def test_instructions_that_the_environment_forbids_are_not_used(device, monkeypatch, limit, dtype):
    device(BFLOAT16)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert dtypes.fast_dtype(on_gpu=False) == dtype


def test_flags_are_those_of_the_kernel():
    import torch

    assert ("avx512_bf16" in cpu_flags()) == torch.cpu._is_avx512_bf16_supported()


@pytest.mark.parametrize("busy", [False, True])
def test_each_node_finds_its_type_also_while_its_cpus_are_busy(
    ray_cluster, device, monkeypatch, busy
):
    expected = dtypes.fast_dtype(False)
    device(set() if expected == "bfloat16" else BFLOAT16)  # the driver's machine is of another kind
    monkeypatch.setattr(device_module, "has_several_nodes", lambda: True)
    cpus = int(ray.cluster_resources()["CPU"]) if busy else 0
    holder = ray.remote(threading.Event).options(num_cpus=cpus).remote()
    ray.get(holder.is_set.remote())
    assert device_module.of_workers(CPU, 1).fast_dtype == expected


@pytest.mark.parametrize(
    ("types", "dtype"),
    [
        (["bfloat16", "bfloat16"], "bfloat16"),
        (["bfloat16", "float32"], "float32"),
        (["float16", "bfloat16"], "float16"),
    ],
)
def test_unlike_nodes_have_a_type_that_none_of_them_emulates(types, dtype):
    nodes = [replace(CPU, fast_dtype=name, device_name=f"of {name}") for name in types]
    found = device_module.common(nodes)
    assert found.fast_dtype == dtype
    assert found.device_name == ", ".join(sorted({f"of {name}" for name in types}))


@pytest.mark.parametrize(
    ("dtype", "flags", "layout", "words"),
    [
        ("bfloat16", {"avx512f"}, CPU, "4 times as long as with float32"),
        ("bfloat16", BFLOAT16, CPU, None),
        ("bfloat16", BFLOAT16, GPU, "emulate"),
        ("float16", BFLOAT16, CPU, "times as long as with float32"),
        ("float16", set(), GPU, None),
        ("float32", set(), CPU, None),
        ("float16", {"avx512_fp16"}, CPU, None),
    ],
)
def test_emulated_type_is_one_line(device, capsys, dtype, flags, layout, words):
    device(flags)
    experiment = load_experiment(None, [f"train.dtype={dtype}"])
    dtypes.warn_if_emulated(experiment, device_module.of_workers(layout, 1), has_begun=False)
    line = capsys.readouterr().err
    assert line.count("\n") == (words is not None)
    assert words is None or (f"train.dtype={dtype}" in line and words in line)
