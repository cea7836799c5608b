#!/usr/bin/env python3
"""Send the metrics to MLflow that it does not have of a run or a sweep.

Every value is compared with those of MLflow, whose database may have been lost or restored. Sending
twice changes nothing.

  pipelines/replay_metrics.py quickstart
  pipelines/replay_metrics.py sweep-schedules        # the sweep and all its trials
  pipelines/replay_metrics.py runs/quickstart --deadline 600
"""

from pipelines import starting

starting.end_on_ctrl_c(__name__)

from orchestrator.errors import EXIT_DONE, EXIT_FAILED, UserError
from orchestrator.mirror import remote
from orchestrator.redact import redact_text
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.runs.storage import find_run
from orchestrator.track.server import absolute_uri, resolve_uri
from orchestrator.track.tracker import resend_metrics
from pipelines.common import run_command
from pipelines.options import Options


def options() -> Options:
    """Return the parser of the command's arguments."""
    parser = Options(__doc__)
    parser.add_argument(
        "run",
        metavar="RUN",
        help="folder of a run or a sweep, also s3://… in a mirror, or its name in "
        "$ESPALIER_STORAGE (default: runs)",
    )
    parser.add_argument("--uri", help="MLflow tracking URI (default: that of the experiment)")
    parser.add_number("--deadline", "S", 1.0, 300.0, "give up after this many seconds")
    return parser


def main(argv: list[str]) -> int:
    """Send the metrics, and print whether MLflow accepted all of them."""
    args = options().parse_args(argv)
    folder = find_run(remote.here(args.run, "RUN", checkpoints="none"), is_tracked)
    experiment = _experiment_folder(folder).read_experiment()
    if args.uri:
        uri = absolute_uri(args.uri, "--uri")
    else:
        uri = resolve_uri(experiment, remote.storage_of(folder))
    sweep = SweepFolder(folder)
    if sweep.sweep_file.exists():
        folder = sweep
    name = experiment.tracking.experiment
    if not resend_metrics(folder, uri, name, args.deadline, compare_all=True):
        return EXIT_FAILED
    print(f"{redact_text(uri)} has everything of {folder.path}")
    if not folder.summary_file.exists():
        print("the run has not ended (there is no summary.json); its status was not changed")
    return EXIT_DONE


def _experiment_folder(folder: RunFolder) -> RunFolder:
    """Return the folder that has an experiment.yaml: for a sweep, that of its first trial."""
    for trial in SweepFolder(folder.path).trials():
        if trial.experiment_file.exists():
            return trial
    return folder


def is_tracked(folder: RunFolder) -> bool:
    """Return whether this is the folder of a run or a sweep that is tracked.

    Raises:
        UserError: It is one trial of a sweep.
    """
    sweep = folder.sweep()
    if sweep is not None and sweep.sweep_file.exists():
        raise UserError(f"{folder.path}: a trial is sent with its sweep; give {sweep.path}")
    return folder.run_file.is_file()


if __name__ == "__main__":
    run_command(main)
