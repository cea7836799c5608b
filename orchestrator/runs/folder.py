"""The folder of a run: file names, and how each file is read and written.

A lone run, a stage or a trial of a sweep, and the scratch folder of a replay have the same names.
No other module writes one of these names. Inside a checkpoint, `checkpoint/format.py` and
`train/state.py` name the files.
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from orchestrator import files
from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.config.yaml_text import read_yaml
from orchestrator.errors import NOT_WRITABLE, UserError
from orchestrator.folders import subfolders
from orchestrator.own_files import load_copies
from orchestrator.runs.ending import Ending, write_with_reserve

RESERVE_BYTES = 128 * 1024  # enough for stopped.json with the tracebacks of all ranks


class RunFacts(TypedDict, total=False):
    """Facts about a run for MLflow."""

    params: dict[str, Any]
    tags: dict[str, str]
    dataset: dict[str, Any]


class RunRecord(RunFacts, total=False):
    """Content of run.json."""

    name: str
    key: str  # identifies the run in MLflow, also after a restart
    attempts: list[dict[str, Any]]  # layout, first step and free fields of each start


class RunFolder:
    """Folder of a run, a stage, a trial or a replay. Creating the object touches no file.

    Args:
        path: The folder, which need not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

        # What is trained.
        self.experiment_file = self.path / "experiment.yaml"  # the resolved configuration
        self.run_file = self.path / "run.json"  # RunRecord
        self.stage_file = self.path / "stage.json"  # steps, parent and learning rates of a stage
        self.code = self.path / "code"  # files of the user's model and optimizer

        # What training wrote.
        self.journal_file = self.path / "metrics.jsonl"  # one line per logged step
        self.checkpoints = self.path / "checkpoints"  # step-00000100/ and so on
        self.samples = self.path / "samples"  # generated text of each evaluation
        self.trace_file = self.path / "profile" / "trace.json.gz"  # of `train.py --profile`
        self.events_file = self.path / "events.jsonl"  # restarts, hangs, skipped updates
        self.checkpointed_file = self.path / ".checkpointed"  # a checkpoint was written
        self.attempts_file = self.path / "attempts.jsonl"  # one line per start of the workers

        # How it ended.
        self.ending_file = self.path / "stopped.json"  # Ending before the last step
        self.result_file = self.path / "result.json"  # Ending of a stage
        self.summary_file = self.path / "summary.json"  # Ending of a run, final losses, cost
        self.hangs = self.path / "hangs"  # thread stacks of ranks that hung
        self.replays = self.path / "replays"

        # State of processes.
        self.stop_request_file = self.path / "stop.json"
        self.tracking_file = self.path / "tracking.json"  # what MLflow has accepted
        self.driver_lock = self.path / ".lock"
        self.mirror_lock = self.path / ".mirror.lock"
        self.mirror_file = self.path / ".mirror.json"  # what is known of the copy in a bucket
        self.writer_lock = self.path / ".writer"  # rank 0, which may outlive its driver
        self.sender_lock = self.path / ".tracking"
        self.rank_marks = self.path / ".ranks"  # current phase of each rank
        self.ray_scratch = self.path / ".ray"
        self.reserve_file = self.path / ".reserve"  # disk space for `write_ending`

    @property
    def name(self) -> str:
        """Name of the run, stage or trial."""
        return self.path.name

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def failure_file(self, rank: int) -> Path:
        """Traceback of the exception that ended a rank."""
        return self.path / f"failure-rank{rank}.txt"

    def hang_file(self, rank: int) -> Path:
        """Thread stacks of a rank that hung; empty while it runs."""
        return self.path / f"hang-rank{rank}.txt"

    def hang_files(self) -> list[Path]:
        """Thread stacks of all ranks, in the order of their names."""
        return sorted(self.path.glob("hang-rank*.txt"))

    def new_hang_folder(self) -> Path:
        """Folder for the thread stacks of the next hang, which does not exist yet."""
        numbers = [int(old.name) for old in self.hangs.glob("[0-9]*") if old.name.isdecimal()]
        return self.hangs / f"{max(numbers, default=0) + 1:04d}"

    def mark_file(self, rank: int) -> Path:
        """Current phase of a rank."""
        return self.rank_marks / f"rank-{rank}"

    def mark_files(self) -> list[Path]:
        """Current phases of all ranks, unsorted."""
        return list(self.rank_marks.glob("rank-*"))

    def sample_file(self, step: int) -> Path:
        """Text that was generated after `step` updates."""
        return self.samples / f"step-{step:08d}.txt"

    def sample_files(self) -> list[Path]:
        """Generated texts, oldest first."""
        return sorted(self.samples.glob("step-*.txt"))

    def code_files(self) -> list[Path]:
        """Copies of the user's files, in the order of their names."""
        return sorted(self.code.glob("*.py"))

    def replay_file(self, name: str) -> Path:
        """Report of a replay; its scratch folder is beside it and has this name without `.json`."""
        return self.replays / f"{name}.json"

    def replay_files(self) -> list[Path]:
        """Reports of replays, oldest first."""
        return sorted(self.replays.glob("*.json"))

    def aside_file(self, number: int, first_step: int) -> Path:
        """Journal lines that a resume moved away; `first_step` is the first one trained again."""
        return self.path / f"metrics.aside-{number:04d}-from-{first_step}.jsonl"

    def aside_files(self) -> list[Path]:
        """All aside files, unsorted; see `journal.asides`."""
        return list(self.path.glob("metrics.aside-*.jsonl"))

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` updates."""
        return checkpoint_format.path_of(self.checkpoints, step)

    def checkpoint_steps(self) -> list[int]:
        """Steps of all checkpoints, rising. Nothing is verified."""
        return checkpoint_format.steps(self.checkpoints)

    # ---- start of an attempt ----

    def begin_attempt(self, experiment: Experiment, record: RunRecord) -> None:
        """Store experiment.yaml and run.json of an attempt. Remove the ending of the last one."""
        # In the other order, a kill could leave a new experiment with the MLflow key of the old.
        files.write_json(self.run_file, record)
        files.write_atomically(self.experiment_file, experiment.to_yaml())
        self.reserve()
        self.clear_ending()

    def reserve(self) -> None:
        """Take the disk space with which `write_ending` can write also on a full disk."""
        files.write_atomically(self.reserve_file, b" " * RESERVE_BYTES)

    def clear_ending(self) -> None:
        """Remove the records of how the last attempt ended, except the result of a stage."""
        self.summary_file.unlink(missing_ok=True)
        self.ending_file.unlink(missing_ok=True)
        for file in self.path.glob("failure-rank*.txt"):
            file.unlink(missing_ok=True)

    def history(self) -> list[Path]:
        """Return what a run wrote. The file that tells that it had checkpoints comes last."""
        lines = [self.run_file, self.journal_file, self.attempts_file, self.events_file]
        folders = [self.samples, self.hangs, self.trace_file.parent, self.checkpoints]
        return [*lines, *self.aside_files(), *folders, self.checkpointed_file]

    def new_history_folder(self) -> Path:
        """Folder for what an earlier run wrote here, which does not exist yet."""
        return self.path / f"before-{len(list(self.path.glob('before-*'))) + 1:04d}"

    def read_record(self) -> RunRecord | None:
        """Read run.json; None before the first attempt, or if it is damaged."""
        return cast(RunRecord | None, files.read_derived(self.run_file, files.having("key")))

    def read_summary(self) -> dict[str, Any] | None:
        """Read summary.json; None if the run has not ended, or if it is damaged."""
        return files.read_derived(self.summary_file, files.having("status"))

    def read_experiment(self) -> Experiment:
        """Read experiment.yaml.

        Raises:
            UserError: The file is missing or is not an experiment.
        """
        file = self.experiment_file
        if not file.exists():
            raise UserError(f"{self.path}: has no experiment.yaml; give a run or a checkpoint")
        try:
            text = checkpoint_format.reading(file, lambda: files.read_text(file))
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8; restore it") from None
        tree = read_yaml(text, str(file))
        load_copies(tree, self.path)
        tracking = tree.get("tracking") if isinstance(tree, dict) else None  # of a cut file: None
        if not text.endswith("\n") or "experiment" not in (tracking or {}):
            raise files.DamagedError(f"{file}: empty or cut; the next start writes it again")
        return parse_experiment(tree, str(file))

    # ---- end of an attempt ----

    def read_ending(self) -> Ending | None:
        """Read how the run or stage ended; None if it is still training or was killed."""
        for file in (self.result_file, self.ending_file):
            if ending := files.read_derived(file, Ending.from_json):
                return ending
        return None

    def write_ending(self, ending: Ending) -> None:
        """Write stopped.json. After that, the workers are not started again."""
        text = json.dumps(ending.to_json(), indent=1)
        write_with_reserve(self.ending_file, text, self.reserve_file)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json. If the disk is full or read-only, print that: the driver goes on."""
        try:
            files.write_json(self.summary_file, summary)
        except OSError as error:
            if error.errno not in NOT_WRITABLE:
                raise
            print(f"{self.summary_file}: not written: {error.strerror}", file=sys.stderr)

    def read_failures(self) -> list[str]:
        """Tracebacks of all ranks, oldest first: the first failure often causes the others."""
        found = self.path.glob("failure-rank*.txt")
        oldest_first = sorted(found, key=lambda file: file.stat().st_mtime_ns)
        return [files.read_text(file, "replace") for file in oldest_first]

    # ---- folder of a trial ----

    def sweep(self) -> "SweepFolder | None":
        """Folder of the sweep if this is the folder of a trial."""
        if self.path.parent.name != "trials":
            return None
        return SweepFolder(self.path.parents[1])

    def link_to_stage(self, stage: "RunFolder") -> None:
        """Make `checkpoints` and `samples` relative symlinks to those of the trial's last stage."""
        for name in ("checkpoints", "samples"):
            files.replace_symlink(
                self.path / name, Path(os.path.relpath(stage.path / name, self.path))
            )


class SweepFolder(RunFolder):
    """Folder of a sweep: its own files, its stages and its trials."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.sweep_file = self.path / "sweep.yaml"  # the resolved configuration
        self.plan_file = self.path / "plan.txt"  # the tree of stages as text
        self.comparison_file = self.path / "comparison.csv"  # one row per trial
        self.figures = self.path / "figures"
        self.optuna_file = self.path / "samples.jsonl"  # values that optuna proposed
        self.tune_scratch = self.path / ".tune"

    def stage(self, stage_id: str) -> RunFolder:
        """Folder of a stage: steps that one or more trials share."""
        return RunFolder(self.path / "stages" / stage_id)

    def stages(self) -> list[RunFolder]:
        """Folders of all stages on disk."""
        return [RunFolder(path) for path in subfolders(self.path / "stages")]

    def trial(self, name: str) -> RunFolder:
        """Folder of a trial; it has the file names of a lone run."""
        return RunFolder(self.path / "trials" / name)

    def trials(self) -> list[RunFolder]:
        """Folders of all trials on disk, in the order of their names."""
        return [RunFolder(path) for path in subfolders(self.path / "trials")]

    def figure_file(self, name: str) -> Path:
        """A figure, such as "tree"."""
        return self.figures / f"{name}.png"

    def figure_files(self) -> list[Path]:
        """All figures, in the order of their names."""
        return sorted(self.figures.glob("*.png"))
