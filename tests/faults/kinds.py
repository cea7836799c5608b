"""The faults of a campaign, drawn from a seed: kind, moment, rank and step."""

import random
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

WORLDS = (1, 2, 4)

# Moments at which a rank kills itself, in groups for the table. The names are in `hooks.POINTS`.
STEP = (
    "before forward",
    "before backward",
    "after backward",
    "before clip",
    "before optimizer",
    "after optimizer",
)
EXCHANGE = ("before all_to_all", "after all_to_all", "before all_gather", "after all_gather")
JOURNAL = ("before line", "torn line", "after line")
COMMIT = (
    "before copy",
    "after copy",
    "before commit",
    "after mkdir",
    "before write",
    "torn write",
    "after write",
    "before fsync",
    "after fsync",
    "before rename",
    "after rename",
    "before rmdir",
    "after rmdir",
    "before unlink",
    "after unlink",
    "before prune",
    "after prune",
)
EVALUATION = ("before batch", "after batch", "before sample", "after sample")
RESTORE = (
    "before verify",
    "after verify",
    "before restore",
    "after restore",
    "before rewind",
    "before rewrite",
    "after rewrite",
    "after rewind",
)
BY_RANK_0 = {*JOURNAL, *COMMIT, *EVALUATION[2:], *RESTORE[4:]}
# The latest occurrence that is drawn.
NTH = {"step": 24, "exchange": 9, "journal": 6, "commit": 3, "evaluation": 7, "restore": 1}

# kind: (relative frequency, name in the table)
KINDS = {
    "step": (6, "SIGKILL in forward, backward, clipping or the optimizer"),
    "exchange": (4, "SIGKILL in the exchange of gradients"),
    "journal": (4, "SIGKILL around a line of the journal, or half-way through it"),
    "commit": (6, "SIGKILL around a file-system call of a commit, or half-way through a write"),
    "evaluation": (3, "SIGKILL in an evaluation"),
    "restore": (4, "SIGKILL while the run is restored or its journal rewound"),
    "outside": (5, "SIGKILL of one rank from outside, at any time"),
    "all": (3, "SIGKILL of all ranks at once, at any time"),
    "again": (2, "SIGKILL at one and the same moment, two to four times in a row"),
    "stop": (3, "asked to stop (as by SIGTERM to the driver)"),
    "stop-kill": (2, "SIGKILL while it stops as asked"),
    "flip": (3, "a bit flipped in the latest checkpoint, after a SIGKILL of all ranks"),
    "cut": (2, "a part of the latest checkpoint cut short, after a SIGKILL of all ranks"),
    "tail": (3, "the journal's last line torn, after a SIGKILL of all ranks"),
    "full": (2, "no room for a checkpoint (the error is injected)"),
    "hang": (0.8, "SIGSTOP of one rank, which its neighbours find, name and end"),
}
SELF = {
    "step": STEP,
    "exchange": EXCHANGE,
    "journal": JOURNAL,
    "commit": COMMIT,
    "evaluation": EVALUATION,
    "restore": RESTORE,
}
DAMAGE = ("flip", "cut", "tail")


@dataclass(frozen=True)
class Fault:
    """One fault in one attempt.

    Attributes:
        kind: Key of `KINDS`.
        world: Number of ranks of the attempt.
        rank: The rank that has the fault.
        moment: Where the rank kills itself; empty for other faults.
        nth: The occurrence of `moment`, from 1.
        delay: For faults from outside: seconds after the first step of the attempt or, if
            negative, after its processes were started.
        place: Position of the damage in a file, 0 to 1.
        patience: Seconds for the other ranks to notice the fault, before they are killed too.
    """

    kind: str
    world: int
    rank: int
    moment: str = ""
    nth: int = 0
    delay: float = 0.0
    place: float = 0.0
    patience: float = 0.0

    @property
    def is_from_outside(self) -> bool:
        """True if the test causes the fault, not the rank itself."""
        return not self.moment and self.kind != "full"

    def victims(self, of_ranks: list[T]) -> list[T]:
        """Select the ranks that the fault kills from a list with one entry for each rank."""
        if self.kind in ("all", *DAMAGE):
            return of_ranks
        return [of_ranks[self.rank]]


def draw(rng: random.Random, only: tuple[str, ...] = tuple(KINDS)) -> list[Fault]:
    """Draw the next fault; for "again", the same fault several times."""
    kind = rng.choices(only, [KINDS[k][0] for k in only])[0]
    world = rng.choice([w for w in WORLDS if w > 1 or kind not in ("exchange", "hang")])
    common = {
        "world": world,
        "delay": rng.choice([-1, 1]) * rng.uniform(0.0, 0.6),
        "place": rng.random(),
        "patience": rng.choice([0.0, 0.0, 5.0]),
    }
    if kind in ("stop", "stop-kill"):
        common["delay"] = abs(common["delay"])
    if kind == "hang":
        # Not before the watchdogs know how long a step takes.
        rank, nth = rng.randrange(world), rng.randint(20, 30)
        return [Fault(kind, rank=rank, moment="before forward", nth=nth, **common)]
    if kind not in SELF and kind != "again":
        return [Fault(kind, rank=rng.randrange(world), **common)]
    group = kind if kind in SELF else rng.choice([k for k in SELF if k != "exchange" or world > 1])
    moment = rng.choice(SELF[group])
    nth = rng.randint(1, NTH[group])
    rank = 0 if moment in BY_RANK_0 else rng.randrange(world)
    times = rng.randint(2, 4) if kind == "again" else 1
    return [Fault(kind, rank=rank, moment=moment, nth=nth, **common)] * times
