"""Advice: why trials share few or no steps, what would share more, and trials that are left out."""

from collections.abc import Mapping, Sequence

from model.schedule import Schedule
from orchestrator.sweep.tree import StageTree

FALLING = ("cosine", "linear")  # kinds whose rate depends on the length of the run at each step
LEFT_OUT = 10  # trials that `left_out` names, at most


def left_out(lines: Sequence[str]) -> list[str]:
    """Return how many trials cannot be run, and why; `lines` has one entry for each of them."""
    if not lines:
        return []
    shown = [f"  {line}" for line in lines[:LEFT_OUT]]
    if len(lines) > LEFT_OUT:
        shown.append(f"  … and {len(lines) - LEFT_OUT:,} more")
    return [f"left out, because they cannot be run: {len(lines):,}", *shown]


def of_other_code(stored: Sequence[Sequence[str]]) -> list[str]:
    """Return how many stored stages are not used because other code or another device made them.

    Args:
        stored: What has changed, for each of them; empty if that is not known.
    """
    if not stored:
        return []
    changed = sorted({name for names in stored for name in names})
    words = ", ".join(changed[:3])
    if len(changed) > 3:
        words += f" and {len(changed) - 3} more modules"
    if not all(stored):
        words = "an earlier version did not record it"
    return [
        f"not used, because of other code or another device: {len(stored):,} stage(s) ({words}); "
        "what is needed of them is trained again"
    ]


def advice(tree: StageTree, schedules: Mapping[str, Schedule]) -> list[str]:
    """Return one line for each reason.

    Args:
        tree: The stages and their trials.
        schedules: Learning-rate schedule of each trial, by its name.
    """
    if len(tree.branches) < 2:
        return []
    shares = tree.steps_asked > tree.steps_in_tree
    lines = []
    if not shares:
        lines.append("no two trials share a step: the sweep costs as much as its trials one by one")
    roots = len({trial.root for trial in tree.branches})
    if roots > 1:
        lines.append(
            f"{roots:,} groups of trials differ in seed, data, model, optimizer or batch: no step "
            "is shared between two groups"
        )
    for field in ("max_lr", "warmup_steps"):
        if _separates_all(tree, schedules, field):
            lines.append(
                f"schedule.{field} changes the learning rate from the first step on: trials that "
                "differ in it share nothing"
            )
    lengths = {(s.kind, s.decay_steps) for s in schedules.values() if s.kind in FALLING}
    if len(lengths) > len({kind for kind, _ in lengths}):
        lines.append(
            "cosine and linear fall from the end of the warmup on, faster in a shorter run: trials "
            "of different schedule.decay_steps share little more than the warmup. With "
            "schedule.kind=wsd, they share all steps before the shorter one's decay"
        )
    elif not shares:
        lines.append(
            "trials share steps if they differ late in a run: in length, decay_fraction or "
            "decay_shape with schedule.kind=wsd, in length with constant or inverse_sqrt"
        )
    return lines


def _separates_all(tree: StageTree, schedules: Mapping[str, Schedule], field: str) -> bool:
    """Return whether trials of one root that differ in a field never share the first step."""
    values = {trial.name: getattr(schedules[trial.name], field) for trial in tree.branches}
    roots = {trial.root for trial in tree.branches}
    if len({(trial.root, values[trial.name]) for trial in tree.branches}) == len(roots):
        return False
    first_stages = tree.children.get(None, ())
    return all(len({values[name] for name in stage.trials}) == 1 for stage in first_stages)
