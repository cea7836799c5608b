#!/usr/bin/env python3
"""Repeat some steps of a run and compare every logged loss, the weights and the moments bit by bit.

The replay starts at the last checkpoint at or before the first step. It trains in its own folder,
in one process with the threads and the kind of device of the run, and does not change the run. The
report is stored in RUN/replays/ and in MLflow. The folder of the replay is removed if everything is
equal; otherwise it stays beside the report.

  pipelines/replay.py quickstart                      # from the last checkpoint but one to the end
  pipelines/replay.py quickstart --steps 500:600
  pipelines/replay.py runs/quickstart --steps :       # the whole run

Exit status: 0 everything is equal, 1 something differs, 2 there is nothing to compare, 75 the run
has not ended.
"""

from pipelines import starting

starting.end_on_ctrl_c(__name__)

from argparse import Namespace

from pipelines.common import parse_first, run_command
from pipelines.options import Options


def options() -> Options:
    """Return the parser of the command's arguments."""
    parser = Options(__doc__)
    parser.add_argument(
        "run",
        metavar="RUN",
        help="folder of a run, also s3://… in a mirror, or its name in $ESPALIER_STORAGE (default: "
        "runs)",
    )
    parser.add_argument(
        "--steps",
        metavar="A:B",
        help="repeat steps A to B; A: or :B or : leaves a side open (default: from the last "
        "checkpoint but one to the end)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the folder of the replay also if everything is equal",
    )
    parser.add_number("--deadline", "S", 1.0, 60.0, "wait at most this many seconds for MLflow")
    return parser


def check(args: Namespace) -> None:
    """Raise UserError if the argument `run` is not a run with a checkpoint."""
    from orchestrator.train import find

    find.require(args.run, find.has_checkpoint, "RUN")


parse_first(__name__, options().parse_args, check)

import re
import shutil

from orchestrator.config.experiment import Experiment
from orchestrator.data.dataset import Manifest
from orchestrator.errors import EXIT_DONE, EXIT_FAILED, UserError
from orchestrator.mirror import remote
from orchestrator.replay.recorded import RecordedRun
from orchestrator.replay.replay import Replay
from orchestrator.replay.report import ReplayResult, new_scratch, store_report
from orchestrator.runs import lock
from orchestrator.runs.console import format_line
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Line
from orchestrator.runs.storage import find_run
from orchestrator.text import table
from orchestrator.track.server import resolve_uri
from orchestrator.track.tracker import resend_metrics
from orchestrator.train.find import has_checkpoint
from orchestrator.train.trained import find_tokens


def main(argv: list[str]) -> int:
    """Replay, store and print the report, and send it to MLflow."""
    args = options().parse_args(argv)
    run_copy = remote.here(args.run, "RUN", checkpoints="all", data=True)
    folder = find_run(run_copy, has_checkpoint)
    steps = parse_steps(args.steps)
    lock.refuse_if_held(folder)  # a run in progress removes checkpoints
    run = RecordedRun(folder)
    replay = Replay(run, run.stretch(steps))
    dataset = find_dataset(replay)
    scratch = new_scratch(folder)
    report = repeat(replay, dataset, scratch)
    file = store_report(report, folder, scratch)
    if report.equal and not args.keep:
        shutil.rmtree(scratch)
    rows = report.rows() | {
        "report": file,
        "repeated in": scratch.path if scratch.path.exists() else None,
    }
    print(f"\n{folder.name}\n{table(rows)}\n{report.sentence()}", flush=True)
    if run_copy == args.run:
        send(folder, replay.experiment, args.deadline)
    else:
        print("the report of a run in a mirror is not sent to MLflow; it stays in the copy here")
    return EXIT_DONE if report.equal else EXIT_FAILED


def find_dataset(replay: Replay) -> Manifest:
    """Find the tokens of the run, and print what will be repeated."""
    folder = replay.run.folder
    stretch = replay.stretch
    dataset = find_tokens(replay.experiment, replay.data_identity, folder.path)
    print(
        f"replaying steps {stretch.first:,}..{stretch.last:,} of {folder.path} from "
        f"{stretch.origin} on {replay.device}, tokens of {dataset.directory}",
        flush=True,
    )
    return dataset


def repeat(replay: Replay, dataset: Manifest, scratch: RunFolder) -> ReplayResult:
    """Train the steps again and compare them. Remove `scratch` after an error."""
    last = replay.stretch.last

    def print_line(line: Line) -> None:
        print(format_line(line, last, replay.experiment.tokens), flush=True)

    try:
        return replay.compare(dataset, scratch, print_line)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def send(folder: RunFolder, experiment: Experiment, deadline_s: float) -> None:
    """Send the report to the MLflow server of the run."""
    if not folder.run_file.is_file():
        print("this run is not tracked (it has no run.json); the report stays in its folder")
        return
    sweep = folder.sweep()
    if sweep is not None and sweep.sweep_file.exists():
        print(f"pipelines/replay_metrics.py {sweep.path} sends the report to MLflow")
        return
    uri = resolve_uri(experiment, folder.path.parent)
    resend_metrics(folder, uri, experiment.tracking.experiment, deadline_s)


def parse_steps(text: str | None) -> tuple[int | None, int | None] | None:
    """Parse `A:B`, `A:`, `:B` or `:`."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d*):(\d*)", text)
    if match is None:
        raise UserError(f"--steps: '{text}' is not A:B with two step numbers, such as 500:600")
    first, last = match.groups()
    return int(first) if first else None, int(last) if last else None


if __name__ == "__main__":
    run_command(main)
