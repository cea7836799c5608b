"""Stages on machines that do not have the folder of the sweep. The desk is called without Ray."""

import json
import os
import random
import shutil
from types import SimpleNamespace

import pytest

from orchestrator import lines
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import HeldError, UnreadableError, UserError
from orchestrator.runs import events, journal, lock, stop
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep import progress as progress_module
from orchestrator.sweep.processes import away, desk
from orchestrator.sweep.processes.away import Away
from orchestrator.sweep.processes.desk import Desk, LostTurnError
from orchestrator.sweep.processes.place import Place
from orchestrator.sweep.processes.trainable import StageTrainable
from orchestrator.sweep.report.files import SweepFiles
from orchestrator.sweep.stage import run_stage
from orchestrator.sweep.states import DONE, STOPPED
from orchestrator.train.loop import train as train_alone
from orchestrator.train.numerics import Worker
from tests.helpers.checkpoints import damage
from tests.helpers.fixtures import Killed
from tests.helpers.wait import wait_until

TREE = [
    "sweep.trials.wsd.schedule.kind=wsd",
    "sweep.trials.linear.schedule.decay_shape=linear",
    "sweep.trials.short.train.max_steps=14",
    "sweep.trials.constant-13={schedule.kind: constant, train.max_steps: 13}",
    "sweep.trials.peak.schedule.max_lr=5e-3",
]
LONG = ["sweep.trials.long.schedule.kind=constant"]

MOMENTS = ("before_call", "before_write", "after_call")


class Machines:
    """Machines that train the stages of a sweep in turn: that of the command, and others.

    Args:
        sweep: Folder of the sweep.
        path: Has a folder for the disk of each other machine.
    """

    def __init__(self, sweep, path, monkeypatch):
        self.sweep = sweep
        self.path = path
        self.monkeypatch = monkeypatch
        self.desk = Desk(sweep.path, [])
        self.before_call = lambda method: None
        self.after_call = lambda method: None
        self.before_write = lambda file: None
        write = desk._write
        watched = lambda *args: (self.before_write(args[0]), write(*args))  # noqa: E731
        monkeypatch.setattr(desk, "_write", watched)
        self.calls = []
        self.seen = {}  # all lines that a journal in the folder of the sweep ever had

    def call(self, method, *args):
        self.calls.append(method)
        self.before_call(method)
        result = getattr(self.desk, method)(*args)
        for stage in self.sweep.stages():
            self.seen.setdefault(stage.name, set()).update(lines.read(stage.journal_file))
        self.after_call(method)
        return result

    def here(self):
        return Place(self.sweep, self.call)

    def away(self, name="other"):
        self.monkeypatch.setenv("XDG_CACHE_HOME", str(self.path / name))
        config = {"folder": str(self.sweep.path), "mirror": "s3://bucket/m", "token": "driver"}
        return Away(config, self.call)

    def lose(self, name="other"):
        shutil.rmtree(self.path / name, ignore_errors=True)

    def run(self, study, place_of):
        """Run all stages; `place_of` is called before each. Return how often one was killed."""
        progress = study.progress
        report = SweepFiles(study)
        report.write_figure = lambda: None
        progress.on_stage_end = report.stage_ended
        report.begin()
        kills = 0
        while (stage := progress.next()) is not None:
            try:
                train(place_of(), stage)
            except Killed:
                kills += 1
                self.lose()
                progress.ended(stage, died=True)
            else:
                progress.ended(stage, died=False)
        return kills


def train(place, stage, stop_requested=lambda: False):
    """Train a stage as `StageTrainable` does. Return the lines."""
    try:
        return _train(place, stage, stop_requested)
    except Killed:
        raise
    except Exception as error:
        place.give_up()
        place.failed(stage, Worker(), error)
        raise


def _train(place, stage, stop_requested):
    found = []
    if not place.begin(stage):
        return found
    generator = run_stage(place.sweep.stage(stage), Worker(cpus=1), stop_requested)
    try:
        for line in generator:
            found.append(line)
            place.sync()
    finally:
        generator.close()
    place.finish()
    return found


@pytest.fixture
def study(sweeps, monkeypatch):
    monkeypatch.setattr(away, "PERIOD_S", 1000.0)  # `train` sends after each line
    monkeypatch.setattr(away, "PIECE_BYTES", 40_000)  # a checkpoint has several
    return sweeps.open(*TREE)


@pytest.fixture
def machines(study, tmp_path, monkeypatch):
    return Machines(study.folder, tmp_path / "disks", monkeypatch)


def test_two_machines_give_the_bits_and_the_steps_of_one(sweeps, study, machines):
    places = [machines.here(), machines.away()]
    taken = []

    def place():
        taken.append(places[len(taken) % 2])
        return taken[-1]

    assert machines.run(study, place) == 0
    for name in study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name
    results = [json.loads(stage.result_file.read_text()) for stage in study.folder.stages()]
    assert sum(result["steps_run"] for result in results) == study.tree.steps_in_tree
    assert len(results) > 4 and machines.calls.count("read") > 4
    kept = {stage.name: stage.checkpoint_steps() for stage in study.folder.stages()}
    alone = sweeps.open(*TREE, name="one")
    sweeps.run(alone)
    assert kept == {stage.name: stage.checkpoint_steps() for stage in alone.folder.stages()}
    places[1].close()
    assert not [
        path for path in machines.path.rglob("*") if path.name == "stages" and any(path.iterdir())
    ]


@pytest.mark.parametrize(("words", "step"), [(TREE, None), (LONG, 16)], ids=["stage", "no line"])
def test_trial_without_steps_ends_on_another_machine(sweeps, tmp_path, monkeypatch, words, step):
    """A trial that is added ends where a stage ended, or at a step without a line."""
    monkeypatch.setattr(away, "PERIOD_S", 1000.0)
    first = sweeps.open(*words)
    step = step or first.tree.stages_of("short")[0].stop
    machines = Machines(first.folder, tmp_path / "disks", monkeypatch)
    machines.run(first, machines.away)
    added = f"sweep.trials.added={{schedule.kind: constant, train.max_steps: {step}}}"
    again = sweeps.open(*words, added)
    [stage] = [again.tree.by_id[id_] for id_ in again.tree.to_run]
    assert again.tree.cost(stage) == 0
    machines.run(again, machines.away)
    assert sweeps.outcome(again.folder.trial("added")) == sweeps.alone(again, "added")


def test_sweep_that_branches_off_a_run_gets_its_state(sweeps, machines, tiny_dataset):
    run = RunFolder(sweeps.folder / "source")
    run.path.mkdir()
    words = ["name=source", f"data.dir={tiny_dataset}", *sweeps.small, "schedule.kind=constant"]
    experiment = load_experiment(None, words)
    run.experiment_file.write_text(experiment.to_yaml())
    train_alone(experiment, run, tiny_dataset)
    branch = sweeps.open(
        "sweep.trials.wsd.train.max_steps=26", "sweep.from=source@16", name="branch"
    )
    others = Machines(branch.folder, machines.path, machines.monkeypatch)
    others.run(branch, others.away)
    assert others.calls.count("read") > 1
    assert sweeps.outcome(branch.folder.trial("wsd")) == sweeps.alone(branch, "wsd")


@pytest.mark.parametrize(
    "seed", [6, 10, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(20, 40))]
)
def test_lost_machines_change_no_bit_and_lose_no_line(sweeps, study, machines, monkeypatch, seed):
    """A machine is lost before a call of the desk, while it writes, or after the call."""
    monkeypatch.setattr(progress_module, "PATIENCE", 100)
    rng = random.Random(seed)
    left = [rng.randint(1, 12)]

    def die(_):
        left[0] -= 1
        if left[0] <= 0:
            left[0] = rng.randint(1, 30)
            raise Killed

    def place():
        moment = rng.choice(MOMENTS)
        for name in MOMENTS:
            setattr(machines, name, lambda _: None)
        if rng.random() < 0.2:
            return machines.here()
        setattr(machines, moment, die)
        return machines.away()

    kills = machines.run(study, place)
    assert kills
    for name in study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name
    for stage in study.folder.stages():
        kept = set(lines.read(stage.journal_file))
        for aside in journal.asides(stage):
            kept |= set(lines.read(aside.path))
        assert machines.seen[stage.name] <= kept


def test_process_that_lost_its_turn_writes_nothing(study, machines):
    stage = study.progress.next()
    first, second = machines.away("first"), machines.away("second")
    assert first.begin(stage)
    with pytest.raises(HeldError), lock.held(study.folder.stage(stage).writer_lock, 0.1):
        pass
    assert second.begin(stage)
    (first.folder.path / "stopped.json").write_text("{}")
    with pytest.raises(LostTurnError):
        first.sync()
    first.give_up()
    assert not study.folder.stage(stage).ending_file.exists()
    second.give_up()
    with lock.held(study.folder.stage(stage).writer_lock, 0.1):
        pass


@pytest.mark.parametrize("fault", ["damaged checkpoint", "half a line"])
def test_events_of_both_machines_stay(sweeps, study, machines, fault):
    """The desk notes a damaged checkpoint; a killed command left half a line."""
    stage = study.progress.next()
    folder = study.folder.stage(stage)
    events.note(folder, "first", "of the command")

    def die(_):
        if machines.calls.count("commit") == 2:
            raise Killed

    machines.after_call = die
    with pytest.raises(Killed):
        train(machines.away(), stage)
    machines.after_call = lambda _: None
    if fault == "half a line":
        with open(folder.events_file, "a") as file:
            file.write('{"kind": "ha')
    else:
        damage(folder.checkpoint(max(folder.checkpoint_steps())))
    place = machines.away("second")
    assert place.begin(stage)
    before = folder.events_file.read_bytes()
    events.note(place.folder, "last", "of the other machine")
    place.sync()
    after = folder.events_file.read_bytes()
    assert after.startswith(before) and after == place.folder.events_file.read_bytes()
    kinds = [event["kind"] for event in events.read(folder)]
    middle = ["checkpoint_damaged"] if fault == "damaged checkpoint" else []
    assert kinds == ["first", *middle, "last"]


def test_stop_request_reaches_the_other_machine(sweeps, study, machines):
    stage = study.progress.next()
    place = machines.away()

    def ask(method):
        if machines.calls.count("commit") == 1:
            stop.request(study.folder, "SIGTERM")

    machines.after_call = ask
    train(place, stage, lambda: stop.requested(place.sweep) is not None)
    folder = study.folder.stage(stage)
    assert folder.read_ending().kind == "again"
    assert 0 < max(folder.checkpoint_steps()) < study.tree.by_id[stage].stop
    study.progress.ended(stage, died=False)
    assert study.progress.failures == {}
    stop.clear(study.folder)
    again = sweeps.open(*TREE)
    sweeps.run(again)
    for name in again.trials:
        assert sweeps.outcome(again.folder.trial(name)) == sweeps.alone(again, name), name


def test_process_trains_the_next_stage_after_one_whose_files_could_not_be_sent(
    sweeps, tmp_path, monkeypatch
):
    """The desk is started again between two evaluations; then the scheduler stops the stage."""
    monkeypatch.setattr(away, "PERIOD_S", 0.01)
    study = sweeps.open("sweep.grid.schedule.max_lr=[1e-2,1e-5]", "sweep.stop=asha")
    machines = Machines(study.folder, tmp_path / "disks", monkeypatch)
    trainable = object.__new__(StageTrainable)
    trainable.place, trainable.layout = machines.away(), study.layout
    trainable.sweep, trainable.reported_metric = trainable.place.sweep, "val/loss"
    trainable.stop_requested = stop.Listener(trainable.sweep)
    trainable.crew = SimpleNamespace(
        run=lambda train, *args: train(args[0], Worker(cpus=1), args[1]), peers=[]
    )
    first = study.progress.next()
    trainable._begin(first)
    assert not trainable.step().get("done")
    machines.desk = Desk(study.folder.path, [])
    wait_until(lambda: stop.requested(trainable.sweep))
    study.progress.ended(first, died=False)
    assert study.progress.states.by_stage[first] == STOPPED
    second = study.progress.next()
    assert trainable.reset_config({"stage": second})
    while not trainable.step().get("done"):
        pass
    study.progress.ended(second, died=False)
    assert study.progress.states.by_stage[second] == DONE
    trainable.cleanup()


def test_full_disk_of_the_command_is_one_line(study, machines, monkeypatch):
    stage = study.progress.next()

    def full(file, start, data):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(desk, "_write", full)
    with pytest.raises(OSError, match="No space"):
        train(machines.away(), stage)
    study.progress.ended(stage, died=True)
    assert study.progress.full_disk.startswith("the disk is full")


@pytest.mark.parametrize("period_s", [0.001, 1000.0], ids=["thread", "no thread"])
@pytest.mark.parametrize(
    ("module", "name", "error", "kind"),
    [
        (away.places, "tokens", UserError("s3://bucket/m/data/x: has no tokens"), "user"),
        (away.places, "tokens", OSError(28, "No space left on device", "/there"), "user"),
        (desk, "has_result", UnreadableError("step-4: cannot be read at the moment"), "again"),
        (desk, "verify", UserError("step-4: its content has changed"), "user"),
    ],
    ids=["begin", "full disk there", "no result", "checkpoint"],
)
def test_error_of_another_machine_is_the_reason(
    study, machines, monkeypatch, module, name, error, kind, period_s
):
    stage = study.progress.next()
    place = machines.away()
    monkeypatch.setattr(away, "PERIOD_S", period_s)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(type(error)):
            train(place, stage, lambda: stop.requested(place.sweep) is not None)
    study.progress.ended(stage, died=True)
    ending = study.progress.failures[stage]
    assert ending.kind == kind
    assert (error.strerror if isinstance(error, OSError) else str(error)) in ending.reason
    assert (study.progress.full_disk is not None) == isinstance(error, OSError)


@pytest.mark.parametrize("place_of", [Machines.here, Machines.away])
def test_stage_in_which_a_worker_still_writes_begins_again(
    sweeps, study, machines, monkeypatch, place_of
):
    """Its machine may be cut off from Ray, and not from the storage."""
    monkeypatch.setattr(lock, "WRITER_WAIT_S", 0.1)
    stage = study.progress.next()
    with lock.held(study.folder.stage(stage).writer_lock), pytest.raises(HeldError):
        train(place_of(machines), stage)
    study.progress.ended(stage, died=True)
    [event] = [event for event in events.read(study.folder) if event["kind"] == "restart"]
    assert f"held by process {os.getpid()} on " in event["message"]
    machines.run(study, lambda: place_of(machines))
    for name in study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name


def test_stage_with_a_result_does_not_begin(study, machines):
    stage = study.progress.next()
    assert train(machines.away(), stage) and not train(machines.away(), stage)
