#!/usr/bin/env python3
"""Train a GPT on Ray and track it in MLflow.

Missing tokens are prepared first. The same command resumes a stopped run.
"""

from pipelines import starting

starting.end_on_ctrl_c(__name__)

from orchestrator.config.experiment import Experiment
from orchestrator.cost import process
from orchestrator.runs import lock
from orchestrator.runs.storage import run_folder
from pipelines.common import experiment_command


def main(experiment: Experiment, profile: int = 0) -> int:
    """Train, or print the summary of a finished run. Profile some steps."""
    # Refuse a second job for this run before the imports, which take seconds.
    lock.refuse_if_held(run_folder(experiment))
    from orchestrator.jobs.train import run

    return run(experiment, profile)


def dry_run(experiment: Experiment) -> int:
    """Print estimates of size, time, memory and disk."""
    process.start_ahead()  # before imports that take half a second
    from orchestrator.cost.estimate import show
    from orchestrator.workers.fitting import resolved_here

    return show(resolved_here(experiment))


if __name__ == "__main__":
    experiment_command(__doc__, main, dry_run=dry_run, profiles=True)
