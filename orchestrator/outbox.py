"""The outbox: what a run's folder holds for a tracking server, and what of it was accepted.

Eats run.json, the journal with the lines that resumes moved aside, checkpoints/, samples/ and documents; yields rows (key,
value, timestamp in ms, step), redacted facts, digests and marks. It knows no server, changes nothing but `tracking.json`.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator import journal
from orchestrator.provenance import redact

BATCH = 1000  # rows in one request: MLflow's limit
MARKED = ("train/loss", "val/loss", "val/bits_per_byte")  # by which checkpoints are ranked
STATUSES = ("FINISHED", "FAILED", "KILLED")
Row = tuple[str, float, int, int]


# ---- the curve ----
def history(run_dir: Path) -> list[dict[str, Any]]:
    """The journal as MLflow has to see it: of each step the first line ever written, by rising step.

    A step made again after a resume has the same losses and a later timestamp; its first line may have been sent.
    """
    first: dict[int, dict[str, Any]] = {}
    current = journal.read(run_dir)  # before the asides: what moves meanwhile is then seen twice, not never
    moved = [json.loads(line) for file in journal.aside_files(run_dir) for line in file.read_text("utf-8").splitlines()]
    for record in [*moved, *current]:
        first.setdefault(record["step"], record)
    return [first[step] for step in sorted(first)]


class Lines:
    """Lines above `sent_step`, read once each; a resume (new file, new aside) makes it read everything again."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.tail, self.asides, self.waiting = run_dir, journal.Tail(run_dir), None, []

    def refresh(self, sent_step: int) -> None:
        inode, new, asides = self.tail.inode, self.tail.poll(), len(journal.aside_files(self.run_dir))
        if (inode, self.asides) != (self.tail.inode, asides):
            self.waiting, new, self.asides = [], history(self.run_dir), asides
        for record in new:
            if record["step"] > (self.waiting[-1]["step"] if self.waiting else sent_step):
                self.waiting.append(record)

    def batches(self) -> Iterator[tuple[int, list[Row]]]:
        """(last step, rows up to it); a batch leaves once the caller comes back for the next."""
        while self.waiting:
            rows, count = [], 0
            for record in self.waiting:
                more = rows_of(record)
                if rows and len(rows) + len(more) > BATCH:
                    break
                rows, count = rows + more, count + 1
            yield self.waiting[count - 1]["step"], rows
            del self.waiting[:count]


def rows_of(record: dict[str, Any]) -> list[Row]:
    """A line's numbers. MLflow draws inf as 1.8e308, which ruins a chart: what is not finite stays in the journal."""
    return [(key, float(value), record["timestamp"], record["step"]) for key, value in record.items()
            if key not in ("step", "timestamp") and isinstance(value, (int, float)) and math.isfinite(value)]


def losses(run_dir: Path, step: int) -> list[Row]:
    """The losses logged at `step`, as the very rows of the curve."""
    return [row for record in history(run_dir) if record["step"] == step for row in rows_of(record)
            if row[0] in MARKED]


# ---- the rest ----
def wanted_tags(facts: dict[str, Any], params: dict[str, str], known: dict[str, str]) -> dict[str, str]:
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
        rows |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
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
    return {"name": facts["name"], "digest": facts["digest"][:36], "source_type": "local", "schema": json.dumps(schema),
            "source": json.dumps({"uri": as_text(facts.get("source", ""))}), "profile": json.dumps(profile)}


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def started_ms(run_dir: Path, facts: dict[str, Any]) -> int | None:
    """The run's first moment that anything recorded: a replay may come days later."""
    if started := (facts.get("attempts") or [{}])[0].get("started"):
        return round(datetime.fromisoformat(started).timestamp() * 1000)
    return next((record["timestamp"] for record in journal.read(run_dir)), None)


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
    found = {}
    for manifest in sorted((run_dir / "checkpoints").glob("step-*/MANIFEST.json")):
        try:
            found[manifest.parent.name] = hashlib.sha256(manifest.read_bytes()).hexdigest()
        except FileNotFoundError:
            continue  # pruned in this moment
    return found


def step_of(name: str) -> int:
    """The step in a checkpoint's name."""
    return int(name.removeprefix("step-"))


def samples(run_dir: Path) -> dict[Path, str]:
    """Files of generated text, each with a mark that changes when it is written again."""
    return marked(sorted((run_dir / "samples").glob("step-*.txt")))


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
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def blank_state(uri: str, key: str | None, experiment: str) -> dict[str, Any]:
    """Nothing was sent yet. `sent_step` is below step 0, the evaluation before training."""
    return {"uri": uri, "key": key, "experiment": experiment, "experiment_id": None, "run_id": None, "sent_step": -1,
            "checkpoints": {}, "samples": {}, "documents": {}}


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace tracking.json. Not synced: if power fails, the same is sent again, which changes nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(state, indent=1), "utf-8")
    os.replace(temporary, path)
