#!/usr/bin/env python3
"""Make a stretch of a run again and compare every logged loss, the weights and the moments, bit for bit.

It begins at the nearest checkpoint at or before the first step, trains in a folder of its own, in one process with the
run's threads and kind of device, and changes nothing of the run. The verdict is kept in RUN/replays/ and in MLflow. What
was made again is removed where it is equal, and stays beside the verdict where it is not.

  pipelines/replay.py quickstart                      # from the last checkpoint but one to the end
  pipelines/replay.py quickstart --steps 500:600
  pipelines/replay.py runs/quickstart --steps :       # the whole run

Ends with status 0 where all is equal, 1 where something differs, 2 where there is nothing to compare, 75 where
the run is going on.
"""

import os
import re
import shutil
from pathlib import Path

from orchestrator.config.experiment import Experiment
from orchestrator.errors import EXIT_DONE, EXIT_FAILED, UserError
from orchestrator.redact import redact_text
from orchestrator.replay import replay
from orchestrator.replay.replay import Recorded, Stretch
from orchestrator.replay.verdict import Verdict
from orchestrator.runs import lock
from orchestrator.runs.console import format_line
from orchestrator.runs.folder import RunFolder
from orchestrator.text import table
from orchestrator.track import mlflow as tracking
from orchestrator.track.server import resolve_uri
from orchestrator.train.trained import find_tokens
from pipelines.common import Options, at_least, guarded


def main(argv: list[str]) -> int:
    parser = Options(__doc__)
    parser.add_argument(
        "run", metavar="RUN", help="a run's folder, or its name in $ESPALIER_STORAGE (else runs)"
    )
    parser.add_argument(
        "--steps",
        metavar="A:B",
        help=("steps A to B, either may be left out (from the last checkpoint but one to the end)"),
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep what was made again also where it is equal"
    )
    parser.add_argument(
        "--deadline",
        metavar="S",
        type=at_least(1.0),
        default=60.0,
        help=("seconds for MLflow to take the verdict (60)"),
    )
    args = parser.parse_args(argv)
    run_dir, steps = find_run(args.run), parse_steps(args.steps)
    lock.check(RunFolder(run_dir))  # who writes there removes checkpoints
    run = Recorded.read(run_dir)
    s = replay.stretch(run, steps)
    experiment = replay.experiment_of(run, s)
    result, folder = make(run, s, experiment)
    path = replay.keep(run_dir, folder, result)
    if result.equal and not args.keep:
        shutil.rmtree(folder)
    rows = result.rows() | {
        "verdict in": path,
        "made again in": folder if folder.exists() else None,
    }
    print(f"\n{run_dir.name}\n{table(rows)}\n{result.sentence()}", flush=True)
    send(run_dir, experiment, args.deadline)
    return EXIT_DONE if result.equal else EXIT_FAILED


def make(run: Recorded, s: Stretch, experiment: Experiment) -> tuple[Verdict, Path]:
    """The stretch made again, and the folder in which it was: gone where it did not come to an end."""
    begin = "step 0" if s.begin is None else f"the checkpoint of step {s.begin:,}"
    wanted = replay.data_wanted(run, s)
    storage = run.run_dir.parents[2 if run.run_dir.parent.name == "trials" else 0]
    dataset = find_tokens(experiment, wanted, storage)
    device = replay.device_of(run, s)
    print(
        f"replaying steps {s.first:,}..{s.last:,} of {run.run_dir} from {begin} on {device}, "
        f"tokens of {dataset.directory}",
        flush=True,
    )
    folder = replay.new_folder(run.run_dir)
    try:
        result = replay.replay(
            run,
            s,
            dataset,
            folder,
            lambda line: print(format_line(line, s.last, experiment.tokens_per_step), flush=True),
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return result, folder


def send(run_dir: Path, experiment: Experiment, deadline_s: float) -> None:
    """Bring the verdict to where the run is tracked."""
    if not (run_dir / "run.json").is_file():
        print("this run is not tracked (it holds no run.json): the verdict stays in its folder")
        return
    if (run_dir.parents[1] / "sweep.yaml").exists():
        print(
            f"pipelines/replay_metrics.py {run_dir.parents[1]} sends the verdict to MLflow, with the sweep"
        )
        return
    uri = resolve_uri(experiment, run_dir.parent)
    if not tracking.resend_metrics(
        RunFolder(run_dir), uri, experiment.tracking.experiment, deadline_s
    ):
        print(
            f"{redact_text(uri)} did not take the verdict; pipelines/replay_metrics.py {run_dir} sends it later"
        )


def find_run(word: str) -> Path:
    """The absolute folder of a run given by path or by name."""
    places = [
        Path(word).expanduser(),
        Path(os.environ.get("ESPALIER_STORAGE") or "runs").expanduser() / word,
    ]
    for place in (p.absolute() for p in places):
        if (place / "sweep.yaml").exists():
            raise UserError(f"'{word}': is a sweep; give one of its trials, {place}/trials/…")
        if (place / "metrics.jsonl").is_file() or (place / "checkpoints").is_dir():
            return place
    raise UserError(
        f"'{word}': no run there (looked for metrics.jsonl in {' and '.join(map(str, places))})"
    )


def parse_steps(text: str | None) -> tuple[int | None, int | None] | None:
    """`A:B`, `A:`, `:B` or `:` as numbers."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d*):(\d*)", text)
    if not found:
        raise UserError(f"--steps: '{text}' is not A:B with two step numbers, like 500:600")
    first, last = (int(word) if word else None for word in found.groups())
    return first, last


if __name__ == "__main__":
    guarded(main)
