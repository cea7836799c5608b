"""A progress line for work that is measured in bytes: share, speed, remaining time."""

import sys
import time

from orchestrator.text import duration

TERMINAL_INTERVAL_S = 0.2
FILE_INTERVAL_S = 5.0  # for output to a file, where each line stays


class ProgressLine:
    """Prints the progress; call it with (stage, bytes done, bytes in all)."""

    def __init__(self) -> None:
        self.stage = ""
        self.started = 0.0
        self.shown = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage != self.stage:
            self.stage = stage
            self.started = now
            self.shown = now
        terminal = sys.stdout.isatty()
        interval = TERMINAL_INTERVAL_S if terminal else FILE_INTERVAL_S
        ended = done >= total
        if not ended and now - self.shown < interval:
            return
        self.shown = now
        line = format_progress(stage, done, total, now - self.started)
        if terminal:
            line = f"\r{line}\x1b[K"
        print(line, end="" if terminal and not ended else "\n", flush=True)


def format_progress(stage: str, done: int, total: int, seconds: float) -> str:
    """Return `tokenizing 512.0 of 1,024.0 MB |  50% | 11.2 MB/s | ETA 46s`."""
    speed = done / seconds if seconds > 0 else 0.0
    share = done / total if total > 0 else 1.0
    line = (
        f"{stage} {done / 1e6:,.1f} of {total / 1e6:,.1f} MB | {share:4.0%} | "
        f"{speed / 1e6:.1f} MB/s"
    )
    if speed > 0 and done < total:
        line += f" | ETA {duration((total - done) / speed)}"
    return line
