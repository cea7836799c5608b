"""A sweep's plan for people: its stage tree as text, what sharing saves, and what would share more. Pure.

Eats a stages.Plan (and, for advice, the trials' Schedules); yields text.

How to read the tree. A line is a stretch of steps [start, stop). Its branches stand below it, one place to the right; ┼
goes straight on from the line above it in its own column, for the branch that most trials take. So a trunk with a hundred
branches is a hundred lines, not a hundred indents: the depth is at most log2(trials).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from model.schedule import Schedule, wsd_decay_start
from orchestrator.sweep.tree import Plan, Stage
from orchestrator.text import clip, short_names

GROUPS = 10  # of trials that are the same, named in a summary


@dataclass(frozen=True, eq=False)
class _Node:
    """A line of the tree: one stage, or a chain of them that differs in nothing but stored states."""

    stages: tuple[Stage, ...]
    mark: str
    rates: tuple[float, float]
    children: tuple["_Node", ...]

    @property
    def walk(self) -> list["_Node"]:
        """The subtree, parents before children. A loop: a trunk may be thousands of nodes deep."""
        found, waiting = [], [self]
        while waiting:
            found.append(waiting.pop())
            waiting += found[-1].children[::-1]
        return found

    @property
    def shape(self) -> tuple:
        """Equal for subtrees that look alike: other seeds, say."""
        return tuple(
            (
                n.stages[0].start,
                n.stages[-1].stop,
                n.rates,
                n.mark,
                len(n.stages[-1].trials),
                len(n.stages[-1].ends),
                len(n.children),
            )
            for n in self.walk
        )


# A prefix and its one node; or no prefix, and trees of the shape just drawn.
_Line = tuple[str, list[_Node]]


def text(plan: Plan, width: int = 100, lines: int = 60) -> str:
    """The stage tree, no line wider than `width`: steps, rates at both ends, trials, what stands, which trials end there.

    Trees of one shape are shown once, and of more than `lines` lines the middle is left out and counted.
    """
    trees: dict[tuple, list[_Node]] = {}
    for root in _nodes(plan):
        trees.setdefault(root.shape, []).append(root)
    drawn: list[_Line] = []
    for alike in trees.values():
        drawn += [(prefix, [node]) for prefix, node in _draw(alike[0], "", "")]
        if len(alike) > 1:
            drawn.append(("", alike[1:]))
    first, last = (
        (len(drawn), 0) if len(drawn) <= lines else (lines * 2 // 3, lines - lines * 2 // 3)
    )
    hidden = drawn[first : len(drawn) - last]
    out = _layout(
        drawn[:first] + drawn[len(drawn) - last :], width, short_names(t.name for t in plan.trials)
    )
    if hidden:
        out.insert(1 + first, _cut(_hidden(plan, hidden), width))
    return "\n".join(out)


def _nodes(plan: Plan) -> list[_Node]:
    """The roots of the tree, chains put together."""
    rates = {trial.name: trial.rates for trial in plan.trials}
    lost, made = plan.below(plan.dead), {}
    for stage in reversed(plan.stages):  # children before parents
        below = tuple(made[child.id] for child in plan.children.get(stage.id, ()))
        mark, curve = "lost" if stage.id in lost else _mark(plan, stage), rates[stage.trials[0]]
        start, stop = float(curve[stage.start]), float(curve[stage.stop - 1])
        if len(below) == 1 and not stage.ends and below[0].mark == mark:
            made[stage.id] = replace(
                below[0], stages=(stage, *below[0].stages), rates=(start, below[0].rates[1])
            )
        else:
            made[stage.id] = _Node((stage,), mark, (start, stop), below)
    return [made[stage.id] for stage in plan.children.get(None, ())]


def _mark(plan: Plan, stage: Stage) -> str:
    if stage.id in plan.dead:
        return "diverged"
    if stage.id in plan.to_run:
        return "result only" if stage.id in plan.standing else "to run"
    if stage.id in plan.finished:
        return "done"
    return "stands" if stage.id in plan.standing else "not needed"


def _draw(node: _Node, head: str, column: str) -> list[tuple[str, _Node]]:
    """(prefix, node) of every line of a subtree. `head` starts its first line, `column` all others."""
    drawn = [(head + ("┬ " if node.children else "─ "), node)]
    while node.children:
        heavy = _straight_on(node)
        side = [child for child in node.children if child is not heavy]
        for i, child in enumerate(side):
            last = heavy is None and i == len(side) - 1
            drawn += _draw(child, column + ("└" if last else "├"), column + (" " if last else "│"))
        if heavy is None:
            break
        drawn.append((column + "┼ ", heavy))
        node = heavy
    return drawn


def _straight_on(node: _Node) -> _Node | None:
    """The branch that more trials take than any other and that branches again, if there is one."""
    sizes = sorted((len(child.stages[0].trials) for child in node.children), reverse=True)
    most = max(node.children, key=lambda child: len(child.stages[0].trials))
    return most if most.children and (len(sizes) == 1 or sizes[0] > sizes[1]) else None


def _layout(drawn: list[_Line], width: int, short: Mapping[str, str]) -> list[str]:
    head = ("steps", "number", "learning rate", "trials", "")
    cells = [_cells(prefix, nodes[0]) if prefix else None for prefix, nodes in drawn]
    widths = [max(len(row[i]) for row in [head, *filter(None, cells)]) for i in range(5)]
    room = width - sum(widths) - 10
    names = [" = ".join(nodes[0].stages[-1].ends) if prefix else "" for prefix, nodes in drawn]
    if max(map(len, names)) > room:
        names = [
            " = ".join(short[end] for end in nodes[0].stages[-1].ends) if prefix else ""
            for prefix, nodes in drawn
        ]
    out = [_columns(head, widths, "trials that end here", width)]
    for row, name, (_, nodes) in zip(cells, names, drawn, strict=True):
        out.append(_columns(row, widths, name, width) if row else _cut(_alike(nodes, short), width))
    return out


def _cells(prefix: str, node: _Node) -> tuple[str, ...]:
    first, last = node.stages[0], node.stages[-1]
    return (
        f"{prefix}[{first.start:,}, {last.stop:,})",
        f"{last.stop - first.start:,}",
        f"{node.rates[0]:.2e} → {node.rates[1]:.2e}",
        f"{len(last.trials):,}",
        node.mark,
    )


def _columns(row: tuple[str, ...], widths: list[int], names: str, width: int) -> str:
    w = widths
    line = (
        f"{row[0]:<{w[0]}}  {row[1]:>{w[1]}}  {row[2]:<{w[2]}}  {row[3]:>{w[3]}}  {row[4]:<{w[4]}}"
    )
    room = width - len(line) - 2
    return clip(f"{line}  {clip(names, room) if room > 8 else ''}".rstrip(), width)


def _alike(roots: list[_Node], short: Mapping[str, str]) -> str:
    trials = [root.stages[0].trials for root in roots]
    total = sum(map(len, trials))
    return (
        f"  … {len(roots):,} more {_plural(len(roots), 'tree')} of this shape ({total:,} {_plural(total, 'trial')}), with "
        + ", ".join(short[names[0]] for names in trials)
    )


def _hidden(plan: Plan, hidden: list[_Line]) -> str:
    nodes = [
        node
        for prefix, group in hidden
        for top in group
        for node in ([top] if prefix else top.walk)
    ]
    stages = [stage for node in nodes for stage in node.stages]
    ends, runs = (
        sum(len(s.ends) for s in stages),
        sum(plan.cost(s) for s in stages if s.id in plan.to_run),
    )
    return (
        f"┊ … {len(stages):,} more {_plural(len(stages), 'stage')}, where {ends:,} {_plural(ends, 'trial')} end: "
        f"{sum(s.steps for s in stages):,} steps, {runs:,} of them to run"
    )


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


def _plural(n: int, word: str) -> str:
    return word if n == 1 else word + "s"


def summary(plan: Plan) -> list[str]:
    """Steps asked, to run and saved (shared between trials; stored already), the tree's size, trials that are the same."""
    probes = sum(
        s.steps for s in plan.stages if not any(t.asked for t in plan.trials if t.name in s.trials)
    )
    asked, tree = plan.steps_asked, plan.steps_in_tree - probes
    lost = sum(plan.by_id[i].steps for i in plan.dead | plan.below(plan.dead) if i in plan.by_id)
    to_run = plan.steps_to_run
    shared, stored = asked - tree, tree + probes - to_run - lost
    trials, stages = sum(t.asked for t in plan.trials), len(plan.stages)
    out = [
        f"{trials:,} {_plural(trials, 'trial')} in {stages:,} {_plural(stages, 'stage')}; one by one they take {asked:,} steps",
        f"to run: {to_run:,} steps ({_share(to_run, asked)})",
        f"saved: {shared + stored:,} steps ({_share(shared + stored, asked)}): "
        f"{shared:,} shared between trials, {stored:,} stored already",
    ]
    if probes:
        out.append(
            f"probes: {probes:,} steps, that nobody asked for, in the hope of saving more of the others"
        )
    if again := plan.steps_again:
        out.append(
            f"run again: {again:,} steps that were run before and left no checkpoint to branch off"
        )
    if lost:
        out.append(
            f"not run: {lost:,} steps ({_share(lost, asked)}), as training diverged at or above them"
        )
    same = [stage for stage in plan.stages if len(stage.ends) > 1]
    out += [
        f"the same training at every step, so run once: {' = '.join(stage.ends)}"
        for stage in same[:GROUPS]
    ]
    if len(same) > GROUPS:
        out.append(f"… and {len(same) - GROUPS:,} more groups of trials that are the same")
    return out


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def advice(plan: Plan, experiments_schedules: Mapping[str, Schedule]) -> list[str]:
    """Where trials share nothing or little, why, and what would share; each line holds for this very plan."""
    schedules = {trial.name: experiments_schedules[trial.name] for trial in plan.trials}
    if len(schedules) < 2:
        return []
    shared = plan.steps_asked - plan.steps_in_tree
    out = (
        []
        if shared
        else ["no two trials share a step: this sweep costs as much as its trials one by one"]
    )
    roots = {trial.name: trial.root for trial in plan.trials}
    if len(set(roots.values())) > 1:
        out.append(
            f"{len(set(roots.values())):,} groups of trials differ in seed, data, model, optimizer or batch: "
            "no step is shared between two groups"
        )
    out += [
        line
        for field in ("max_lr", "warmup_steps")
        if (line := _parted(plan, roots, schedules, field))
    ]
    late = (
        []
        if shared
        else [
            "what shares is what acts late in a run: its length, decay_fraction and decay_shape with "
            "schedule.kind=wsd, or only its length with constant and inverse_sqrt"
        ]
    )
    return out + (_horizons(plan, roots, schedules) or late)


def _parted(
    plan: Plan, roots: Mapping[str, str], schedules: Mapping[str, Schedule], field: str
) -> str | None:
    """Says so where trials with different values of a field, else of one root, have not even the first step in common."""
    values = {name: getattr(schedule, field) for name, schedule in schedules.items()}
    differ = len({(roots[name], value) for name, value in values.items()}) > len(
        set(roots.values())
    )
    if not differ or any(
        len({values[name] for name in stage.trials}) > 1 for stage in plan.children.get(None, ())
    ):
        return None
    return f"schedule.{field} changes the learning rate from the first step on: trials that differ in it share nothing"


def _horizons(plan: Plan, roots: Mapping[str, str], schedules: Mapping[str, Schedule]) -> list[str]:
    """For cosine and linear of several lengths: how little they share, and what the same lengths would cost as wsd."""
    groups: dict[tuple, list[str]] = {}
    for name, s in schedules.items():
        if s.kind in ("cosine", "linear"):
            groups.setdefault((s.kind, roots[name], s.max_lr, s.warmup_steps), []).append(name)
    groups = {
        key: names
        for key, names in groups.items()
        if len({schedules[n].decay_steps for n in names}) > 1
    }
    out, steps = [], {trial.name: trial.steps for trial in plan.trials}
    for kind in sorted({key[0] for key in groups}):
        alike = [names for key, names in groups.items() if key[0] == kind]
        most = _common(plan, {name for name, s in schedules.items() if s.kind == kind}, schedules)
        longest = max(steps[name] for names in alike for name in names)
        out.append(
            f"{kind} decays from the end of its warmup on, at a pace that its end sets: {kind} trials of different "
            f"schedule.decay_steps share at most their first {most:,} of up to {longest:,} steps"
        )
    members = {name for names in groups.values() for name in names}
    now = sum(s.steps for s in plan.stages if members & set(s.trials))
    as_wsd = [_as_wsd(names, schedules, steps) for names in groups.values()]
    if groups and None not in as_wsd and sum(as_wsd) < now:
        share = sorted({schedules[n].decay_fraction for n in members})
        out.append(
            "schedule.kind=wsd would share: runs of different lengths have every step before the shorter one's decay in "
            f"common. As wsd with decay_fraction {', '.join(f'{f:g}' for f in share)} these lengths take at most "
            f"{sum(as_wsd):,} steps, not {now:,}"
        )
    return out


def _common(plan: Plan, names: set[str], schedules: Mapping[str, Schedule]) -> int:
    """Steps that two of these trials with different decay_steps have in common, at most."""
    return max(
        (
            s.stop
            for s in plan.stages
            if len({schedules[n].decay_steps for n in s.trials if n in names}) > 1
        ),
        default=0,
    )


def _as_wsd(
    names: list[str], schedules: Mapping[str, Schedule], steps: Mapping[str, int]
) -> int | None:
    """Steps that trials of one root, peak and warmup take at most as wsd: the longest trunk, and each trial's own decay."""
    try:
        starts = {
            n: min(steps[n], wsd_decay_start(replace(schedules[n], kind="wsd"))) for n in names
        }
    except ValueError:  # the warmup is longer than the stable part
        return None
    return max(starts.values()) + sum(steps[n] - start for n, start in starts.items())
