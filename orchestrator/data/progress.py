"""One steady line for work that is measured in bytes: how far, how fast, how long still."""

import sys
import time

from orchestrator.text import duration

INTERVAL_S = 5.0  # between two lines where there is no terminal to rewrite one


class ProgressLine:
    """Call it with (stage, done, total) in bytes; a stage ends when done reaches total."""

    def __init__(self):
        self.stage, self.started, self.shown = "", 0.0, 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage, self.started, self.shown = stage, now, now
        terminal, ended = sys.stdout.isatty(), done >= total
        if not ended and now - self.shown < (0.2 if terminal else INTERVAL_S):
            return
        self.shown = now
        line = format_progress(stage, done, total, now - self.started)
        print(
            f"\r{line}\x1b[K" if terminal else line,
            end="" if terminal and not ended else "\n",
            flush=True,
        )


def format_progress(stage: str, done: int, total: int, seconds: float) -> str:
    """`tokenizing 512.0 of 1,024.0 MB | 50 % | 11.2 MB/s | ETA 46s`."""
    speed = done / seconds if seconds > 0 else 0.0
    share = done / total if total else 1.0
    parts = [
        f"{stage} {done / 1e6:,.1f} of {total / 1e6:,.1f} MB",
        f"{share:4.0%}",
        f"{speed / 1e6:.1f} MB/s",
    ]
    if speed and done < total:
        parts.append(f"ETA {duration((total - done) / speed)}")
    return " | ".join(parts)
