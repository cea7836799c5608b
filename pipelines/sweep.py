#!/usr/bin/env python3
"""Sweep schedules, or any other field: run the trials of the `sweep:` section on Ray Tune.

Trials with equal learning rates up to a step share the steps before it: no step runs twice. The
same command resumes a stopped sweep. If trials were added, it runs only the new steps.
"""

from pipelines import starting

starting.end_on_ctrl_c(__name__)

from orchestrator.config.sweep import sweep_docs
from orchestrator.cost import process
from orchestrator.runs import lock
from orchestrator.runs.storage import run_folder
from orchestrator.sweep.space.expand import Sweep, load_sweep
from pipelines.common import DEFAULT, experiment_command


def main(sweep: Sweep) -> int:
    """Run the trials that are not finished and print the comparison."""
    # Refuse a second job for this sweep before the imports, which take seconds.
    lock.refuse_if_held(run_folder(sweep.base))
    from orchestrator.jobs.sweep import run

    return run(sweep)


def dry_run(sweep: Sweep) -> int:
    """Print the tree of stages and estimates of its cost."""
    process.start_ahead()  # before imports that take half a second
    from orchestrator.sweep.cost import show

    return show(sweep)


if __name__ == "__main__":
    experiment_command(
        __doc__,
        main,
        dry_run=dry_run,
        load=load_sweep,
        docs=sweep_docs,
        default=DEFAULT.with_name("sweep-schedules.yaml"),
    )
