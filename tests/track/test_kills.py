"""Runs and senders that are killed at any moment: MLflow has one value per metric and step.

First, a process gets SIGKILL at random moments. Then, a sender is simulated at each moment, and at
each pair of moments, of a short history.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.track.mlflow import Projection
from orchestrator.track.outbox import file_mark
from orchestrator.track.tracker import resend_metrics
from tests.helpers import killable
from tests.helpers.tracked import client, curve, expected, rows, sent_step
from tests.helpers.wait import wait_until

EXPERIMENT = "killed"


@pytest.fixture
def run_dir(tmp_path, request):
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"name": "demo", "key": request.node.name, "attempts": [{}]})
    )
    return folder


def assert_exact(store, run_dir):
    """MLflow has one value per metric and step, the first one written, and the whole journal."""
    sent = rows(store, run_dir)
    assert sent == expected(run_dir)
    assert set(curve(run_dir)) <= {row[:3] for row in sent}


# ---- SIGKILL at random moments ----


def test_run_killed_at_random_moments_and_resumed(run_dir, store, uri):
    draw = random.Random(0)
    sent_steps = set()
    assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT)  # creates the store
    command = [sys.executable, str(Path(killable.__file__)), uri, EXPERIMENT]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "ready\n"
        for seed in range(16):
            parent.stdin.write(f"{run_dir} {seed}\n")
            parent.stdin.flush()
            pid = int(parent.stdout.readline())
            try:
                file = draw.choice(["metrics.jsonl", "tracking.json"])
                wait_for_changes(run_dir / file, draw.randrange(1, 12))
            finally:
                kill(pid)
            sent_steps.add(sent_step(run_dir))
        parent.stdin.close()
    assert resend_metrics(RunFolder(run_dir), uri, EXPERIMENT)
    assert_exact(store, run_dir)
    steps = [line["step"] for line in journal.read(RunFolder(run_dir))]
    assert steps == list(range(len(steps)))
    assert curve(run_dir) == sorted(
        (key, step, value) for step in steps for key, value in killable.loss(step).items()
    )
    assert len(journal.asides(RunFolder(run_dir))) > 4
    assert len(sent_steps) > 4


def wait_for_changes(file, count):
    """Wait until a file was seen to change `count` times."""
    marks = set()

    def changed_often():
        marks.add(file_mark(file))
        return len(marks) > count

    wait_until(changed_often, pause_s=0.001)


def kill(pid):
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


# ---- each moment ----


class DeadError(BaseException):
    """Stands for a SIGKILL."""


class History:
    """Three attempts of a run, of which two are killed. `gap()` is called between any two writes.

    The second attempt resumes from the checkpoint of step 4, the third one from that of step 8.
    They have other intervals, so other steps and metrics are logged. Once, the run is killed while
    it rewinds the journal.
    """

    def __init__(self, run_dir, monkeypatch, gap, keeps_line):
        self.journal = Journal(RunFolder(run_dir))
        self.gap = gap
        self.keeps_line = keeps_line
        self.clock = itertools.count(1000)
        self.writes = itertools.count()
        self.write = journal.write_atomically
        monkeypatch.setattr(journal, "write_atomically", self._write)

    def _write(self, path, content, *, durable, dies_at=3):
        self.gap()
        if next(self.writes) == dies_at:
            raise DeadError
        self.write(path, content, durable=durable)
        self.gap()

    def log(self, *steps, **more):
        for step in steps:
            self.journal.write(
                {
                    "step": step,
                    "timestamp": next(self.clock),
                    "train/loss": 5 - step / 10,
                    "optim/lr": 0.5,
                    **more,
                }
            )
            self.gap()

    def run(self):
        self.log(0, 2)
        self.log(4, 6, **{"val/loss": 4.0})
        self.log(8)
        if self.keeps_line:
            self.journal.rewind(4)
        else:
            # The checkpoint of step 4 was written before the line of step 4.
            self.journal.rewind(3)
            self.log(4)
        self.log(5, 6)
        self.log(8, **{"val/loss": 3.0})
        self.log(9)
        with contextlib.suppress(DeadError):
            self.journal.rewind(8)  # killed after the aside was written
        self.journal.rewind(8)
        self.log(9, **{"val/loss": 2.0})
        self.log(10)


class Sending:
    """The senders of one history. `plan[n]` tells what happens in gap number n:

    whole      A new process sends everything and ends.
    goes on    A process that sends in several gaps sends everything.
    loses k    A new process is killed before MLflow accepts its request number k.
    forgets k  A new process is killed after that, before it writes tracking.json.
    """

    def __init__(self, run_dir, log_batch, run_id, plan):
        self.run_dir = run_dir
        self.log_batch = log_batch
        self.plan = plan
        self.gaps = itertools.count()
        self.living = None
        (run_dir / "run.json").write_text('{"name": "demo", "key": "k"}')
        (run_dir / "tracking.json").write_text(
            json.dumps({"uri": "here", "key": "k", "run_id": run_id})
        )

    def gap(self):
        match self.plan.get(next(self.gaps), "").split():
            case ["whole"]:
                self.process().send_metrics()
            case ["goes", "on"]:
                self.living = self.living or self.process()
                self.living.send_metrics()
            case [deed, number]:
                with contextlib.suppress(DeadError):
                    self.process(int(number), deed == "forgets").send_metrics()

    def process(self, dies_at=None, accepted=False):
        """Return a new sender of this run, which is killed at request number `dies_at`."""
        made = Projection(RunFolder(self.run_dir), "here", EXPERIMENT, threading.Event())
        made.load()
        requests = itertools.count(1)

        def log_batch(run_id, metrics):
            last = next(requests) == dies_at
            if not last or accepted:
                self.log_batch(run_id, metrics=metrics)
            if last:
                raise DeadError

        made.client = SimpleNamespace(log_batch=log_batch)
        return made


GAPS = 23
DEEDS = ["whole", "goes on", "forgets 1", "forgets 2", "forgets 3", "loses 1", "loses 2", "loses 3"]


def play(folder, monkeypatch, log_batch, run_id, plan, keeps_line):
    """Run one history to its end, then send the rest."""
    folder.mkdir()
    sending = Sending(folder, log_batch, run_id, plan)
    with monkeypatch.context() as patch:
        History(folder, patch, sending.gap, keeps_line).run()
    assert next(sending.gaps) == GAPS - keeps_line
    sending.process().send_metrics()


@pytest.mark.parametrize("keeps_line", [True, False])
def test_sender_at_every_moment_of_a_run(keeps_line, run_dir, store, uri, monkeypatch):
    monkeypatch.setattr("orchestrator.track.outbox.BATCH", 6)
    mlflow = client(uri)
    experiment_id = mlflow.create_experiment(f"moments {keeps_line}", store.parent.as_uri())
    deeds = DEEDS[1::2] if keeps_line else DEEDS[::2]  # half of them, for speed
    for gap, deed in itertools.product(range(GAPS), deeds):
        folder = run_dir / f"{gap} {deed}"
        run = mlflow.create_run(experiment_id)
        play(
            folder,
            monkeypatch,
            mlflow.log_batch,
            run.info.run_id,
            {gap: deed, gap + 3: "goes on"},
            keeps_line,
        )
        assert_exact(store, folder)


@pytest.mark.parametrize(
    ("keeps_line", "pairs"),
    [
        (True, [("forgets 1", "whole"), ("goes on", "forgets 2"), ("loses 2", "goes on")]),
        (False, [("goes on", "goes on"), ("whole", "forgets 1")]),
    ],
)
def test_senders_at_every_pair_of_moments_of_a_run(keeps_line, pairs, run_dir, monkeypatch):
    """A set stands for MLflow: it stores a row once, also if it is sent twice, as MLflow does."""
    monkeypatch.setattr("orchestrator.track.outbox.BATCH", 6)
    monkeypatch.setattr("os.fsync", lambda fd: None)
    histories = itertools.product(itertools.combinations(range(GAPS), 2), pairs)
    for number, (gaps, deeds) in enumerate(histories):
        sent = set()

        def log_batch(run_id, metrics, sent=sent):
            sent.update((m.key, m.step, m.value, m.timestamp) for m in metrics)

        folder = run_dir / str(number)
        plan = dict(zip(gaps, deeds, strict=True))
        play(folder, monkeypatch, log_batch, "r", plan, keeps_line)
        assert sorted(sent) == expected(folder), plan
        assert set(curve(folder)) <= {row[:3] for row in sent}, plan
        shutil.rmtree(folder)
