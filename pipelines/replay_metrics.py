#!/usr/bin/env python3
"""Send to MLflow what a run had to leave behind when its server was away. Doing it twice changes nothing.

  pipelines/replay_metrics.py quickstart
  pipelines/replay_metrics.py runs/quickstart --deadline 600
"""

import os
from pathlib import Path

from orchestrator.errors import EXIT_DONE, EXIT_FAILED, UserError
from orchestrator.provenance import redact_text
from orchestrator.runs import stored_experiment
from orchestrator.stores import absolute_uri, resolve_uri
from orchestrator.tracking import replay
from pipelines.common import Options, at_least, guarded


def main(argv: list[str]) -> int:
    parser = Options(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or its name in $ESPALIER_STORAGE (else runs)")
    parser.add_argument("--uri", help="MLflow to send to (default: where the experiment says)")
    parser.add_argument("--deadline", metavar="S", type=at_least(1.0), default=300.0, help="seconds to try for (300)")
    args = parser.parse_args(argv)
    run_dir = find_run(args.run)
    experiment = stored_experiment(run_dir)
    uri = absolute_uri(args.uri, "--uri") if args.uri else resolve_uri(experiment, run_dir.parent)
    if not replay(run_dir, uri, experiment.tracking.experiment, args.deadline):
        print(f"{redact_text(uri)} did not take everything; nothing is lost, run this again")
        return EXIT_FAILED
    print(f"{redact_text(uri)} has everything of {run_dir}")
    if not (run_dir / "summary.json").exists():
        print("the run has not ended (it holds no summary.json): its status was left as it is")
    return EXIT_DONE


def find_run(word: str) -> Path:
    """The absolute folder of a run given by path or by name."""
    places = [Path(word).expanduser(), Path(os.environ.get("ESPALIER_STORAGE") or "runs").expanduser() / word]
    for place in places:
        if (place / "run.json").is_file():
            return place.absolute()
    raise UserError(f"'{word}': no run there (looked for run.json in {' and '.join(map(str, places))})")


if __name__ == "__main__":
    guarded(main)
