"""Processes forked from a server that has imported torch and the product once.

So a start takes a tenth of a second instead of five, and the server has no threads of torch.
"""

import multiprocessing
import os
from multiprocessing.process import BaseProcess

# The server starts with the first process, and keeps these modules and this environment.
MODULES = ["tests.faults.command", "tests.helpers.train_rank", "tests.helpers.stuck"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "1000"}


def start(target, jobs: list[dict], *modules: str) -> list[BaseProcess]:
    """Start `target(job)` in a process for each job.

    Args:
        target: A function of a module.
        jobs: Its arguments.
        modules: More modules that the server imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*MODULES, *modules])
    before = dict(os.environ)
    os.environ |= ENVIRONMENT
    processes = [context.Process(target=target, args=(job,)) for job in jobs]
    try:
        for process in processes:
            process.start()
    finally:
        os.environ.clear()
        os.environ |= before
    return processes
