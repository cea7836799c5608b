"""A sweep as text: its tree of stages, and the steps that sharing saves.

How to read the tree. A line is a range of steps [start, stop). Its branches are below it, one
column to the right. ┼ continues the line above it in the same column: it is the branch that most
trials take. So a trunk with a hundred branches has a hundred lines and not a hundred levels of
indentation; the depth is at most log2(trials).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from orchestrator.sweep.tree import Stage, StageTree
from orchestrator.text import clip, short_names

GROUPS = 10  # groups of equal trials that a summary names, at most
HEAD = ("steps", "number", "learning rate", "trials", "")
COLUMN_GAPS = 10  # spaces between the columns


@dataclass(frozen=True, eq=False)
class _Node:
    """A line of the tree: a stage, or a chain of stages that only stored checkpoints separate.

    Attributes:
        stages: The chain.
        mark: State of the stages, such as "to run" or "done".
        rates: First and last learning rate.
        children: The branches.
    """

    stages: tuple[Stage, ...]
    mark: str
    rates: tuple[float, float]
    children: tuple["_Node", ...]

    @property
    def trials(self) -> int:
        return len(self.stages[-1].trials)

    def subtree(self) -> list["_Node"]:
        """Return this node and all below it, parents first.

        A loop and no recursion: a trunk may be thousands of nodes deep.
        """
        found = []
        waiting = [self]
        while waiting:
            node = waiting.pop()
            found.append(node)
            waiting += reversed(node.children)
        return found

    @cached_property
    def shape(self) -> tuple[tuple[object, ...], ...]:
        """Equal for trees that look alike, such as those of other seeds."""
        return tuple(
            (
                n.stages[0].start,
                n.stages[-1].stop,
                n.rates,
                n.mark,
                n.trials,
                len(n.stages[-1].ends),
                len(n.children),
            )
            for n in self.subtree()
        )


@dataclass(frozen=True)
class _Line:
    """A line of the drawing.

    Attributes:
        nodes: The node; or, without a prefix, the roots of trees of the shape that was just drawn.
        prefix: Branch symbols before the node.
    """

    nodes: list[_Node]
    prefix: str = ""


def text(tree: StageTree, width: int = 100, lines: int = 60) -> str:
    """Return the tree: steps, learning rates, number of trials, mark, and which trials end there.

    Trees of the same shape are drawn once. The middle of a long drawing is left out and counted.

    Args:
        tree: The stages and their trials.
        width: Columns of a line, at most.
        lines: Lines of the drawing, at most.
    """
    drawn: list[_Line] = []
    trees: dict[tuple[tuple[object, ...], ...], list[_Node]] = {}
    for root in _roots(tree):
        trees.setdefault(root.shape, []).append(root)
    for alike in trees.values():
        drawn += _draw(alike[0], "", "")
        if len(alike) > 1:
            drawn.append(_Line(alike[1:]))

    short = short_names(trial.name for trial in tree.branches)
    if len(drawn) <= lines:
        return "\n".join(_layout(drawn, width, short))
    first = lines * 2 // 3
    last = len(drawn) - (lines - first)
    shown = _layout(drawn[:first] + drawn[last:], width, short)
    shown.insert(1 + first, _cut(_hidden(tree, drawn[first:last]), width))
    return "\n".join(shown)


def _roots(tree: StageTree) -> list[_Node]:
    """Return the roots of the tree. Chains of stages are joined where their marks are equal."""
    rates = {trial.name: trial.rates for trial in tree.branches}
    lost = tree.below(tree.diverged)
    nodes: dict[str, _Node] = {}
    for stage in reversed(tree.stages):  # children before parents
        children = tuple(nodes[child.id] for child in tree.children.get(stage.id, ()))
        mark = "lost" if stage.id in lost else _mark(tree, stage)
        curve = rates[stage.trials[0]]
        first = float(curve[stage.start])
        last = float(curve[stage.stop - 1])
        node = _Node((stage,), mark, (first, last), children)
        if len(children) == 1 and not stage.ends and children[0].mark == mark:
            child = children[0]
            node = replace(child, stages=(stage, *child.stages), rates=(first, child.rates[1]))
        nodes[stage.id] = node
    return [nodes[stage.id] for stage in tree.children.get(None, ())]


def _mark(tree: StageTree, stage: Stage) -> str:
    if stage.id in tree.diverged:
        return "diverged"
    if stage.id in tree.to_run:
        return "result only" if stage.id in tree.stored else "to run"
    if stage.id in tree.finished:
        return "done"
    return "stored" if stage.id in tree.stored else "not needed"


def _draw(node: _Node, head: str, column: str) -> list[_Line]:
    """Return the lines of a subtree.

    Args:
        node: Root of the subtree.
        head: Symbols before its first line.
        column: Symbols before all other lines.
    """
    lines = [_Line([node], head + ("┬ " if node.children else "─ "))]
    while node.children:
        main = _main_branch(node)
        side = [child for child in node.children if child is not main]
        for child in side:
            is_last = main is None and child is side[-1]
            symbol, below = ("└", " ") if is_last else ("├", "│")
            lines += _draw(child, column + symbol, column + below)
        if main is None:
            break
        lines.append(_Line([main], column + "┼ "))
        node = main
    return lines


def _main_branch(node: _Node) -> _Node | None:
    """Return the branch that more trials take than any other, if it branches again."""
    first, *others = sorted(node.children, key=_trials_at_start, reverse=True)
    if not first.children:
        return None
    if others and _trials_at_start(others[0]) == _trials_at_start(first):
        return None
    return first


def _trials_at_start(node: _Node) -> int:
    return len(node.stages[0].trials)


def _layout(drawn: list[_Line], width: int, short: Mapping[str, str]) -> list[str]:
    """Align the columns. Long names of trials are shortened."""
    cells = [_cells(line) if line.prefix else None for line in drawn]
    widths = [max(len(row[i]) for row in (HEAD, *filter(None, cells))) for i in range(len(HEAD))]
    ends = [line.nodes[0].stages[-1].ends if line.prefix else () for line in drawn]
    names = [" = ".join(trials) for trials in ends]
    if max(len(name) for name in names) > width - sum(widths) - COLUMN_GAPS:
        names = [" = ".join(short[trial] for trial in trials) for trials in ends]

    lines = [_columns(HEAD, widths, "trials that end here", width)]
    for line, row, name in zip(drawn, cells, names, strict=True):
        if row is None:
            lines.append(_cut(_same_shape(line.nodes, short), width))
        else:
            lines.append(_columns(row, widths, name, width))
    return lines


def _cells(line: _Line) -> tuple[str, ...]:
    node = line.nodes[0]
    start = node.stages[0].start
    stop = node.stages[-1].stop
    return (
        f"{line.prefix}[{start:,}, {stop:,})",
        f"{stop - start:,}",
        f"{node.rates[0]:.2e} → {node.rates[1]:.2e}",
        f"{node.trials:,}",
        node.mark,
    )


def _columns(row: tuple[str, ...], widths: list[int], names: str, width: int) -> str:
    steps, number, rates, trials, mark = widths
    line = (
        f"{row[0]:<{steps}}  {row[1]:>{number}}  {row[2]:<{rates}}  {row[3]:>{trials}}  "
        f"{row[4]:<{mark}}"
    )
    room = width - len(line) - 2
    shown = clip(names, room) if room > 8 else ""
    return clip(f"{line}  {shown}".rstrip(), width)


def _same_shape(roots: list[_Node], short: Mapping[str, str]) -> str:
    trials = [root.stages[0].trials for root in roots]
    total = sum(len(names) for names in trials)
    first = ", ".join(short[names[0]] for names in trials)
    return (
        f"  … {_count(len(roots), 'more tree')} of this shape ({_count(total, 'trial')}), "
        f"with {first}"
    )


def _hidden(tree: StageTree, lines: list[_Line]) -> str:
    """Return the line that replaces those that are left out."""
    stages = []
    for line in lines:
        for top in line.nodes:
            nodes = [top] if line.prefix else top.subtree()
            stages += [stage for node in nodes for stage in node.stages]
    ends = sum(len(s.ends) for s in stages)
    steps = sum(s.steps for s in stages)
    to_run = sum(tree.cost(s) for s in stages if s.id in tree.to_run)
    return (
        f"┊ … {_count(len(stages), 'more stage')}, where {_count(ends, 'trial')} end: "
        f"{steps:,} steps, {to_run:,} of them to run"
    )


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def summary(tree: StageTree) -> list[str]:
    """Return the steps asked for, to run and saved, the tree's size, and trials that are equal."""
    asked_trials = {trial.name for trial in tree.branches if not trial.is_probe}
    probes = sum(s.steps for s in tree.stages if asked_trials.isdisjoint(s.trials))
    asked = tree.steps_asked
    to_run = tree.steps_to_run
    lost_ids = tree.diverged | tree.below(tree.diverged)
    lost = sum(tree.by_id[stage].steps for stage in lost_ids if stage in tree.by_id)
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
