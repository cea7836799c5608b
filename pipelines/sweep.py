#!/usr/bin/env python3
"""Sweep schedules, or any other field: every trial of the file's `sweep:` section, on Ray Tune, each step run once.

Trials that agree up to a step, bit for bit in their learning rates, share the steps before it. Run the same command again
and it goes on; with more values in the grid it runs only what is new."""

from orchestrator.config.sweep import sweep_docs
from orchestrator.runs import lock, signals
from orchestrator.runs.storage import run_folder
from orchestrator.sweep.space import Sweep, load_sweep
from pipelines.common import DEFAULT, experiment_command


def run(sweep: Sweep) -> int:
    with signals.sigterm_interrupts():
        lock.check(run_folder(sweep.base))  # before the imports, which take seconds
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
