#!/usr/bin/env python3
"""Train a GPT: prepare the tokens if they are missing, train on Ray, track in MLflow, and go on where a run stopped."""

from orchestrator.driver import run
from orchestrator.plan import show
from pipelines.common import experiment_command

if __name__ == "__main__":
    experiment_command(__doc__, run, dry_run=show)
