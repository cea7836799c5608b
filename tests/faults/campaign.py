"""Runs a campaign of faults: `python -m tests.faults.campaign -n 300 --seed 1`.

Each case is one run with faults. At its end it is compared with a golden run: a run of the same
variant without faults, made by the same command.
"""

import argparse
import itertools
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.faults import kinds
from tests.faults.breaks import BREAKS
from tests.faults.case import VARIANTS, Case
from tests.faults.cause_table import CAUSES
from tests.faults.command_case import CommandCase
from tests.faults.corpora import CORPORA
from tests.faults.corpus_case import CorpusCase
from tests.faults.outcome import outcome
from tests.faults.rank import RankStarter
from tests.faults.report import Report, table, write_table
from tests.helpers.here import here
from tests.helpers.stores import copy_empty

BEGIN = "<!-- campaign: written by `make faults` -->"
END = "<!-- end of the campaign -->"
FAULTS_PER_CASE = (3, 7)
TRACKED_INTERVAL = 5  # every n-th case of ranks sends its metrics to MLflow
TRACKED_SHARE = 0.2  # of the runs with their command
SHARES = {"ranks": 2, "command": 3, "corpus": 2}
VERBS = ("train", "train", "sweep")
ALL = {
    **{name: title for name, (_, title) in kinds.KINDS.items()},
    **{name: cause.title for name, cause in CAUSES.items()},
    **{name: title for name, (title, _) in CORPORA.items()},
}
WORDS = (
    *("the cat", "a dog", "one bird", "sees", "hears", "follows", "the moon", "a river", "no one"),
    *("and", "or", "but"),
)


class Campaign:
    """Cases of one seed in one folder.

    A case is a function of (seed, number), except for the exact moment of a fault from outside.
    Its part is drawn: ranks without a command (`case.py`), a run or a sweep with its command
    (`command_case.py`), or the preparation of a corpus (`corpus_case.py`).

    Args:
        seed: Seed of all cases.
        path: Folder for the cases.
        source: Folder of `make_source`.
        only: Kinds of faults to draw from.
        breaks: Name of a way to break the product, for commands; see `breaks.py`.
        starts: Least and most starts with faults in a case of ranks or commands.
    """

    def __init__(
        self,
        seed: int,
        path: Path,
        source: Path,
        only: tuple[str, ...] = tuple(ALL),
        breaks: str | None = None,
        starts: tuple[int, int] = FAULTS_PER_CASE,
    ) -> None:
        self.seed = seed
        self.path = path
        self.source = source
        self.only = tuple(only)
        self.breaks = breaks
        self.starts = starts
        self.starter = RankStarter(with_mlflow=(source / "empty.db").exists())
        self.golden: dict[str, dict[str, Any]] = {}
        self.of_part = {
            part: tuple(name for name in self.only if name in found)
            for part, found in (("ranks", kinds.KINDS), ("command", CAUSES), ("corpus", CORPORA))
        }

    def case(self, number: int) -> Report:
        """Run one case and compare it with the golden run. Print each problem."""
        rng = random.Random(f"{self.seed}/{number}")
        parts = [part for part, names in self.of_part.items() if names]
        part = rng.choices(parts, [SHARES[part] for part in parts])[0]
        report = {"ranks": self._ranks, "command": self._command, "corpus": self._corpus}[part](
            rng, number
        )
        command = f"python -m tests.faults.campaign --seed {self.seed} --case {number}"
        if self.only != tuple(ALL):
            command += f" --only {' '.join(self.only)}"
        for problem in report.problems:
            print(f"seed {self.seed}, case {number}: {problem}", flush=True)
        if report.problems:
            faults = "; ".join(record.text for record in report.happened)
            print(f"  faults: {faults}\n  repeat it: {command}", flush=True)
        return report

    def reports(self) -> Iterator[Report]:
        """Run case after case, without end. Remove the folders of cases without a problem."""
        for number in itertools.count():
            report = self.case(number)
            yield report
            if not report.problems:
                shutil.rmtree(self.path / report.name, ignore_errors=True)

    # ---- the parts ----

    def _ranks(self, rng: random.Random, number: int) -> Report:
        variant = rng.randrange(len(VARIANTS))
        key = f"ranks-{variant}"
        data_dir = self.source / "tokens"
        if key not in self.golden:
            path = self.path / f"golden-{key}"
            case = Case(self.starter, path, data_dir, VARIANTS[variant])
            assert case.attempt(1, None), f"the golden run failed: see {path / 'log.txt'}"
            self.golden[key] = outcome(case.folder.path)
        database = None
        if number % TRACKED_INTERVAL == 0:
            database = str(self.path / "mlflow.db")
            copy_empty(Path(database))
        path = self.path / f"case-{number}"
        case = Case(self.starter, path, data_dir, VARIANTS[variant], database)
        report = case.run(rng, rng.randint(*self.starts), self.of_part["ranks"])
        case.compare(self.golden[key])
        return report

    def _command(self, rng: random.Random, number: int) -> Report:
        verb = rng.choice([verb for verb in VERBS if self._has_kinds(verb)])
        if verb not in self.golden:
            golden = CommandCase(self.starter, self.path / f"golden-{verb}", self.source, verb)
            assert golden.finish(random.Random(0)), f"the golden run failed: {golden.texts}"
            self.golden[verb] = golden.outcomes()
        # Kinds that need a store are few, and a tracked command takes three times as long.
        is_tracked = verb == "train" and (
            rng.random() < TRACKED_SHARE or self._needs_store(self.of_part["command"])
        )
        path = self.path / f"case-{number}"
        case = CommandCase(self.starter, path, self.source, verb, is_tracked, self.breaks)
        report = case.run(rng, rng.randint(*self.starts), self.of_part["command"])
        case.compare(self.golden[verb])
        return report

    def _has_kinds(self, verb: str) -> bool:
        return any(verb in CAUSES[name].verbs for name in self.of_part["command"])

    def _needs_store(self, names: tuple[str, ...]) -> bool:
        is_told = self.breaks is not None and BREAKS[self.breaks].tracked
        return is_told or all(CAUSES[name].tracked for name in names)

    def _corpus(self, rng: random.Random, number: int) -> Report:
        case = CorpusCase(self.starter, self.path / f"case-{number}", self.breaks)
        return case.run(rng, self.of_part["corpus"])


def each_kind(seed: int, folder: Path, source: Path, only: tuple[str, ...]) -> list[Report]:
    """Run one case of each kind alone. Print which kinds have problems."""
    golden: dict[str, dict[str, Any]] = {}
    reports = []
    for name in only:
        (folder / name).mkdir()
        campaign = Campaign(seed, folder / name, source, (name,), starts=(2, 2))
        campaign.golden = golden
        reports.append(campaign.case(0))
        print(f"{name}: {len(reports[-1].problems)} problems", flush=True)
    return reports


def make_source(folder: Path, *, with_store: bool = True) -> Path:
    """Write a corpus of random sentences, its tokens (one for each character), an empty store."""
    from orchestrator.config.experiment import load_experiment
    from orchestrator.data.prepare import prepare

    rng = random.Random(0)
    words = [rng.choice(WORDS) + rng.choice(["", ",", ".\n"]) for _ in range(4000)]
    corpus = folder / "corpus.txt"
    corpus.write_text(" ".join(words), "utf-8")
    experiment = load_experiment(None, [f"data.corpus={corpus}", "data.tokenizer=char"])
    with here():
        prepare(experiment.data, folder / "tokens")
    if with_store:
        copy_empty(folder / "empty.db")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=300, help="stop after this many faults")
    parser.add_argument("--minutes", type=float, default=math.inf, help="or after this time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, help="run only this case, and keep its folder")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=ALL,
        default=tuple(ALL),
        metavar="KIND",
        help=f"draw only faults of these kinds: {', '.join(ALL)}",
    )
    parser.add_argument("--each", action="store_true", help="one case of each kind alone")
    parser.add_argument(
        "--write", action="store_true", help="put the table into docs/fault-tests.md"
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    campaign = Campaign(args.seed, folder, make_source(folder), tuple(args.only))
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
    if args.each:
        reports = each_kind(args.seed, folder, campaign.source, campaign.only)
        print(table(reports, ALL, args.seed, time.monotonic() - begun))
        return any(report.problems for report in reports)
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
        if faults >= args.n or time.monotonic() - begun > 60 * args.minutes:
            break
    text = table(reports, ALL, args.seed, time.monotonic() - begun)
    print(text)
    if args.write:
        write_table(text, BEGIN, END)
    wrong = any(report.problems for report in reports)
    if not wrong:
        shutil.rmtree(folder)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
