"""The outbox: what a run's folder holds for a tracking server, and what of it was accepted.

Eats run.json, the journal with the lines that resumes moved aside, checkpoints/, samples/ and documents; yields rows (key,
value, timestamp in ms, step), redacted facts, digests and marks. It knows no server, changes nothing but `tracking.json`.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator import files as own_file
from orchestrator.checkpoint import format as integrity
from orchestrator.redact import redact
from orchestrator.runs import journal, metrics
from orchestrator.runs.folder import RunFolder

BATCH = 1000  # rows in one request: MLflow's limit
STATUSES = ("FINISHED", "FAILED", "KILLED")
Row = tuple[str, float, int, int]


# ---- the curve ----
class MetricQueue:
    """The rows that are still to be sent, read once each; a resume (new file, new aside) makes it read everything again.

    Of each (key, step) the first value ever written counts, for it may have been sent, and what is made again has a later
    time. So the lines that resumes moved aside go first, and then the journal's from the step to which the resume went
    back, less what an aside holds. `sent_step` counts in the journal as it was after `asides` resumes.
    """

    def __init__(self, run_dir: Path):
        self.run_dir, self.tail, self.generation, self.last = (
            run_dir,
            journal.Tail(RunFolder(run_dir)),
            None,
            -1,
        )
        self.waiting: list[
            tuple[dict[str, int], list[Row]]
        ] = []  # (what the state is once they are accepted, rows of a line)
        self.taken: set[tuple[str, int]] = set()  # (key, step) of rows that an aside holds
        self.moved: set[tuple[int, int]] = set()  # (step, timestamp) of lines that an aside holds

    def refresh(self, state: dict[str, Any]) -> None:
        """Read what is new; `state` is tracking.json's."""
        inode, new = self.tail.inode, self.tail.poll()
        if (inode, self.generation) != (
            self.tail.inode,
            journal.generation(RunFolder(self.run_dir)),
        ):
            new = self._begin_again(state)
        for record in new:
            # A line that stands in both files will go in this moment, or was cut: its step may be made again, with more keys.
            if (
                record["step"] > self.last
                and (record["step"], record["timestamp"]) not in self.moved
            ):
                self.last = record["step"]
                self.waiting.append(({"sent_step": self.last}, self._first(record)))
        if self.waiting:
            journal.sync(RunFolder(self.run_dir))

    def _begin_again(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Queue the asides that are new; returns the journal's lines."""
        current = journal.read(
            RunFolder(self.run_dir)
        )  # before the asides: what moves meanwhile is then seen twice, not never
        self.waiting, self.taken, self.moved, self.last = [], set(), set(), state["sent_step"]
        self.generation, known = 0, state["asides"]
        for aside in journal.asides(RunFolder(self.run_dir)):
            self.generation = aside.number + 1
            if self.generation > known:
                self.last = min(self.last, aside.first_step - 1)
            for record in aside.read():
                rows = self._first(record)
                self.moved.add((record["step"], record["timestamp"]))
                self.taken |= {(key, step) for key, _, _, step in rows}
                if self.generation > known:
                    self.waiting.append(({}, rows))
        if self.generation != known:
            self.waiting.append(({"asides": self.generation, "sent_step": self.last}, []))
        return current

    def _first(self, record: dict[str, Any]) -> list[Row]:
        return [row for row in rows_of(record) if (row[0], row[3]) not in self.taken]

    def batches(self) -> Iterator[tuple[dict[str, int], list[Row]]]:
        """(what the state is then, rows of whole lines); a batch leaves once the caller comes back for the next."""
        while self.waiting:
            mark, rows, count = {}, [], 0
            for then, more in self.waiting:
                if rows and len(rows) + len(more) > BATCH:
                    break
                mark, rows, count = mark | then, rows + more, count + 1
            yield mark, rows
            del self.waiting[:count]


def rows_of(record: dict[str, Any]) -> list[Row]:
    """A line's numbers. MLflow draws inf as 1.8e308, which ruins a chart: what is not finite stays in the journal."""
    return [
        (key, float(value), record["timestamp"], record["step"])
        for key, value in record.items()
        if key not in ("step", "timestamp")
        and isinstance(value, (int, float))
        and math.isfinite(value)
    ]


def losses(run_dir: Path, step: int) -> list[Row]:
    """The losses logged at `step`, as the very rows of the curve."""
    current = journal.read(RunFolder(run_dir))
    moved = [record for aside in journal.asides(RunFolder(run_dir)) for record in aside.read()]
    first: dict[str, Row] = {}
    for row in (
        row for record in [*moved, *current] if record["step"] == step for row in rows_of(record)
    ):
        first.setdefault(row[0], row)
    return [row for key, row in first.items() if metrics.of(key).ranks_checkpoints]


# ---- the rest ----
def wanted_tags(
    facts: dict[str, Any], params: dict[str, str], known: dict[str, str]
) -> dict[str, str]:
    """Tags of the run, and of each attempt what its parameters (the `known` ones are for ever) do not say already."""
    attempts, tags = facts.get("attempts") or [], redact(facts.get("tags") or {})
    fixed = params | known
    for number, attempt in enumerate(attempts, 1):
        words = {k: as_text(v) for k, v in _flat(redact(attempt)).items()}
        tags |= {f"attempt.{number}.{k}": v for k, v in words.items() if fixed.get(k) != v}
    tags |= {f"attempt.{len(attempts)}.{k}": v for k, v in params.items() if fixed[k] != v}
    return {k: as_text(v)[:8000] for k, v in tags.items()}


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """One level, `layout.num_workers`: MLflow filters by a tag's whole value."""
    rows: dict[str, Any] = {}
    for key, value in facts.items():
        rows |= (
            {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
        )
    return rows


def wanted_params(facts: dict[str, Any]) -> dict[str, str]:
    return {k: as_text(v)[:6000] for k, v in redact(facts.get("params") or {}).items()}


def dataset(facts: dict[str, Any]) -> dict[str, str]:
    """The run's dataset in MLflow's words, or nothing; its digest may have 36 characters."""
    facts = redact(facts.get("dataset") or {})
    if not facts:
        return {}
    profile = {k: v for k, v in facts.items() if k not in ("name", "source")}
    schema = {"mlflow_colspec": [{"name": "tokens", "type": "binary", "required": True}]}
    return {
        "name": facts["name"],
        "digest": facts["digest"][:36],
        "source_type": "local",
        "schema": json.dumps(schema),
        "source": json.dumps({"uri": as_text(facts.get("source", ""))}),
        "profile": json.dumps(profile),
    }


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def started_ms(run_dir: Path, facts: dict[str, Any]) -> int | None:
    """The run's first moment that anything recorded: a replay may come days later."""
    if started := (facts.get("attempts") or [{}])[0].get("started"):
        return round(datetime.fromisoformat(started).timestamp() * 1000)
    return next((record["timestamp"] for record in journal.read(RunFolder(run_dir))), None)


def status(run_dir: Path) -> str | None:
    """How summary.json says that it ended; None where it has not."""
    word = str(read_json(run_dir / "summary.json").get("status")).upper()
    return word if word in STATUSES else None


def ended_ms(run_dir: Path) -> int | None:
    """When the driver wrote its summary; None where it did not."""
    try:
        return (run_dir / "summary.json").stat().st_mtime_ns // 1_000_000
    except FileNotFoundError:
        return None


def checkpoints(run_dir: Path) -> dict[str, str]:
    """`{"step-00000100": SHA-256 of its manifest}` of what stands there now."""
    found, folder = {}, run_dir / "checkpoints"
    for path in (integrity.path_of(folder, step) for step in integrity.steps(folder)):
        with contextlib.suppress(
            FileNotFoundError, NotADirectoryError, own_file.NotPlainFileError
        ):  # pruned in this moment, or none
            found[path.name] = hashlib.sha256(
                own_file.read_bytes(path / integrity.MANIFEST)
            ).hexdigest()
    return found


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.removeprefix("step-"))


def samples(run_dir: Path) -> dict[Path, str]:
    """Files of generated text, each with a mark that changes when it is written again."""
    return own(sorted((run_dir / "samples").glob("step-*.txt")))


def own(files: Iterable[Path]) -> dict[Path, str]:
    """`marked`, of what may be sent: a link in the folder could lead to any file of this machine."""
    return marked(filter(own_file.is_plain, files))


def marked(files: Iterable[Path]) -> dict[Path, str]:
    """Those of `files` that are there (a folder counts, a dangling link does not), each with its size and time."""
    found = {}
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            stat = file.stat()
            found[file] = f"{stat.st_size} {stat.st_mtime_ns}"
    return found


# ---- what was accepted ----
def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content; nothing where it is missing or torn."""
    try:
        content = json.loads(own_file.read_text(path))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def blank_state(uri: str, key: str | None, experiment: str) -> dict[str, Any]:
    """Nothing was sent yet. `sent_step` is below step 0, the evaluation before training."""
    return {
        "uri": uri,
        "key": key,
        "experiment": experiment,
        "experiment_id": None,
        "run_id": None,
        "sent_step": -1,
        "asides": 0,
        "checkpoints": {},
        "samples": {},
        "documents": {},
    }


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace tracking.json. Not synced: if power fails, the same is sent again, which changes nothing."""
    own_file.write_atomically(path, json.dumps(state, indent=1))
