#!/usr/bin/env python3
"""Sweep schedules, or any other field: every trial of the file's `sweep:` section, on Ray Tune, each step run once.

Trials that agree up to a step, bit for bit in their learning rates, share the steps before it. Run the same command again
and it goes on; with more values in the grid it runs only what is new."""

from orchestrator.config.sweep import sweep_docs
from orchestrator.runs import lock
from orchestrator.runs import signals as interrupts
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import storage_root
from orchestrator.sweep.space import Sweep, load_sweep
from pipelines.common import DEFAULT, experiment_command


def run(sweep: Sweep) -> int:
    with interrupts.signals():
        lock.check(
            RunFolder(storage_root(sweep.base) / sweep.base.name)
        )  # before seconds of imports
        from orchestrator.jobs.sweep import run

        return run(sweep)


def show(sweep: Sweep) -> int:
    from orchestrator.sweep.cost import show

    return show(sweep)


if __name__ == "__main__":
    experiment_command(
        __doc__,
        run,
        load=load_sweep,
        dry_run=show,
        docs=sweep_docs,
        default=DEFAULT.with_name("sweep-schedules.yaml"),
    )
