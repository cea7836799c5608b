"""A command of the product in a forked process, without Ray: train, sweep or prepare.

`work` runs what `pipelines/` runs, from the arguments to the exit status. Only Ray is replaced:
workers are forked processes (`rank.py`), which are started again when one of them dies, as Ray
starts them, and the tasks of a preparation run in the process itself. So a command takes about a
second, and a campaign can afford hundreds.
"""

import contextlib
import importlib
import math
import os
import signal
import sys
import time
import traceback
import types
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from orchestrator.cluster import connection, device, nodes
from orchestrator.cluster import layout as cluster
from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.data import prepare, tasks
from orchestrator.jobs import job as job_module
from orchestrator.jobs import sweep as sweep_job
from orchestrator.jobs import train as train_job
from orchestrator.objects.address import Address
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.sweep import cost
from orchestrator.sweep.space.expand import load_sweep
from orchestrator.workers import places, ray_train
from pipelines import common
from pipelines import prepare as prepare_command
from pipelines import sweep as sweep_command
from pipelines import train as train_command
from tests.faults import corpora, hooks, rank
from tests.faults.rank import RankStarter
from tests.helpers.here import LocalTasks

PATIENCE_S = 0.3  # after the end of a rank, until the others are killed
STARTS = 12  # of the workers by one command; Ray's own limit is 1000


@dataclass
class Ended:
    """How a command ended: its status (negative: the signal that killed it) and its texts."""

    status: int
    out: str
    err: str

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.out + self.err

    @property
    def lines(self) -> list[str]:
        """What the user reads on stderr."""
        return [line for line in self.err.splitlines() if line.strip()]


class Command:
    """One start of a command.

    Args:
        starter: Forks the process.
        verb: "train", "sweep" or "prepare".
        words: The arguments.
        path: Folder of its files: stdout, stderr, and those of the ranks. It must not exist.
        job: Further facts for `work`: see there.
    """

    def __init__(
        self, starter: RankStarter, verb: str, words: list[str], path: Path, **job: Any
    ) -> None:
        path.mkdir(parents=True)
        self.path = path
        self.first_step = path / "first-step"
        job |= {"verb": verb, "words": words, "path": str(path)}
        [self.process] = starter.start([job], work)

    def wait(self, seconds: float) -> Ended | None:
        """Wait for the end, then for the ranks that outlive a killed command; None: too long."""
        wait([self.process.sentinel], seconds)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            self.process.join()
        self._end_ranks()
        if status is None:
            return None
        return Ended(status, self._text("out"), self._text("err"))

    def _text(self, name: str) -> str:
        file = self.path / name  # a command that was killed early has none
        return file.read_text(errors="replace") if file.exists() else ""

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def _end_ranks(self) -> None:
        """Kill what the command has left, as Ray ends the workers of a driver that died."""
        for file in self.path.glob("pid-*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(file.name.removeprefix("pid-")), signal.SIGKILL)


# ---- inside of the process ----


def work(job: dict[str, Any]) -> None:
    """Run a command and end the process with its status.

    Keys of `job`: verb, words, path; `world`, the number of workers; `faults` of the first start of
    the workers (with `stays`: of each start; with `everywhere`: of this process too);
    `environment`; `environments` of ranks; `spread`, whether ranks may be on other nodes; `values`
    of variables, by `module:name`; `closed`, a stream without a reader;
    `tracked`, whether MLflow is used; `change` of a corpus that is read; `breaks`, a name of
    `breaks.BREAKS`.
    """
    folder = Path(job["path"])
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if job.get("closed") == name:
            reader, descriptor = os.pipe()
            os.close(reader)
        os.dup2(descriptor, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name, value in job.get("environment", {}).items():
        os.environ[name] = value
    for place, value in job.get("values", {}).items():
        module, _, name = place.partition(":")
        _put(importlib.import_module(module), name, value)
    status: Any = 1
    try:
        _replace_ray(job)
        for fault in job.get("faults", []):
            if fault["everywhere"]:
                hooks.fail(fault["kind"], fault, lambda moment: None)
        if job.get("breaks"):
            from tests.faults.breaks import BREAKS

            BREAKS[job["breaks"]].install()
        _main(job["verb"], job["words"])
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status if isinstance(status, int) else 1)


def _main(verb: str, words: list[str]) -> None:
    module: Any = {
        "train": train_command,
        "sweep": sweep_command,
        "prepare": prepare_command,
    }[verb]
    sys.argv = [f"pipelines/{verb}.py", os.devnull, *words]
    load: Callable[..., Any] = load_sweep if verb == "sweep" else load_experiment
    common.experiment_command(
        verb, module.main, dry_run=getattr(module, "dry_run", module.main), load=load
    )


def _put(owner: Any, name: str, value: Any) -> None:
    """Replace a function of the product, which must exist."""
    assert hasattr(owner, name), f"{owner}.{name} was renamed"
    setattr(owner, name, value)


def _replace_ray(job: dict[str, Any]) -> None:
    world = job.get("world", 1)
    _put(connection, "connect", lambda **_: None)
    _put(connection, "job_id", lambda: None)
    _put(nodes, "has_several_nodes", lambda: False)
    _put(cluster, "find_layout", lambda *_: Layout(world, 1, False))
    _put(cluster, "capacity", lambda *_: 1)
    _put(device, "has_several_nodes", lambda: False)
    _put(cluster, "has_several_nodes", lambda: False)
    _put(job_module, "has_several_nodes", lambda: job.get("spread", False))
    _put(prepare, "RayTasks", LocalTasks)
    if job.get("change"):
        _change_between_passes(*job["change"])
    _put(cost, "estimate_of", lambda *_, **__: "not measured")
    if not job.get("tracked"):
        _put(train_job, "Tracker", NoTracker)
        _put(sweep_job, "Tracker", NoTracker)
        _put(job_module, "resend_metrics", lambda *_: True)
    ranks = Ranks(job)
    _put(ray_train, "fit", ranks.fit)
    tune: Any = types.ModuleType("orchestrator.sweep.tune")
    tune.execute = ranks.execute
    sys.modules[tune.__name__] = tune
    import orchestrator.sweep

    orchestrator.sweep.tune = tune  # type: ignore[attr-defined]


def _change_between_passes(how: str, file: str) -> None:
    """Change a file of the corpus while a preparation reads it."""
    read_pieces = tasks.read_pieces
    changed: list[str] = []

    def reading(*args: Any) -> Any:
        for piece in read_pieces(*args):
            if not changed:
                changed.append(how)
                corpora.change_file(how, file)
            yield piece

    _put(tasks, "read_pieces", reading)


class NoTracker:
    """Stands for a tracking server that accepts everything."""

    run_id = None
    url = None

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def start(self) -> None:
        pass

    def finish(self, *_: Any, **__: Any) -> bool:
        return True


class Ranks:
    """Does what Ray does: starts the workers, and starts them again when one of them dies.

    The workers are forked by a process that was forked before this one had threads.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.faults = job.get("faults", [])
        self.connection, other_end = Pipe()
        if os.fork() == 0:
            self.connection.close()
            _serve(other_end, Path(job["path"]))
        other_end.close()

    def fit(
        self,
        experiment: Experiment,
        folder: RunFolder,
        data_dir: Path,
        layout: Layout,
        profile: int = 0,
        mirror: Address | None = None,
    ) -> None:
        """Stands for `ray_train.fit`."""
        launch = uuid.uuid4().hex[:8]
        more = {
            **places.of_driver(folder, data_dir, mirror),
            "experiment": experiment.model_dump(),
            "launch": launch,
            "environments": self.job.get("environments", {}),
            "profile": profile,
            "code": [],
        }
        for _ in range(STARTS):
            # As `_work`: an ending is final.
            if folder.ending_file.exists() or self._start(folder, layout.num_workers, more):
                return
        raise RuntimeError("the workers were started too often")

    def execute(self, study: Any, _slots: int, _mirror: Address | None = None) -> None:
        """Stands for `tune.execute`, with one stage at a time."""
        progress = study.progress
        while True:
            stage = progress.next()
            if stage is None:
                return
            more = {"sweep_dir": str(study.folder.path)}
            folder = SweepFolder(study.folder.path).stage(stage)
            done = self._start(folder, study.layout.num_workers, more)
            progress.ended(stage, died=not done)

    def _start(self, folder: RunFolder, world: int, more: dict[str, Any]) -> bool:
        """Start all ranks once and wait for them. Return whether all of them ended well."""
        path = Path(self.job["path"])
        job = {
            "world": world,
            "store": str(path / f"store-{uuid.uuid4().hex}"),
            "run_dir": str(folder.path),
            "log": str(path / "ranks"),
            "pids": str(path),
            "first_step": str(path / "first-step"),
            "met": str(path / "met"),
            "faults": self.faults,
            "breaks": self.job.get("breaks"),
            **more,
        }
        self.faults = [fault for fault in self.faults if fault.get("stays")]
        self.connection.send([job | {"rank": rank} for rank in range(world)])
        return not any(self.connection.recv())


def _serve(connection: Connection, path: Path) -> None:
    """Fork ranks as often as asked, until the command has ended."""
    (path / f"pid-{os.getpid()}").touch()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            connection.send(_run_ranks(connection.recv()))
    os._exit(0)


def _run_ranks(jobs: list[dict[str, Any]]) -> list[int]:
    """Fork a rank for each job, wait for all, and return their statuses."""
    running = []
    for job in jobs:
        pid = os.fork()
        if pid == 0:
            rank.work(job)
        running.append(pid)
    statuses = []
    failed_at = math.inf
    while running:
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                statuses.append(os.waitstatus_to_exitcode(status))
        if any(statuses):
            failed_at = min(failed_at, time.monotonic())
        if time.monotonic() > failed_at + PATIENCE_S:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return statuses
