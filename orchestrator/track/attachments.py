"""Attachments: the files of a run's folder that a tracking server holds beside the curve.

Eats samples/, experiment.yaml, summary.json, events.jsonl, and a projection (its folder, its
client, what was accepted); yields MLflow artifacts, texts without secrets. A file that was sent twice replaces itself.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from orchestrator import files as own_file
from orchestrator.redact import redact_text
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.track import outbox

DOCUMENTS = ("experiment.yaml", "summary.json")
NOT_IN_TAGS = re.compile(r"[^\w./ -]")  # what MLflow refuses in a tag's name


def send_samples(image: Any, found: dict[Path, str]) -> None:
    """Generated texts; `found` is the outbox's."""
    for path, mark in found.items():
        if image.state["samples"].get(path.name) != mark:
            image.client.log_text(image.state["run_id"], _text(path), f"samples/{path.name}")
            image.state["samples"][path.name] = mark
            image.save()


def send_documents(image: Any) -> None:
    """The experiment and the summary; a second time they replace the first."""
    run_id = image.state["run_id"]
    for path in outbox.own(image.run_dir / name for name in DOCUMENTS):
        image.client.log_text(run_id, redact_text(_text(path)), path.name)


def send_events(image: Any) -> None:
    """What happened besides the steps, whenever there is more of it: the file, and how often as tags `events.<kind>`."""
    file = RunFolder(image.run_dir).events_file
    mark = outbox.own([file]).get(file)  # before it is read: what comes meanwhile changes it again
    if mark in (None, image.state["documents"].get(file.name)):
        return
    text, kinds = (
        _text(file),
        Counter(event["kind"] for event in events.read(RunFolder(image.run_dir))),
    )
    for kind, count in kinds.items():
        image.client.set_tag(image.state["run_id"], f"events.{NOT_IN_TAGS.sub('-', kind)}", count)
    image.client.log_text(image.state["run_id"], redact_text(text), file.name)
    image.state["documents"][file.name] = mark
    image.save()


def send_replays(image: Any) -> None:
    """The verdicts of replays, and of the last one what it says as tags, by which runs are searched."""
    found = sorted(filter(own_file.is_plain, image.run_dir.glob("replays/*.json")))
    if not found or found[-1].relative_to(image.run_dir).as_posix() in image.state["documents"]:
        return
    last = outbox.read_json(found[-1])
    image.client.set_tag(image.state["run_id"], "replay.equal", outbox.as_text(last.get("equal")))
    image.client.set_tag(
        image.state["run_id"], "replay.verdict", redact_text(str(last.get("verdict")))[:8000]
    )
    send_changed(image, found)


def send_changed(image: Any, files: list[Path]) -> None:
    """Those documents and figures that are not as they were sent."""
    for path, mark in outbox.own(files).items():
        name = path.relative_to(image.run_dir).as_posix()
        if image.state["documents"].get(name) == mark:
            continue
        if path.suffix == ".png":
            image.client.log_artifact(image.state["run_id"], str(path), path.parent.name)
        else:
            image.client.log_text(image.state["run_id"], redact_text(_text(path)), name)
        image.state["documents"][name] = mark
        image.save()


def _text(path: Path) -> str:
    """Whatever bytes are in it: a document that nobody can read must not keep the others back."""
    return own_file.read_bytes(path).decode("utf-8", "replace")
