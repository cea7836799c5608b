#!/usr/bin/env python3
"""Train a GPT: prepare the tokens if they are missing, train on Ray, track in MLflow, and go on where a run stopped."""

from orchestrator.config import Experiment
from orchestrator.driver import run
from orchestrator.plan import dry_run
from pipelines.common import experiment_command


def show_plan(experiment: Experiment) -> int:
    """Print the resolved experiment, its arithmetic and its cost; nothing is written."""
    print(experiment.to_yaml())
    for title, lines in dry_run(experiment):
        print(f"{title}\n" + "\n".join(f"  {line}" for line in lines))
    return 0


if __name__ == "__main__":
    experiment_command(__doc__, run, dry_run=show_plan)
