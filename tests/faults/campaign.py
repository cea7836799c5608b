"""Runs a campaign of faults: `python -m tests.faults.campaign -n 300 --seed 1`.

Each case is one run with faults. At its end it is compared with a golden run: a run of the same
variant without faults, made by the same command.
"""

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults import kinds
from tests.faults.case import VARIANTS, Case
from tests.faults.outcome import outcome
from tests.faults.rank import RankStarter
from tests.faults.report import Report, table, write_table

BEGIN = "<!-- campaign: written by `make faults` -->"
END = "<!-- end of the campaign -->"
FAULTS_PER_CASE = (3, 7)
TRACKED_INTERVAL = 5  # every n-th case sends its metrics to MLflow
WORDS = (
    *("the cat", "a dog", "one bird", "sees", "hears", "follows", "the moon", "a river", "no one"),
    *("and", "or", "but"),
)


class Campaign:
    """Cases of one seed in one folder.

    A case is a function of (seed, number), except for the exact moment of a fault from outside.

    Args:
        seed: Seed of all cases.
        path: Folder for the cases.
        data_dir: Folder of the token shards.
        only: Kinds of faults to draw from.
    """

    def __init__(
        self, seed: int, path: Path, data_dir: Path, only: tuple[str, ...] = tuple(kinds.KINDS)
    ) -> None:
        self.seed = seed
        self.path = path
        self.data_dir = data_dir
        self.only = tuple(only)
        self.starter = RankStarter()
        self.golden: dict[int, dict[str, Any]] = {}

    def case(self, number: int) -> Report:
        """Run one case and compare it with the golden run. Print each problem."""
        rng = random.Random(f"{self.seed}/{number}")
        variant = rng.randrange(len(VARIANTS))
        if variant not in self.golden:
            self.golden[variant] = self._golden(variant)
        database = None
        if number % TRACKED_INTERVAL == 0:
            database = str(self.path / "mlflow.db")
        path = self.path / f"case-{number}"
        case = Case(self.starter, path, self.data_dir, VARIANTS[variant], database)
        report = case.run(rng, rng.randint(*FAULTS_PER_CASE), self.only)
        case.compare(self.golden[variant])
        command = f"python -m tests.faults.campaign --seed {self.seed} --case {number}"
        if self.only != tuple(kinds.KINDS):
            command += f" --only {' '.join(self.only)}"
        for problem in report.problems:
            faults = [record.text for record in report.happened]
            print(f"seed {self.seed}, case {number}: {problem}; faults: {faults}", flush=True)
            print(f"repeat it: {command}", flush=True)
        return report

    def reports(self) -> Iterator[Report]:
        """Run case after case, without end. Remove the folders of cases without a problem."""
        for number in itertools.count():
            report = self.case(number)
            yield report
            if not report.problems:
                shutil.rmtree(self.path / f"case-{number}")

    def _golden(self, variant: int) -> dict[str, Any]:
        path = self.path / f"golden-{variant}"
        case = Case(self.starter, path, self.data_dir, VARIANTS[variant])
        assert case.attempt(1, None), f"the golden run failed: see {path / 'log.txt'}"
        return outcome(case.folder.path)


def make_dataset(folder: Path) -> Path:
    """Write a corpus of random sentences and prepare its tokens, one for each character."""
    from orchestrator.config.experiment import load_experiment
    from orchestrator.data.prepare import prepare

    rng = random.Random(0)
    words = [rng.choice(WORDS) + rng.choice(["", ",", ".\n"]) for _ in range(4000)]
    corpus = folder / "corpus.txt"
    corpus.write_text(" ".join(words), "utf-8")
    experiment = load_experiment(None, [f"data.corpus={corpus}", "data.tokenizer=char"])
    prepare(experiment.data, folder / "tokens")
    return folder / "tokens"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=300, help="stop after this many faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, help="run only this case, and keep its folder")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=kinds.KINDS,
        default=tuple(kinds.KINDS),
        metavar="KIND",
        help=f"draw only faults of these kinds: {', '.join(kinds.KINDS)}",
    )
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/RELIABILITY.md"
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    campaign = Campaign(args.seed, folder, make_dataset(folder), args.only)
    begun = time.monotonic()
    if args.case is not None:
        report = campaign.case(args.case)
        result = {
            "folder": str(folder),
            "faults": [record.text for record in report.happened],
            "problems": report.problems,
        }
        print(json.dumps(result, indent=1))
        return bool(report.problems)
    reports = []
    faults = 0
    for report in campaign.reports():
        reports.append(report)
        faults += len(report.happened)
        print(
            f"{report.name}: {len(report.happened)} faults, {report.attempts} attempts; "
            f"{faults} of {args.n} faults",
            flush=True,
        )
        if faults >= args.n:
            break
    text = table(reports, args.seed, time.monotonic() - begun)
    print(text)
    if args.write:
        write_table(text, BEGIN, END)
    wrong = any(report.problems for report in reports)
    if not wrong:
        shutil.rmtree(folder)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
