#!/usr/bin/env python3
"""Train a GPT: prepare the tokens if they are missing, train on Ray, track in MLflow, and go on where a run stopped."""

from orchestrator import interrupts, lease
from orchestrator.config import Experiment
from orchestrator.storage import storage_root
from pipelines.common import experiment_command


def run(experiment: Experiment) -> int:
    with interrupts.signals():
        lease.check(storage_root(experiment) / experiment.name)  # before seconds of imports
        from orchestrator.driver import run

        return run(experiment)


def show(experiment: Experiment) -> int:
    from orchestrator.plan import show

    return show(experiment)


if __name__ == "__main__":
    experiment_command(__doc__, run, dry_run=show)
