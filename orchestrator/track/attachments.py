"""Files of a run folder as artifacts of its MLflow run."""

from pathlib import Path

from orchestrator import files
from orchestrator.redact import hide_passwords, redact_text
from orchestrator.track.mlflow_run import MlflowRun
from orchestrator.track.outbox import file_mark


def send_changed(tracked: MlflowRun, paths: list[Path], sent: dict[str, str]) -> None:
    """Send the texts, figures, traces and code that have changed.

    A text of the model and code are sent as they are, and an experiment without the passwords in
    its addresses: they may be used again. Other texts are sent without secrets.

    Missing files, symlinks, pipes and devices are skipped.

    Args:
        tracked: The run.
        paths: Files in its folder, or those in a folder of its sweep.
        sent: Marks of the files that were sent: `tracked.sent.samples` or `tracked.sent.documents`.
    """
    run_id = tracked.sent.run_id
    for path in paths:
        is_its_own = path.is_relative_to(tracked.folder.path)
        root = tracked.folder.path if is_its_own else path.parents[1]
        artifact = path.relative_to(root).as_posix()
        name = path.name if sent is tracked.sent.samples else artifact
        # The mark is taken before the file is read: a later change then gives another mark.
        mark = file_mark(path)
        if mark is None or not files.is_plain(path) or sent.get(name) == mark:
            continue
        if path.suffix in (".png", ".gz", ".py"):
            tracked.client.log_artifact(run_id, str(path), path.parent.name)
        else:
            # Damaged UTF-8 must not prevent that the other files are sent.
            text = files.read_bytes(path).decode("utf-8", "replace")
            if path.suffix == ".yaml":
                text = hide_passwords(text)
            elif sent is not tracked.sent.samples:
                text = redact_text(text)
            tracked.client.log_text(run_id, text, artifact)
        sent[name] = mark
        tracked.save()
