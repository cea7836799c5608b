"""A campaign of faults: `python -m tests.faults.campaign -n 300 --seed 1`; with `--write` its table goes into docs/RELIABILITY.md.

    --case 17      one case of that seed alone; its folder is kept and named
    --only hang    only faults of these kinds
Every case is a run of its own, and compared with the golden run of its variant, made in the same session.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from tests.faults import kinds
from tests.faults.case import VARIANTS, Case, Forge, Met, Report, outcome

REPO = Path(__file__).resolve().parent.parent.parent
DOCUMENT = REPO / "docs" / "RELIABILITY.md"
BEGIN, END = "<!-- campaign: written by `make faults` -->", "<!-- end of the campaign -->"
FAULTS_A_CASE = (3, 7)
TRACKED = 5  # every n-th case has MLflow


class Campaign:
    """Cases of one seed in one folder; a case is a function of (seed, number), as far as what comes from outside can be."""

    def __init__(
        self, seed: int, folder: Path, data_dir: Path, only: tuple[str, ...] = tuple(kinds.KINDS)
    ):
        self.seed, self.folder, self.data_dir, self.only, self.forge = (
            seed,
            Path(folder),
            data_dir,
            tuple(only),
            Forge(),
        )
        self.words = "" if self.only == tuple(kinds.KINDS) else f" --only {' '.join(self.only)}"
        self.golden: dict[int, dict] = {}

    def case(self, number: int) -> Report:
        rng = random.Random(f"{self.seed}/{number}")
        variant = rng.randrange(len(VARIANTS))
        if variant not in self.golden:
            self.golden[variant] = self._golden(variant)
        tracked = str(self.folder / "mlflow.db") if number % TRACKED == 0 else None
        case = Case(
            self.forge, self.folder / f"case-{number}", self.data_dir, VARIANTS[variant], tracked
        )
        report = case.run(rng, rng.randint(*FAULTS_A_CASE), self.only)
        case.compare(self.golden[variant])
        for problem in report.problems:
            print(
                f"seed {self.seed}, case {number}: {problem}; {[m.what for m in report.met]}; again with\n"
                f"  python -m tests.faults.campaign --seed {self.seed} --case {number}{self.words}",
                flush=True,
            )
        return report

    def reports(self) -> Iterator[Report]:
        """Yield case after case, without end; remove the folders of those without a problem."""
        number = 0
        while True:
            report = self.case(number)
            yield report
            if not report.problems:
                shutil.rmtree(self.folder / f"case-{number}")
            number += 1

    def _golden(self, variant: int) -> dict:
        case = Case(self.forge, self.folder / f"golden-{variant}", self.data_dir, VARIANTS[variant])
        assert case.attempt(1, None), f"the golden run failed: see {case.folder / 'log.txt'}"
        return outcome(case.run_dir)


def rows(reports: list[Report]) -> list[list[str]]:
    """Return for each kind the faults, the wrong results and the seconds to the next step."""
    found = []
    for kind, (_, words) in kinds.KINDS.items():
        met = [(m, r) for r in reports for m in r.met if m.kind == kind]
        wrong = len({r.name for m, r in met if r.problems})
        times = [m.again_s for m, _ in met if m.again_s is not None]
        found.append(
            [words, str(len(met)), str(sum(m.kills for m, _ in met)), str(wrong), *quantiles(times)]
        )
    return found


def quantiles(times: list[float]) -> list[str]:
    if not times:
        return ["–", "–"]
    ordered = sorted(times)
    return [
        f"{statistics.median(ordered):.2f}",
        f"{ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]:.2f}",
    ]


def table(reports: list[Report], seed: int, wall_s: float) -> str:
    import mlflow
    import ray
    import torch

    met: list[Met] = [m for r in reports for m in r.met]
    wrong = sum(bool(r.problems) for r in reports)
    times = [m.again_s for m in met if m.again_s is not None]
    bound = (
        f"No wrong result in {len(met)} faults bounds the share of faults that give one by 3/{len(met)} = "
        f"{100 * 3 / len(met):.1f} % (95 % confidence, for faults drawn as these were)."
        if not wrong
        else f"**{wrong} of {len(reports)} runs had a wrong result.**"
    )
    kills, attempts = sum(m.kills for m in met), sum(r.attempts for r in reports)
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, seed {seed}: {len(met)} faults in {len(reports)} runs ({attempts} attempts), {kills} "
        f"processes ended by SIGKILL, {wrong} wrong results, {wall_s / 60:.0f} minutes.",
        f"{platform.system()} {platform.release().split('-')[0]}, {os.cpu_count()} shared cores ({_processor()}), Python "
        f"{platform.python_version()}, torch {torch.__version__}, ray {ray.__version__}, mlflow {mlflow.__version__}.",
        "",
        bound,
        "",
        "| fault | faults | processes killed | wrong results | median s | p95 s |",
        "|---|--:|--:|--:|--:|--:|",
        *("| " + " | ".join(row) + " |" for row in rows(reports)),
        "| "
        + " | ".join(["**all**", str(len(met)), str(kills), str(wrong), *quantiles(times)])
        + " |",
    ]
    return "\n".join(lines)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def write(text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace the table between its two marks."""
    before, _, rest = DOCUMENT.read_text("utf-8").partition(begin)
    _, _, after = rest.partition(end)
    DOCUMENT.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")


def make_dataset(folder: Path) -> Path:
    """Prepare some kB of sentences as characters with Ray Data."""
    from orchestrator.config.experiment import load_experiment
    from orchestrator.data.prepare import prepare

    draw = random.Random(0)
    words = [
        "the cat",
        "a dog",
        "one bird",
        "sees",
        "hears",
        "follows",
        "the moon",
        "a river",
        "no one",
        "and",
        "or",
        "but",
    ]
    (folder / "corpus.txt").write_text(
        " ".join(draw.choice(words) + draw.choice(["", ",", ".\n"]) for _ in range(4000)), "utf-8"
    )
    prepare(
        load_experiment(None, [f"data.corpus={folder / 'corpus.txt'}", "data.tokenizer=char"]).data,
        folder / "tokens",
    )
    return folder / "tokens"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, default=300, help="faults that have to happen")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", type=int, help="only this case of the seed")
    parser.add_argument(
        "--only", nargs="+", choices=kinds.KINDS, default=tuple(kinds.KINDS), metavar="KIND"
    )
    parser.add_argument(
        "--write", action="store_true", help=f"put the table into {DOCUMENT.relative_to(REPO)}"
    )
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    campaign, reports, begun = (
        Campaign(args.seed, folder, make_dataset(folder), args.only),
        [],
        time.monotonic(),
    )
    if args.case is not None:
        report = campaign.case(args.case)
        print(
            json.dumps(
                {
                    "folder": str(folder),
                    "met": [m.what for m in report.met],
                    "problems": report.problems,
                },
                indent=1,
            )
        )
        return bool(report.problems)
    for report in campaign.reports():
        reports.append(report)
        happened = sum(len(r.met) for r in reports)
        print(
            f"{report.name}: {len(report.met)} faults, {report.attempts} attempts; {happened} of {args.n} faults",
            flush=True,
        )
        if happened >= args.n:
            break
    text = table(reports, args.seed, time.monotonic() - begun)
    print(text)
    if args.write:
        write(text)
    wrong = any(r.problems for r in reports)
    if not wrong:
        shutil.rmtree(folder)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
