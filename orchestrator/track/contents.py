"""Converts the content of a run folder to the form that MLflow stores. Imports no mlflow."""

import contextlib
import hashlib
import json
import re
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestrator import files
from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.redact import redact, redact_text
from orchestrator.runs import events
from orchestrator.runs.ending import MlflowStatus
from orchestrator.runs.folder import RunFolder, RunRecord

# MLflow's limits, in characters.
TAG_LENGTH = 8000
PARAM_LENGTH = 6000
DIGEST_LENGTH = 36
NOT_IN_TAGS = re.compile(r"[^\w./ -]")  # characters that MLflow rejects in the name of a tag


def params(record: RunRecord) -> dict[str, str]:
    """Return the parameters of the run, without secrets."""
    fields = redact(record.get("params", {}))
    return {name: as_text(value)[:PARAM_LENGTH] for name, value in fields.items()}


def tags(folder: RunFolder, record: RunRecord, fixed: dict[str, str]) -> dict[str, str]:
    """Return the tags of the run, without secrets.

    These are the tags in run.json, differences between attempts, the number of events of each
    kind, and the result of the last replay.

    Args:
        folder: Folder of the run.
        record: Content of run.json.
        fixed: Parameters that MLflow has or will get. MLflow cannot change a parameter, so a field
            that differs in an attempt becomes a tag `attempt.<number>.<field>`.
    """
    found = redact(record.get("tags", {}))
    attempts = record.get("attempts", [])
    for number, attempt in enumerate(attempts, 1):
        for name, value in _flattened(redact(attempt)).items():
            if as_text(value) != fixed.get(name):
                found[f"attempt.{number}.{name}"] = value
    for name, text in params(record).items():
        if text != fixed[name]:
            found[f"attempt.{len(attempts)}.{name}"] = text
    for kind, count in Counter(event["kind"] for event in events.read(folder)).items():
        found[f"events.{NOT_IN_TAGS.sub('-', kind)}"] = count
    for report in replay_reports(folder)[-1:]:
        last = files.read_derived(report, files.having("equal", "verdict"))
        if last is not None:
            found["replay.equal"] = last["equal"]
            found["replay.verdict"] = redact_text(str(last["verdict"]))
    return {name: as_text(value)[:TAG_LENGTH] for name, value in found.items()}


def _flattened(attempt: dict[str, Any]) -> dict[str, Any]:
    """Return nested fields as fields such as `layout.num_workers`, by which MLflow can filter."""
    flat: dict[str, Any] = {}
    for name, value in attempt.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": part for inner, part in value.items()})
        else:
            flat[name] = value
    return flat


def replay_reports(folder: RunFolder) -> list[Path]:
    """Return the reports of replays, oldest first."""
    return list(filter(files.is_plain, folder.replay_files()))


def dataset(record: RunRecord) -> dict[str, str] | None:
    """Return the arguments of `mlflow.entities.Dataset`; None if run.json has no dataset."""
    facts = redact(record.get("dataset", {}))
    if not facts:
        return None
    profile = {name: value for name, value in facts.items() if name not in ("name", "source")}
    return {
        "name": facts["name"],
        "digest": facts["digest"][:DIGEST_LENGTH],
        "source_type": "local",
        "source": json.dumps({"uri": as_text(facts.get("source", ""))}),
        "profile": json.dumps(profile),
    }


def as_text(value: Any) -> str:
    """Return a string as it is, and any other value as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value)


def started_ms(record: RunRecord) -> int | None:
    """Return when the first attempt started, in milliseconds; None if not known."""
    for attempt in record.get("attempts", [])[:1]:
        if "started" in attempt:
            return round(datetime.fromisoformat(attempt["started"]).timestamp() * 1000)
    return None


def ended_ms(folder: RunFolder) -> int | None:
    """Return when summary.json was written, in milliseconds; None without one."""
    try:
        return folder.summary_file.stat().st_mtime_ns // 1_000_000
    except FileNotFoundError:
        return None


def recorded_status(folder: RunFolder) -> MlflowStatus | None:
    """Return the status in summary.json; None if the run has not ended."""
    return (folder.read_summary() or {}).get("status")


def checkpoints(folder: RunFolder) -> dict[str, str]:
    """Return the SHA-256 of the manifest of each checkpoint, by the name of its folder."""
    digests = {}
    for step in folder.checkpoint_steps():
        path = folder.checkpoint(step)
        # Training may remove the checkpoint at this moment.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, files.NotPlainFileError):
            manifest = files.read_bytes(path / checkpoint_format.MANIFEST)
            digests[path.name] = hashlib.sha256(manifest).hexdigest()
    return digests
