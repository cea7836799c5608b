"""Puts mistakes into a copy of the project, one at a time: the tests of its package must find each.

    python -m tests.mutations [PART …] [--results FILE] [--write]

The mistakes are in mutations.toml. Each runs the test files that it names, without Ray and without
slow tests, until one fails. Before, none of them may fail. PART limits the mistakes to some parts,
such as `dropout`.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import hypothesis  # noqa: F401 - imported once, for all processes that are forked from this one
import numpy  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pydantic  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import torch  # noqa: F401

from tests.faults.report import write_table

REPO = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".toml")
LIMIT_S = 120.0
BEGIN = "<!-- mutations: written by `python -m tests.mutations --write` -->"
END = "<!-- end of the mutations -->"
SURVIVED = "–"


@dataclass(frozen=True)
class Mutation:
    """A mistake.

    Attributes:
        part: Part of the project, for people.
        wrong: What the project does then.
        file: The file with the mistake.
        old: Text that it has once.
        new: Text that takes its place.
        tests: Test files, separated by spaces.
    """

    part: str
    wrong: str
    file: str
    old: str
    new: str
    tests: str

    def apply(self, tree: Path) -> None:
        """Make the mistake in the project at `tree`."""
        file = tree / self.file
        text = file.read_text("utf-8")
        if text.count(self.old) != 1:
            sys.exit(f"{self.wrong}: {self.file} has {text.count(self.old)} times {self.old!r}")
        file.write_text(text.replace(self.old, self.new), "utf-8")

    def digest(self) -> str:
        """Return a hash of the mistake, its file and its tests."""
        found = hashlib.sha256(json.dumps(asdict(self)).encode())
        for name in (self.file, *self.tests.split()):
            place = REPO / name
            for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
                found.update(file.read_bytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Result:
    """The first test that failed, or `SURVIVED`, and the seconds until then.

    `of` is the `digest` of the mistake; empty without one.
    """

    caught_by: str
    seconds: float
    of: str = ""


def mutations() -> list[Mutation]:
    """Read the table."""
    return [Mutation(**entry) for entry in tomllib.loads(TABLE.read_text("utf-8"))["mutation"]]


def copy_project(tree: Path) -> None:
    """Copy the files of the project that git knows or would add."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout
    for name in filter(lambda name: (REPO / name).is_file(), names.splitlines()):
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / name, target)


class WithoutRay:
    """A plugin of pytest that leaves out the tests on a Ray cluster."""

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        items[:] = [item for item in items if "ray_head" not in item.fixturenames]


def run_tests(tree: Path, tests: list[str], output: Path) -> None:
    """Run test files of the project at `tree`; what a forked process does."""
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(tree)
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(REPO)))]
    for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "orchestrator")]:
        del sys.modules[name]
    words = ["-q", "-x", "-p", "no:cacheprovider", "--durations=0", *tests]
    status = pytest.main(words, plugins=[WithoutRay()])
    sys.stdout.flush()
    os._exit(int(status))


def try_out(mutation: Mutation, tree: Path) -> Result:
    """Make the mistake, run the tests, and take it back."""
    before = (tree / mutation.file).read_bytes()
    mutation.apply(tree)
    result = first_failure(mutation.tests, tree)
    (tree / mutation.file).write_bytes(before)
    return replace(result, of=mutation.digest())


def first_failure(tests: str, tree: Path) -> Result:
    """Run test files until a test fails."""
    output = tree / "output.txt"
    started = time.monotonic()
    arguments = (tree, tests.split(), output)
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=arguments)
    process.start()
    process.join(LIMIT_S)
    seconds = time.monotonic() - started
    assert process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # also what the tests have left
    process.join()
    text = output.read_text("utf-8", "replace")
    if seconds >= LIMIT_S or process.exitcode == 0:
        return Result(SURVIVED, seconds)
    failed = re.search(r"^(?:FAILED|ERROR) [\w/]*/(.+?)(?: - .*)?$", text, re.MULTILINE)
    if failed is None or process.exitcode not in (1, 2):
        sys.exit(text)
    return Result(failed[1], seconds)


def table(found: dict[str, Result]) -> str:
    """Return the results as Markdown."""
    known = [mutation for mutation in mutations() if mutation.wrong in found]
    survivors = sum(found[mutation.wrong].caught_by == SURVIVED for mutation in known)
    lines = [
        f"{len(known)} mistakes, {len(known) - survivors} caught, {survivors} not; the slowest "
        f"after {max(result.seconds for result in found.values()):.0f} s.",
        "",
        "| part | mistake | file | caught by | s |",
        "|---|---|---|---|--:|",
    ]
    for mutation in known:
        result = found[mutation.wrong]
        cells = [
            mutation.part,
            mutation.wrong,
            f"`{mutation.file}`",
            f"`{result.caught_by}`",
            f"{result.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Print each result. Return 1 if a mistake was not found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="*", help="parts of the project; default: all")
    parser.add_argument("--results", type=Path, help="results of earlier calls, not tried again")
    parser.add_argument("--write", action="store_true", help="write docs/fault-tests.md")
    options = parser.parse_args()
    table_ = mutations()
    repeated = [wrong for wrong, count in Counter(m.wrong for m in table_).items() if count > 1]
    assert not repeated, repeated
    found: dict[str, Result] = {}
    if options.results and options.results.exists():
        stored = json.loads(options.results.read_text("utf-8"))
        now = {mutation.wrong: mutation.digest() for mutation in table_}
        found = {wrong: Result(**stored[wrong]) for wrong in stored if wrong in now}
        found = {wrong: result for wrong, result in found.items() if result.of == now[wrong]}
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = Path(folder)
        copy_project(tree)
        passed = set()
        for mutation in table_:
            if mutation.wrong in found or options.part and mutation.part not in options.part:
                continue
            if mutation.tests not in passed:
                control = first_failure(mutation.tests, tree)
                if control.caught_by != SURVIVED or control.seconds >= LIMIT_S:
                    sys.exit(f"{mutation.tests}: fails without a mistake: {control}")
                skipped = re.search(r"\d+ skipped", (tree / "output.txt").read_text("utf-8"))
                if skipped:
                    print(f"{mutation.tests}: {skipped[0]}; what only these find survives here")
                passed.add(mutation.tests)
            found[mutation.wrong] = result = try_out(mutation, tree)
            print(f"{result.seconds:5.1f} s  {mutation.wrong}: {result.caught_by}", flush=True)
            if options.results:
                stored = {wrong: asdict(result) for wrong, result in found.items()}
                options.results.write_text(json.dumps(stored, indent=1), "utf-8")
    if options.write:
        write_table(table(found), BEGIN, END)
    return int(any(result.caught_by == SURVIVED for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
