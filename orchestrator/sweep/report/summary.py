"""summary.json of a sweep, and the last lines on the terminal."""

from typing import Any, TypedDict

from orchestrator.cost import estimate as estimates
from orchestrator.cost.timing import Estimate
from orchestrator.runs import journal, metrics
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import SweepFolder
from orchestrator.sweep.report import comparison
from orchestrator.sweep.report.advice import left_out
from orchestrator.sweep.states import BLOCKED, DONE, FAILED
from orchestrator.sweep.study import Study
from orchestrator.text import duration, number, table


class SweepSummary(TypedDict, total=False):
    """Content of a sweep's summary.json; values that are not known are None."""

    status: str  # MLflow's: FINISHED, FAILED or KILLED
    exit_status: int
    trials: int
    # Trials in each state; a state without trials has no key.
    blocked: int
    diverged: int
    done: int
    failed: int
    running: int
    stopped: int
    waiting: int
    left_out: int  # trials that cannot be run; only if there are any
    probes: int  # only if there are probes
    probes_failed: int
    steps_asked: int  # of all trials, each trained alone
    steps_in_tree: int
    steps_run: int
    stages_run: int
    metric: str
    best_trial: str | None
    best_value: float | None
    best_checkpoint: str | None
    wall_s: float
    estimated: Any  # cost.timing.Estimate; only if the sweep ran what was estimated
    measured: dict[str, float | None]


def summarize(
    study: Study, ending: Ending, estimate: Estimate | None, wall_s: float
) -> SweepSummary:
    """Return the summary of a sweep that has ended.

    Args:
        study: The sweep.
        ending: How it ended.
        estimate: Estimated time, memory and disk; None if unknown.
        wall_s: Seconds that it took.
    """
    progress = study.progress
    tree = progress.tree
    rows = study.results()
    states = [row.state for row in rows]
    counts: Any = {state: states.count(state) for state in sorted(set(states))}
    if study.left_out:
        counts["left_out"] = len(study.left_out)
    probes = {probe.name for probe in study.probes.values()}
    if probes:
        failed = [name for name in probes if progress.states.of_trial(name) in (FAILED, BLOCKED)]
        counts |= {"probes": len(probes), "probes_failed": len(failed)}
    best, value = study.winner(rows) or (None, None)
    summary: SweepSummary = {
        "status": ending.mlflow_status,
        "exit_status": ending.exit_status,
        "trials": len(states),
        **counts,
        "steps_asked": tree.steps_asked,
        "steps_in_tree": tree.steps_in_tree,
        "steps_run": progress.steps_run,
        "stages_run": sum(progress.states.by_stage[stage] == DONE for stage in tree.to_run),
        "metric": study.metric,
        "best_trial": best,
        "best_value": value,
        "best_checkpoint": None,
        "wall_s": round(wall_s, 1),
    }
    if best is not None:
        trial = study.folder.trial(best).read_summary() or {}
        summary["best_checkpoint"] = trial.get("checkpoint")
    if estimate and progress.steps_run == tree.steps_to_run:
        summary["estimated"] = estimate
        summary["measured"] = {
            "time_s": summary["wall_s"],
            "memory_gib": _peak_memory_gib(study),
            "disk_bytes": progress.peak_bytes,
        }
    return summary


def _peak_memory_gib(study: Study) -> float | None:
    """Return the most that a worker used in the stages that were run; None if unknown."""
    folder = study.folder
    lines = (
        line for stage in study.progress.tree.to_run for line in journal.read(folder.stage(stage))
    )
    return metrics.peak_memory_gib(lines)


def show(study: Study, summary: SweepSummary, link: str | None) -> None:
    """Print how the trials compare, where the results are, and the next commands.

    Args:
        study: The sweep.
        summary: What `SweepFiles.finish` returned, or the summary.json of a finished sweep.
        link: MLflow's page of the trials; None if there is none.
    """
    folder = study.folder
    print("\n" + "\n".join([comparison.table(study.results()), *left_out(study.left_out)]))
    shown: dict[str, Any] = {
        key: number(value)
        for key, value in summary.items()
        if value is not None and key not in ("wall_s", "metric", "estimated", "measured")
    }
    shown["wall time"] = duration(summary["wall_s"])
    if "estimated" in summary:
        shown["estimate"] = estimates.comparison_line(summary["estimated"], summary["measured"])
    shown |= {"folder": folder.path, "figures": folder.figures, "MLflow": link}
    print(f"\n{folder.name}\n{table(shown)}")
    next_steps = _next_steps(folder, summary)
    if next_steps:
        print(next_steps, flush=True)


def _next_steps(folder: SweepFolder, summary: SweepSummary) -> str | None:
    if summary["status"] == "KILLED":
        return "\nnext: run the same command again; it continues with the stages that are not done"
    if not summary["best_trial"]:
        return None
    best = folder.trial(summary["best_trial"]).path
    return (
        f"\nnext:\n  pipelines/sample.py {best} --prompt '…'\n  pipelines/evaluate.py {best}\n"
        f"  pipelines/ui.py {folder.path.parent}\n"
        "to add values to the grid, run the same command with them: only new steps are trained"
    )
