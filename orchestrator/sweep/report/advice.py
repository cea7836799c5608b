"""Advice for `--dry-run`: why trials share few or no steps, and what would share more."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from model.schedule import Schedule, wsd_decay_start
from orchestrator.sweep.tree import StageTree


def advice(tree: StageTree, schedules: Mapping[str, Schedule]) -> list[str]:
    """Return one line for each reason. The numbers in a line are those of this tree.

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
    lengths = _several_lengths(tree, schedules)
    if lengths:
        lines += lengths
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


def _several_lengths(tree: StageTree, schedules: Mapping[str, Schedule]) -> list[str]:
    """Return advice for cosine and linear schedules of different lengths.

    It says how few steps they share, and how many steps the same lengths take as wsd.
    """
    groups: dict[tuple[str, str, float, int], list[str]] = {}
    for trial in tree.branches:
        s = schedules[trial.name]
        if s.kind in ("cosine", "linear"):
            groups.setdefault((s.kind, trial.root, s.max_lr, s.warmup_steps), []).append(trial.name)
    groups = {key: names for key, names in groups.items() if _differ_in_length(names, schedules)}
    steps = {trial.name: trial.steps for trial in tree.branches}

    lines = []
    for kind in sorted({key[0] for key in groups}):
        alike = [name for key, names in groups.items() if key[0] == kind for name in names]
        of_kind = {name for name, s in schedules.items() if s.kind == kind}
        common = [
            s.stop for s in tree.stages if _differ_in_length(of_kind & {*s.trials}, schedules)
        ]
        lines.append(
            f"{kind} decays from the end of its warmup, and faster in a shorter run: {kind} trials "
            "of different schedule.decay_steps share at most their first "
            f"{max(common, default=0):,} of up to {max(steps[name] for name in alike):,} steps"
        )

    members = {name for names in groups.values() for name in names}
    now = sum(s.steps for s in tree.stages if not members.isdisjoint(s.trials))
    as_wsd = _steps_as_wsd(groups.values(), schedules, steps)
    if groups and as_wsd is not None and as_wsd < now:
        fractions = sorted({schedules[name].decay_fraction for name in members})
        shown = ", ".join(f"{fraction:g}" for fraction in fractions)
        lines.append(
            "schedule.kind=wsd would share more: runs of different lengths have all steps before "
            f"the shorter one's decay in common. As wsd with decay_fraction {shown} these lengths "
            f"take at most {as_wsd:,} steps, not {now:,}"
        )
    return lines


def _differ_in_length(names: Collection[str], schedules: Mapping[str, Schedule]) -> bool:
    return len({schedules[name].decay_steps for name in names}) > 1


def _steps_as_wsd(
    groups: Iterable[list[str]], schedules: Mapping[str, Schedule], steps: Mapping[str, int]
) -> int | None:
    """Return the most steps that the groups take as wsd; None if a warmup leaves no room for it.

    A group takes its longest trunk once, and the decay of each trial.
    """
    total = 0
    for names in groups:
        try:
            starts = [wsd_decay_start(replace(schedules[name], kind="wsd")) for name in names]
        except ValueError:  # the warmup is longer than the part with a constant rate
            return None
        trunks = [min(start, steps[name]) for start, name in zip(starts, names, strict=True)]
        total += max(trunks) + sum(steps[name] for name in names) - sum(trunks)
    return total
