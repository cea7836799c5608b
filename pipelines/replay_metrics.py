#!/usr/bin/env python3
"""Send to MLflow what a run or a sweep had to leave behind when its server was away. Doing it twice changes nothing.

pipelines/replay_metrics.py quickstart
pipelines/replay_metrics.py sweep-schedules        # the sweep and all its trials
pipelines/replay_metrics.py runs/quickstart --deadline 600
"""

import os
from pathlib import Path

from orchestrator.errors import EXIT_DONE, EXIT_FAILED, UserError
from orchestrator.redact import redact_text
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.track.mlflow import resend_metrics
from orchestrator.track.server import absolute_uri, resolve_uri
from orchestrator.track.sweep import resend_sweep_metrics
from pipelines.common import Options, at_least, guarded


def main(argv: list[str]) -> int:
    parser = Options(__doc__)
    parser.add_argument(
        "run",
        metavar="RUN",
        help="folder of a run or a sweep, or its name in $ESPALIER_STORAGE (else runs)",
    )
    parser.add_argument("--uri", help="MLflow to send to (default: where the experiment says)")
    parser.add_argument(
        "--deadline",
        metavar="S",
        type=at_least(1.0),
        default=300.0,
        help="seconds to try for (300)",
    )
    args = parser.parse_args(argv)
    run_dir = find_run(args.run)
    trials = sorted(run_dir.glob("trials/*/experiment.yaml"))  # a sweep's trials are tracked alike
    experiment = RunFolder(trials[0].parent if trials else run_dir).read_experiment()
    uri = absolute_uri(args.uri, "--uri") if args.uri else resolve_uri(experiment, run_dir.parent)
    if SweepFolder(run_dir).sweep_file.exists():
        is_sent = resend_sweep_metrics(
            SweepFolder(run_dir), uri, experiment.tracking.experiment, args.deadline
        )
    else:
        is_sent = resend_metrics(
            RunFolder(run_dir), uri, experiment.tracking.experiment, args.deadline
        )
    if not is_sent:
        print(f"{redact_text(uri)} did not take everything; nothing is lost, run this again")
        return EXIT_FAILED
    print(f"{redact_text(uri)} has everything of {run_dir}")
    if not (run_dir / "summary.json").exists():
        print("it has not ended (it holds no summary.json): its status was left as it is")
    return EXIT_DONE


def find_run(word: str) -> Path:
    """The absolute folder of a run or a sweep given by path or by name."""
    places = [
        Path(word).expanduser(),
        Path(os.environ.get("ESPALIER_STORAGE") or "runs").expanduser() / word,
    ]
    for place in (p.absolute() for p in places):
        if (place / "run.json").is_file():
            if place.parent.name == "trials" and (place.parents[1] / "sweep.yaml").exists():
                raise UserError(
                    f"'{word}': a trial is sent with its sweep; give {place.parents[1]}"
                )
            return place
    raise UserError(
        f"'{word}': no run there (looked for run.json in {' and '.join(map(str, places))})"
    )


if __name__ == "__main__":
    guarded(main)
