"""A sweep as text: its tree of stages, and the steps that sharing saves.

How to read the tree. A line is a stage, steps [start, stop). Its branches are below it, one column
to the right. ┼ continues the line above it in the same column: it is the branch that most trials
take. So a trunk with a hundred branches has a hundred lines and not a hundred levels of
indentation; the depth is at most log2(trials).
"""

from orchestrator.config.steps import IN_WORDS
from orchestrator.sweep.branch import Branch
from orchestrator.sweep.tree import Stage, StageTree
from orchestrator.text import aligned, clip

GROUPS = 10  # groups of equal trials that a summary names, at most
HEAD: tuple[str, ...] = ("steps", "number", "learning rate", "trials", "")
NAMES = "trials that end here"
SHORTEST_NAMES = 8  # columns; with less room, no names are shown


def text(tree: StageTree, width: int = 100, lines: int = 60) -> str:
    """Return the tree: steps, learning rates, number of trials, mark, and which trials end there.

    Args:
        tree: The stages and their trials.
        width: Columns of a line, at most.
        lines: Lines of the drawing, at most; the middle of a longer one is left out.
    """
    drawn = [line for root in tree.children.get(None, ()) for line in _draw(tree, root, "", "")]
    branches = {branch.name: branch for branch in tree.branches}
    lost = tree.below(tree.diverged)
    rows = [HEAD]
    for prefix, stage in drawn:
        mark = "lost" if stage.id in lost else _mark(tree, stage)
        rows.append(_cells(prefix, stage, branches[stage.trials[0]], mark))
    cells = aligned(rows, left=(0, 2, 4)).splitlines()
    names = [NAMES, *(" = ".join(stage.ends) for _, stage in drawn)]
    used = max(map(len, cells))
    room = width - used - 2
    shown = []
    for row, name in zip(cells, names, strict=True):
        name = clip(name, room) if room > SHORTEST_NAMES else ""
        shown.append(f"{row:<{used}}  {name}".rstrip()[:width])
    if len(drawn) > lines:
        first = 1 + lines * 2 // 3
        last = len(shown) - (lines - first + 1)
        shown[first:last] = [f"┊ … {_count(last - first, 'more stage')}"]
    return "\n".join(shown)


def _cells(prefix: str, stage: Stage, branch: Branch, mark: str) -> tuple[str, ...]:
    last = stage.stop - 1
    settings = f"{branch.rates[stage.start]:.2e} → {branch.rates[last]:.2e}"
    for name, first in branch.changes.items():
        if first <= last:
            settings += f", {IN_WORDS[name]} {branch.others[name][last]:.3g}"
    return (
        f"{prefix}[{stage.start:,}, {stage.stop:,})",
        f"{stage.steps:,}",
        settings,
        f"{len(stage.trials):,}",
        mark,
    )


def _mark(tree: StageTree, stage: Stage) -> str:
    if stage.id in tree.diverged:
        return "diverged"
    if stage.id in tree.to_run:
        return "result only" if stage.id in tree.stored else "to run"
    if stage.id in tree.finished:
        return "done"
    return "stored" if stage.id in tree.stored else "not needed"


def _draw(tree: StageTree, stage: Stage, head: str, column: str) -> list[tuple[str, Stage]]:
    """Return the lines of a subtree: the symbols before each stage, and the stage.

    Args:
        tree: The whole tree.
        stage: Root of the subtree.
        head: Symbols before its first line.
        column: Symbols before all other lines.
    """
    lines = [(head + ("┬ " if stage.id in tree.children else "─ "), stage)]
    while stage.id in tree.children:
        children = tree.children[stage.id]
        main = _main_branch(tree, children)
        side = [child for child in children if child is not main]
        for child in side:
            is_last = main is None and child is side[-1]
            symbol, below = ("└", " ") if is_last else ("├", "│")
            lines += _draw(tree, child, column + symbol, column + below)
        if main is None:
            break
        lines.append((column + "┼ ", main))
        stage = main
    return lines


def _main_branch(tree: StageTree, children: list[Stage]) -> Stage | None:
    """Return the branch that more trials take than any other, if it branches again."""
    first, *others = sorted(children, key=lambda stage: len(stage.trials), reverse=True)
    if first.id not in tree.children:
        return None
    if others and len(others[0].trials) == len(first.trials):
        return None
    return first


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def summary(tree: StageTree) -> list[str]:
    """Return the steps asked for, to run and saved, the tree's size, and trials that are equal."""
    asked_trials = {trial.name for trial in tree.branches if not trial.is_probe}
    probes = sum(s.steps for s in tree.stages if asked_trials.isdisjoint(s.trials))
    asked = tree.steps_asked
    to_run = tree.steps_to_run
    lost_ids = tree.diverged | tree.below(tree.diverged)
    lost = sum(stage.steps for stage in tree.stages if stage.id in lost_ids)
    shared = asked - (tree.steps_in_tree - probes)
    stored = tree.steps_in_tree - to_run - lost
    lines = [
        f"{_count(len(asked_trials), 'trial')} in {_count(len(tree.stages), 'stage')}; "
        f"trained one by one, they take {asked:,} steps",
        f"to run: {to_run:,} steps ({_share(to_run, asked)})",
        f"saved: {shared + stored:,} steps ({_share(shared + stored, asked)}): "
        f"{shared:,} shared between trials, {stored:,} stored already",
    ]
    if probes:
        lines.append(f"probes: {probes:,} additional steps, which may save more of the others")
    if tree.steps_again:
        lines.append(
            f"run again: {tree.steps_again:,} steps whose checkpoint is missing where a new trial "
            "branches off"
        )
    if lost:
        lines.append(f"not run: {lost:,} steps ({_share(lost, asked)}), because training diverged")
    equal = [" = ".join(stage.ends) for stage in tree.stages if len(stage.ends) > 1]
    lines += [f"equal at every step, so run once: {names}" for names in equal[:GROUPS]]
    if len(equal) > GROUPS:
        lines.append(f"… and {len(equal) - GROUPS:,} more groups of equal trials")
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"
