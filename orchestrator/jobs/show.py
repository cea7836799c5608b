"""What the end of a run prints."""

from typing import Any

from orchestrator.cost.estimate import comparison_line
from orchestrator.files import read_text
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.summary import Summary
from orchestrator.text import duration, number, table


def show_run(folder: RunFolder, summary: Summary, link: str | None) -> None:
    """Print the summary, a sample, and the next commands."""
    rows: dict[str, Any] = {
        key: number(value)
        for key, value in summary.items()
        if value is not None and key not in ("wall_s", "estimated", "measured")
    }
    rows["wall time"] = duration(summary["wall_s"])
    if "estimated" in summary:
        rows["estimate"] = comparison_line(summary["estimated"], summary["measured"])
    rows |= {"folder": folder.path, "MLflow": link}
    print(f"\n{folder.name}\n{table(rows)}")

    if summary["status"] != "FINISHED":
        if summary["checkpoint"]:
            print(
                "\nnext: run the same command again; it resumes from the last checkpoint",
                flush=True,
            )
        return
    samples = folder.sample_files()
    if samples:
        print(f"\n──── sample ({samples[-1].name}) ────")
        print(read_text(samples[-1], "replace").rstrip() + "\n────")
    print(
        f"\nnext:\n  pipelines/sample.py {folder.path} --prompt '…'\n"
        f"  pipelines/evaluate.py {folder.path}\n  pipelines/ui.py {folder.path.parent}",
        flush=True,
    )
