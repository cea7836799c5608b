"""A process whose children train and track, to be killed: `killable.py URI EXPERIMENT`; each line `RUN_DIR SEED` on its
standard input forks one, which has MLflow imported already, and prints its pid. A child that is not killed goes on for ever.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path


def loss(step):
    """What a step gives, however often it is made."""
    return {"train/loss": 5 - step / 1000} | ({"val/loss": 5 - step / 999} if step % 7 == 0 else {})


def train(run_dir, uri, experiment, seed):
    """From the last checkpoint on, with one every ten steps; as a run does it, but in one process with its tracker."""
    from orchestrator.runs.folder import RunFolder
    from orchestrator.runs.journal import Journal
    from orchestrator.track.mlflow import Tracker

    draw, checkpoint, journal = (
        random.Random(seed),
        run_dir / "checkpoint",
        Journal(RunFolder(run_dir)),
    )
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
        time.sleep(draw.random() / 200)


def main(uri, experiment):
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - what a tracker imports first, and takes seconds

    from orchestrator.track import outbox, sender, server

    server.set_client_options()
    sender.POLL_S, outbox.BATCH = 0.01, 20  # many requests, and moments between them
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
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
