"""The device that workers compute on: its model, and the type that it computes fast."""

from dataclasses import replace

from orchestrator import machine
from orchestrator.cluster import dtypes
from orchestrator.cluster.layout import Layout, has_several_nodes


def of_workers(layout: Layout) -> Layout:
    """Return the layout with the device of its workers. Waits for the resources of a worker."""
    if not has_several_nodes():
        return here(layout)
    import ray

    # The machine of the driver may be of another kind.
    task = ray.remote(here).options(num_cpus=layout.cpus_per_worker, num_gpus=int(layout.use_gpu))
    return ray.get(task.remote(layout))


def here(layout: Layout) -> Layout:
    """Return the layout with the device of this machine."""
    name = _gpu_name() if layout.use_gpu else machine.processor()
    return replace(layout, device_name=name, fast_dtype=dtypes.fast_dtype(layout.use_gpu))


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
