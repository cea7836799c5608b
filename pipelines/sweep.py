#!/usr/bin/env python3
"""Sweep schedules, or any other field: run the trials of the `sweep:` section on Ray Tune.

Trials with the same learning rates up to a step share these steps: each step is run once. The same
command resumes a sweep that was stopped, and runs only what is new if the sweep has grown.
"""

from orchestrator.config.sweep import sweep_docs
from orchestrator.runs import lock, signals
from orchestrator.runs.storage import run_folder
from orchestrator.sweep.space.expand import Sweep, load_sweep
from pipelines.common import DEFAULT, experiment_command


def run(sweep: Sweep) -> int:
    """Run the trials that are not finished and print the comparison."""
    with signals.sigterm_interrupts():
        # Before the imports, which take seconds: refuse a second job for this sweep at once.
        lock.check(run_folder(sweep.base))
        from orchestrator.jobs import sweep as job

        return job.run(sweep)


def show(sweep: Sweep) -> int:
    """Print the estimates of `--dry-run`."""
    from orchestrator.sweep import cost

    return cost.show(sweep)


if __name__ == "__main__":
    experiment_command(
        __doc__,
        run,
        load=load_sweep,
        dry_run=show,
        docs=sweep_docs,
        default=DEFAULT.with_name("sweep-schedules.yaml"),
    )
