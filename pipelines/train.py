#!/usr/bin/env python3
"""Train a GPT: prepare the tokens if they are missing, train on Ray, track in MLflow, and go on where a run stopped."""

from orchestrator.config.experiment import Experiment
from orchestrator.runs import lock, signals
from orchestrator.runs.storage import run_folder
from pipelines.common import experiment_command


def run(experiment: Experiment) -> int:
    with signals.sigterm_interrupts():
        lock.check(run_folder(experiment))  # before the imports, which take seconds
        from orchestrator.jobs.train import run

        return run(experiment)


def show(experiment: Experiment) -> int:
    from orchestrator.cost.estimate import show

    return show(experiment)


if __name__ == "__main__":
    experiment_command(__doc__, run, dry_run=show)
