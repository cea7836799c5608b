"""Results of a campaign, and their table in docs/fault-tests.md."""

import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

# What can be wrong, by the first word of a problem. Problems of ranks have none: other bits.
CATEGORIES = {
    "bits": "other bits",
    "loss": "silent losses",
    "silent": "wrong text, silently",
    "traceback": "tracebacks",
    "manual": "manual steps",
    "status": "other statuses or no line",
    "harness": "errors of the campaign",
}
REPO = Path(__file__).resolve().parents[2]
DOCUMENT = REPO / "docs" / "fault-tests.md"


@dataclass
class FaultRecord:
    """A fault that happened.

    Attributes:
        kind: Its kind, see `campaign.ALL`.
        text: Its moment, rank and attempt, in words.
        kills: Processes that it ended by SIGKILL; None: not counted. Processes that were ended
            because another one had died do not count.
        recovery_s: Seconds to the next step; None if the next attempt made no step.
        pair: Another fault came at the same time.
    """

    kind: str
    text: str
    kills: int | None = 0
    recovery_s: float | None = None
    pair: bool = False


@dataclass
class Report:
    name: str
    happened: list[FaultRecord] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    attempts: int = 0


def row(title: str, reports: list[Report], kind: str | None = None) -> str:
    """Return a line of the table, for one kind of fault or for all.

    Its numbers: faults, killed processes, wrong results, and seconds to the next step.
    """
    records = []
    wrong = 0
    for report in reports:
        found = [record for record in report.happened if kind in (None, record.kind)]
        records += found
        if report.problems and (found or kind is None):
            wrong += 1
    counted = [record.kills for record in records if record.kills is not None]
    kills = str(sum(counted)) if counted else "–"
    times = [record.recovery_s for record in records if record.recovery_s is not None]
    cells = [title, str(len(records)), kills, str(wrong), *quantiles(times)]
    return f"| {' | '.join(cells)} |"


def categories(reports: list[Report]) -> str:
    """Return how many problems of each category there were."""
    found = dict.fromkeys(CATEGORIES, 0)
    for report in reports:
        for problem in report.problems:
            first = problem.partition(":")[0]
            found[first if first in found else "bits"] += 1
    return ", ".join(f"{count} {CATEGORIES[name]}" for name, count in found.items())


def quantiles(times: list[float]) -> list[str]:
    """Return the median and the 95th percentile as text."""
    if not times:
        return ["–", "–"]
    ordered = sorted(times)
    high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return [f"{statistics.median(ordered):.2f}", f"{high:.2f}"]


def table(reports: list[Report], titles: Mapping[str, str], seed: int, wall_s: float) -> str:
    """Return the results as Markdown, with a row for each kind of fault that happened."""
    faults = sum(len(report.happened) for report in reports)
    kills = [record.kills for report in reports for record in report.happened]
    counted = [number for number in kills if number is not None]
    killed = f"{sum(counted)} workers ended by SIGKILL, " if counted else ""
    happened = {record.kind for report in reports for record in report.happened}
    pairs = sum(record.pair for report in reports for record in report.happened)
    attempts = sum(report.attempts for report in reports)
    wrong = sum(bool(report.problems) for report in reports)
    conclusion = f"**{wrong} of {len(reports)} runs had a problem.**"
    if not wrong:
        conclusion = (
            f"With no wrong result in {faults} faults, at most {300 / faults:.1f} % of such faults "
            "give one (95 % confidence)."
        )
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, seed {seed}: {faults} faults of {len(happened)} kinds in "
        f"{len(reports)} runs ({attempts} attempts), {pairs} of them two at once, "
        f"{killed}{wall_s / 60:.0f} minutes. Problems: {categories(reports)}.",
        _environment(),
        "",
        conclusion,
        "",
        "| fault | faults | workers killed | runs with a problem | median s | p95 s |",
        "|---|--:|--:|--:|--:|--:|",
        *(row(title, reports, kind) for kind, title in titles.items() if kind in happened),
        row("**all**", reports),
    ]
    return "\n".join(lines)


def _environment() -> str:
    import mlflow
    import ray
    import torch

    kernel = platform.release().split("-")[0]
    return (
        f"{platform.system()} {kernel}, {os.cpu_count()} shared cores ({_processor()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}, ray {ray.__version__}, "
        f"mlflow {mlflow.__version__}."
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def write_table(text: str, begin: str, end: str) -> None:
    """Replace the text between two marks of docs/fault-tests.md."""
    before, _, rest = DOCUMENT.read_text("utf-8").partition(begin)
    _, _, after = rest.partition(end)
    DOCUMENT.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")
