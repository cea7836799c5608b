#!/usr/bin/env python3
"""Train a GPT: prepare the tokens if they are missing, train on Ray, track in MLflow, and go on where a run stopped."""

from orchestrator.config.experiment import Experiment
from orchestrator.runs import lock
from orchestrator.runs import signals as interrupts
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import storage_root
from pipelines.common import experiment_command


def run(experiment: Experiment) -> int:
    with interrupts.signals():
        lock.check(
            RunFolder(storage_root(experiment) / experiment.name)
        )  # before seconds of imports
        from orchestrator.jobs.train import run

        return run(experiment)


def show(experiment: Experiment) -> int:
    from orchestrator.cost.estimate import show

    return show(experiment)


if __name__ == "__main__":
    experiment_command(__doc__, run, dry_run=show)
