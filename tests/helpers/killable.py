"""Forks processes that train and track until a test kills them: `killable.py URI EXPERIMENT`.

Each line `RUN_DIR SEED` on stdin forks one process and prints its pid. MLflow is imported before,
so a fork takes no time. A process that is not killed never ends.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path


def loss(step):
    """Return the metrics of a step. They are the same if the step is repeated."""
    metrics = {"train/loss": 5 - step / 1000}
    if step % 7 == 0:
        metrics["val/loss"] = 5 - step / 999
    return metrics


def train(run_dir, uri, experiment, seed):
    """Write a journal from the last checkpoint on, with a checkpoint every ten steps.

    Unlike in a real run, the tracker is in the same process.
    """
    from orchestrator.runs.folder import RunFolder
    from orchestrator.runs.journal import Journal
    from orchestrator.track.tracker import Tracker

    rng = random.Random(seed)
    checkpoint = run_dir / "checkpoint"
    journal = Journal(RunFolder(run_dir))
    Tracker(RunFolder(run_dir), uri, experiment).start()
    step = int(checkpoint.read_text()) if checkpoint.exists() else -1
    journal.rewind(step)
    while True:
        step += 1
        journal.append(step, loss(step))
        if step % 10 == 0:
            temporary = run_dir / ".checkpoint"
            temporary.write_text(str(step))
            os.replace(temporary, checkpoint)
        time.sleep(rng.random() / 200)


def main(uri, experiment):
    # A tracker imports this module first. It takes seconds.
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

    from orchestrator.track import outbox, sender, server

    server.set_client_options()
    # Many small requests, so that kills come at different moments of them.
    sender.POLL_S = 0.01
    outbox.BATCH = 20
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    print("ready", flush=True)
    for line in sys.stdin:
        run_dir, seed = line.split()
        pid = os.fork()
        if not pid:
            with contextlib.suppress(KeyboardInterrupt):
                train(Path(run_dir), uri, experiment, int(seed))
        print(pid, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
