"""All kinds of faults around a command."""

import errno
import signal
from collections.abc import Callable
from pathlib import Path

from orchestrator.runs.folder import SweepFolder
from tests.faults.causes import (
    Cause,
    Early,
    Facts,
    InRank,
    Moved,
    OtherCorpus,
    OtherTokens,
    Power,
    Signal,
    Store,
    Touched,
    latest_checkpoint,
)
from tests.faults.damage import (
    ANY,
    AllCheckpoints,
    Damage,
    Removal,
    cut,
    doubled,
    emptied,
    with_garbage,
    with_other_numbers,
    zeroed,
)

ALWAYS = 10**9


def _one(name: str) -> Callable[[SweepFolder], list[Path]]:
    return lambda folder: [folder.path / name]


def _in_stages(name: str) -> Callable[[SweepFolder], list[Path]]:
    return lambda folder: [stage.path / name for stage in folder.stages()]


def _in_trials(name: str) -> Callable[[SweepFolder], list[Path]]:
    return lambda folder: [trial.path / name for trial in folder.trials()]


RUN = ("train",)
SWEEP = ("sweep",)
TRANSIENT = (errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT)

CAUSES: dict[str, Cause] = {
    # processes
    "driver-kill": Signal("SIGKILL of the driver", statuses=(-9,), ends=True, number=9),
    "power": Power(
        "power failure: only what was forced to disk stays", statuses=(-9,), ends=True, number=9
    ),
    "driver-early": Early("SIGKILL of the driver before it trains", statuses=(-9,), ends=True),
    "driver-term": Signal("SIGTERM to the driver", ends=True),
    "driver-term-early": Early("SIGTERM before it trains", statuses=(-15,), ends=True, number=15),
    "driver-hup": Signal("SIGHUP to the driver (closed terminal)", ends=True, number=signal.SIGHUP),
    "driver-quit": Signal("SIGQUIT to the driver", ends=True, number=signal.SIGQUIT),
    "driver-int": Signal("Ctrl-C", statuses=(130,), ends=True, number=signal.SIGINT),
    "rank-step": InRank("SIGKILL of a worker in a step, under the driver", kind="step"),
    "rank-commit": InRank("SIGKILL in a commit, under the driver", kind="commit"),
    "rank-journal": InRank("SIGKILL at a journal line, under the driver", kind="journal"),
    "rank-restore": InRank("SIGKILL in a restore, under the driver", kind="restore"),
    # streams and environment
    "stdout-closed": Facts("stdout has no reader", facts={"closed": "out"}),
    "stderr-closed": Facts("stderr has no reader", facts={"closed": "err"}),
    "no-home": Facts("HOME does not exist", facts={"environment": {"HOME": "/does/not/exist"}}),
    "empty-cache": Facts("empty XDG_CACHE_HOME", facts={"environment": {"XDG_CACHE_HOME": ""}}),
    "pwd": Facts("a secret named PWD is no secret", facts={"environment": {"PWD": "/"}}),
    # files of a run
    "run.json": Damage("run.json damaged", RUN, (2,), files=_one("run.json")),
    "experiment.yaml": Damage("experiment.yaml damaged", RUN, files=_one("experiment.yaml")),
    "summary.json": Damage("summary.json damaged", RUN, files=_one("summary.json")),
    "stopped.json": Damage("stopped.json damaged", RUN, files=_one("stopped.json")),
    "tracking.json": Damage(
        "tracking.json damaged", RUN, tracked=True, files=_one("tracking.json")
    ),
    "attempts.jsonl": Damage(
        "attempts.jsonl damaged", RUN, files=_one("attempts.jsonl"), changes=(*ANY, with_garbage)
    ),
    "events.jsonl": Damage(
        "events.jsonl damaged", RUN, files=_one("events.jsonl"), changes=(*ANY, with_garbage)
    ),
    "stop.json": Damage("stop.json damaged", RUN, files=_one("stop.json")),
    "journal-garbage": Damage(
        "a garbage line in the journal", RUN, files=_one("metrics.jsonl"), changes=(with_garbage,)
    ),
    "journal-cut": Damage(
        "the journal cut", RUN, files=_one("metrics.jsonl"), changes=(cut, emptied, zeroed)
    ),
    "journal-doubled": Damage(
        "the journal doubled", RUN, files=_one("metrics.jsonl"), changes=(doubled,)
    ),
    "journal-edited": Damage(
        "a digit of the journal changed",
        RUN,
        files=_one("metrics.jsonl"),
        changes=(with_other_numbers,),
    ),
    "journal-removed": Removal("the journal removed", RUN, files=_one("metrics.jsonl")),
    "aside": Damage("an aside damaged", RUN, files=lambda folder: folder.aside_files()),
    "samples-removed": Removal("samples removed", RUN, files=_one("samples")),
    "run.json-removed": Removal("run.json removed", RUN, files=_one("run.json")),
    # checkpoints
    # A run whose only checkpoint is damaged is refused: it would begin anew.
    "checkpoint": Damage("the latest checkpoint damaged", statuses=(2,), files=latest_checkpoint),
    "checkpoints-all": AllCheckpoints("all checkpoints damaged", RUN, (2,)),
    "checkpoints-removed": Removal("all checkpoints removed", RUN, (2,), files=_one("checkpoints")),
    "read-transient": InRank(
        "a checkpoint cannot be read for a moment",
        kind="unreadable",
        codes=TRANSIENT,
        nth=(1, 3),
        everywhere=True,
    ),
    "read-eio": InRank(
        "EIO at the first read of a checkpoint",
        kind="unreadable",
        codes=(errno.EIO,),
        everywhere=True,
    ),
    "read-never": InRank(
        "no checkpoint can be read",
        statuses=(2,),
        ends=True,
        kind="unreadable",
        codes=(errno.EIO, *TRANSIENT),
        nth=(ALWAYS, ALWAYS),
        stays=True,
        everywhere=True,
    ),
    # the file system
    "read-only": InRank(
        "the file system becomes read-only",
        statuses=(1, 2),
        ends=True,
        kind="unwritable",
        codes=(errno.EROFS, errno.EIO),
        nth=(1, 8),
        stays=True,
    ),
    "disk-full": InRank("no room for a checkpoint", statuses=(2,), kind="full"),
    "no-locks": InRank(
        "a file system without locks",
        statuses=(2,),
        kind="no locks",
        codes=(errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP),
        everywhere=True,
    ),
    "moved": Moved("the folder of a running run is moved", RUN, (1, 2), ends=True),
    "removed": Moved("the folder of a running run is removed", RUN, (1, 2), True, removed=True),
    # data and arithmetic
    "shard": OtherTokens("a shard changed between two commands", statuses=(2,)),
    "shard-in-run": OtherTokens("a shard changed while a run reads it", RUN, (1, 2), in_run=True),
    "corpus": OtherCorpus("the corpus has another text of the same size", statuses=(2,)),
    "corpus-old": OtherCorpus("the same with an older time", statuses=(2,), old=True),
    "touched": Touched("all files of the data have another time"),
    "other-bits": InRank(
        "this machine computes other bits",
        statuses=(2,),
        kind="other bits",
        stays=True,
        everywhere=True,
    ),
    # files of a sweep
    "sweep-run.json": Damage("run.json of a sweep damaged", SWEEP, (2,), files=_one("run.json")),
    "sweep-summary": Damage("summary.json of a sweep damaged", SWEEP, files=_one("summary.json")),
    "sweep-plan": Removal(
        "plan.txt, sweep.yaml or figures removed",
        SWEEP,
        files=lambda f: [f.plan_file, f.sweep_file, f.figures],
    ),
    "stage.json": Damage("stage.json damaged", SWEEP, (2,), files=_in_stages("stage.json")),
    "result.json": Damage("result.json damaged", SWEEP, files=_in_stages("result.json")),
    "stage-stopped": Damage(
        "stopped.json of a stage damaged", SWEEP, files=_in_stages("stopped.json")
    ),
    "stage-journal": Damage(
        "the journal of a stage damaged",
        SWEEP,
        files=_in_stages("metrics.jsonl"),
        changes=(*ANY, with_garbage, with_other_numbers),
    ),
    "trial-files": Damage(
        "a file of a trial damaged",
        SWEEP,
        files=lambda folder: [
            file for trial in folder.trials() for file in trial.path.iterdir() if file.is_file()
        ],
        changes=(*ANY, with_garbage),
    ),
    "stage-removed": Removal(
        "the folder of a stage removed", SWEEP, files=lambda f: [s.path for s in f.stages()]
    ),
    # tracking
    "store-lost": Store("the tracking store was lost", RUN, tracked=True, change="lost"),
    "store-restored": Store(
        "the tracking store was restored from a backup", RUN, tracked=True, change="restored"
    ),
    "store-deleted": Store("the run was deleted in MLflow", RUN, tracked=True, change="deleted"),
}
