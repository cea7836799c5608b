"""Processes forked from a server that has imported torch and the product once.

So a start takes a tenth of a second instead of five, and the server has no threads of torch.
"""

import multiprocessing
import os
from multiprocessing.process import BaseProcess

# The server starts with the first process, and keeps these modules.
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
    arguments = [(target, job, dict(os.environ)) for job in jobs]
    processes = [context.Process(target=_run, args=each) for each in arguments]
    try:
        for process in processes:
            process.start()
    finally:
        os.environ.clear()
        os.environ |= before
    return processes


def _run(target, job: dict, environment: dict[str, str]) -> None:
    """Call `target` in the environment of this test: the server has that of the first one."""
    os.environ.clear()
    os.environ |= environment
    target(job)
