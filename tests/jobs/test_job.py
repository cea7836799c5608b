"""The steps of a job, with a function instead of training."""

import contextlib
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from orchestrator.cluster import connection
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import HeldError, RayDiedError
from orchestrator.files import write_json
from orchestrator.jobs import restart
from orchestrator.jobs.job import Job
from orchestrator.runs import events, lock, signals, stop
from orchestrator.runs.ending import Ending


class Tracker:
    """Stands for a tracking server that accepts everything, or nothing."""

    def __init__(self, done, accepts):
        self.done = done
        self.accepts = accepts

    def start(self):
        self.done.append("track")

    def finish(self, status, deadline_s):
        self.done.append(f"tell the server {status}")
        return self.accepts


class SmallJob(Job):
    """Notes its steps in `done`; `act` is called instead of training."""

    def __init__(self, experiment, act=lambda: None, finished=False, accepts=True):
        super().__init__(experiment)
        self.act = act
        self.finished = finished
        self.done = []
        self.tracker = Tracker(self.done, accepts)
        self.watch = SimpleNamespace(over=False)

    def check(self):
        self.done.append("check")

    def is_finished(self):
        return self.finished

    def show_again(self):
        self.done.append("show again")

    def connect(self):
        self.done.append("connect")

    def prepare(self):
        self.done.append("prepare")
        stop.clear(self.folder)

    def steps_stored(self):
        return 40

    @contextlib.contextmanager
    def watching(self):
        yield

    def work(self):
        self.done.append("work")
        self.act()

    def diagnose(self, error):
        if error is not None:
            return Ending("failed", str(error))
        if stop.requested(self.folder):
            return Ending("again", "asked to stop")
        return Ending("done")

    def summarize(self, ending, wall_s):
        self.done.append(f"summarize {ending.kind}")

    def show(self):
        self.done.append("show")


@pytest.fixture
def new_job(tmp_path, monkeypatch):
    """Make a job in an empty storage; the test's own signal handlers are restored."""
    numbers = (*signals.STOPS, signal.SIGINT, signal.SIGALRM)
    monkeypatch.setattr("orchestrator.cluster.nodes.check_nodes", lambda *_: None)
    monkeypatch.setattr(connection, "failure", lambda error=None: None)
    monkeypatch.delenv(restart.VARIABLE, raising=False)
    before = {number: signal.getsignal(number) for number in numbers}
    experiment = load_experiment(None, ["name=small", f"storage={tmp_path}"])
    for number in signals.STOPS:
        signal.signal(number, signal.SIG_DFL)  # nohup and background shells ignore some of them
    signals.begin()
    yield lambda **settings: SmallJob(experiment, **settings)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_steps_of_a_job_come_in_order(new_job, capsys):
    job = new_job()
    assert job.run() == 0
    assert job.done == [
        "check",
        "connect",
        "prepare",
        "track",
        "work",
        "summarize done",
        "tell the server FINISHED",
        "show",
    ]
    first, second = capsys.readouterr().out.splitlines()
    assert first == "starting Ray …"
    assert second == f"MLflow: http://127.0.0.1:5000 (after `pipelines/ui.py {job.storage}`)"


def test_finished_job_is_shown_again_without_ray_and_without_a_lock(new_job):
    job = new_job(finished=True)
    with lock.held(job.folder.driver_lock):
        assert job.run() == 0
    assert job.done == ["check", "show again"]


def test_second_job_is_refused_before_ray_starts(new_job):
    job = new_job()
    with lock.held(job.folder.driver_lock), pytest.raises(HeldError, match="held by process"):
        job.run()
    assert job.done == ["check"]


def fail():
    raise RuntimeError("a worker died")


def press_ctrl_c():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("act", "status", "told", "printed"),
    [
        (fail, 1, "FAILED", "a worker died\n"),
        (press_ctrl_c, 130, "KILLED", ""),
    ],
)
def test_exit_status_and_mlflow_status_follow_from_how_the_work_ended(
    new_job, capsys, act, status, told, printed
):
    job = new_job(act=act)
    assert job.run() == status
    assert job.done[-2:] == [f"tell the server {told}", "show"]
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT"])
def test_signal_asks_the_job_to_stop_and_gives_status_75(new_job, capsys, name):
    job = new_job(act=lambda: os.kill(os.getpid(), signal.Signals[name]))
    assert job.run() == 75
    assert stop.requested(job.folder) == name
    assert capsys.readouterr().err == "asked to stop\n"


def test_signals_after_the_work_do_not_interrupt_the_summary(new_job):
    job = new_job()
    show = job.show

    def be_signalled():
        for number in (*signals.STOPS, signal.SIGINT):
            os.kill(os.getpid(), number)
        show()

    job.show = be_signalled
    assert job.run() == 0
    assert job.done[-1] == "show"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT", "SIGINT"])
def test_signal_that_was_ignored_at_the_start_stays_ignored(new_job, name):
    number = signal.Signals[name]
    signal.signal(number, signal.SIG_IGN)  # as nohup and a background shell do
    signals.begin()
    job = new_job(act=lambda: os.kill(os.getpid(), number))

    def connect():
        os.kill(os.getpid(), number)

    job.connect = connect
    assert job.run() == 0
    assert stop.requested(job.folder) is None


# ---- Ray dies ----


class Replaced(BaseException):
    """The process has ended or was replaced by another command."""


@pytest.fixture
def dead_ray(monkeypatch):
    """Ray has died. Starting the command again, or leaving it, raises `Replaced`."""

    def execv(path, command):
        raise Replaced(path, command)

    def leave(status):
        raise Replaced(status)

    monkeypatch.setattr(connection, "failure", lambda error=None: "Ray's process raylet has died")
    monkeypatch.setattr(connection, "kill", lambda: None)
    monkeypatch.setattr(connection, "POLL_S", 0.01)
    monkeypatch.setattr(restart.os, "execv", execv)
    monkeypatch.setattr(restart, "leave", leave)


def run_command(job):
    """Run a job as a command does."""
    try:
        return job.run()
    except RayDiedError as error:
        restart.end_or_start_again(error)


@pytest.mark.parametrize(("given", "starts"), [("40 2", 2), ("30 2", 0), ("40 x", 0), ("40", 0)])
def test_starts_without_a_step_are_counted(monkeypatch, given, starts):
    monkeypatch.setenv(restart.VARIABLE, given)
    assert restart.starts_without_a_step(40) == starts


def test_command_starts_again_if_its_own_ray_dies(new_job, dead_ray, capsys):
    job = new_job(act=fail)
    with pytest.raises(Replaced) as replaced:
        run_command(job)
    assert replaced.value.args == (sys.executable, [sys.executable, *sys.orig_argv[1:]])
    assert job.done[-1] == "work"
    assert job.folder.driver_lock.read_text() == "", "the new process would take over a lock"
    assert capsys.readouterr().err == "Ray's process raylet has died; starting Ray again\n"


def test_command_starts_again_three_times_without_a_new_step(new_job, dead_ray, monkeypatch):
    for _ in range(3):
        with pytest.raises(Replaced):
            run_command(new_job(act=fail))
    monkeypatch.setattr(SmallJob, "steps_stored", lambda self: 41)
    for _ in range(3):
        with pytest.raises(Replaced):
            run_command(new_job(act=fail))
    job = new_job(act=fail)
    with pytest.raises(Replaced, match="^1$"):
        run_command(job)
    assert job.done[-3:] == ["summarize failed", "tell the server FAILED", "show"]


def test_dead_cluster_that_was_joined_gives_status_75(new_job, dead_ray, monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    job = new_job(act=fail)
    with pytest.raises(Replaced, match="^75$"):
        run_command(job)
    assert job.folder.driver_lock.read_text() == ""
    assert job.done[-2:] == ["tell the server KILLED", "show"]
    message = "Ray's process raylet has died; run the same command again\n"
    assert capsys.readouterr().err == message


def wait_for_dead_ray():
    time.sleep(60)


@pytest.mark.parametrize("wait", [fail, wait_for_dead_ray])
def test_ray_that_dies_while_tokens_are_prepared(new_job, dead_ray, monkeypatch, capsys, wait):
    job = new_job()
    job.prepare = wait
    for _ in range(3):
        with pytest.raises(Replaced, match="python"):
            run_command(job)
    assert capsys.readouterr().err == 3 * "Ray's process raylet has died; starting Ray again\n"
    with pytest.raises(Replaced, match="^1$"):
        run_command(job)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(Replaced, match="^75$"):
        run_command(job)
    assert capsys.readouterr().err == (
        "error: Ray's process raylet has died, also after 3 new starts of Ray\n"
        "error: Ray's process raylet has died; run the same command again\n"
    )
    assert not job.folder.path.exists()


def test_recorded_ending_counts_more_than_a_dead_ray(new_job, dead_ray):
    def diverge():
        job.folder.write_ending(Ending("diverged", "the loss is not finite"))

    job = new_job(act=diverge)
    assert job.run() == 0  # `SmallJob.diagnose` does not read it


def test_command_that_sends_the_rest_is_printed(new_job, capsys):
    job = new_job(accepts=False)
    assert job.run() == 0
    assert f"pipelines/replay_metrics.py {job.folder.path}\n" in capsys.readouterr().out


def test_taking_over_from_a_killed_driver_is_an_event(new_job):
    job = new_job()
    job.folder.path.mkdir()
    write_json(job.folder.run_file, {})
    job.folder.driver_lock.write_text("process 7 on another machine")
    assert job.run() == 0
    (event,) = events.read(job.folder)
    assert event["kind"] == "taken_over"
    assert "process 7 on another machine" in event["message"]
