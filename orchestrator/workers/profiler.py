"""Profiles some steps of rank 0: a trace in the run folder, and an event with the largest costs.

What is computed does not depend on it.
"""

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from orchestrator import text
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder

if TYPE_CHECKING:
    from torch.profiler import profile

WARMUP_STEPS = 3  # not recorded: they allocate memory, compile, and choose kernels
ROWS = 10


class Profiler:
    """Records the first steps of this process after the warm-up. Use it as a context manager.

    The trace also has what happens between these steps, such as evaluations.

    Args:
        folder: Folder of the run.
        steps: Number of steps to record.
        report_phase: Gets each phase; see `Trainer`.
    """

    def __init__(
        self, folder: RunFolder, steps: int, report_phase: Callable[[str, int], None]
    ) -> None:
        self.folder = folder
        self.steps = steps
        self._report_phase = report_phase
        self._seen = 0  # steps that have begun
        self._step: int | None = None  # the last of them
        self._profile: profile | None = None
        self._writer: threading.Thread | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is None and self._seen > WARMUP_STEPS:
            assert self._profile is not None
            self._profile.stop()  # calls `_recorded`
        if self._writer is not None:
            self._writer.join()
        else:
            message = f"nothing was profiled: there were only {self._seen} steps, all of warm-up"
            events.note(self.folder, "profile", message)

    def report_phase(self, phase: str, step: int) -> None:
        """Pass on a phase. A step begins with its first phase "gradient"; each round has one."""
        if phase == "gradient" and step != self._step and self._writer is None:
            self._step = step
            if self._profile is None:
                self._profile = self._new_profile()
                self._profile.start()
            else:
                self._profile.step()
            self._seen += 1
        self._report_phase(phase, step)

    def _new_profile(self) -> "profile":
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it prints two lines to stderr
        import torch
        from torch.profiler import ProfilerActivity, profile, schedule

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_initialized():
            activities.append(ProfilerActivity.CUDA)
        return profile(
            activities=activities,
            schedule=schedule(wait=WARMUP_STEPS - 1, warmup=1, active=self.steps, repeat=1),
            on_trace_ready=self._recorded,
        )

    def _recorded(self, recorded: "profile") -> None:
        """Write the trace in a thread: the other ranks must not wait for it."""
        steps = min(self.steps, self._seen - WARMUP_STEPS)
        self._writer = threading.Thread(target=self._write, args=(recorded, steps))
        self._writer.start()

    def _write(self, recorded: "profile", steps: int) -> None:
        file = self.folder.trace_file
        message = f"profile of {steps} steps of rank 0: {file} (open it with ui.perfetto.dev)"
        try:
            file.parent.mkdir(exist_ok=True)
            temporary = file.with_name(f".{file.name}")  # its suffix says that it is packed
            recorded.export_chrome_trace(str(temporary))
            os.replace(temporary, file)
        except Exception as error:  # in a thread, it would only be printed
            message = f"{file}: not written: {getattr(error, 'strerror', None) or error}"
        events.note(self.folder, "profile", f"{message}\n{largest_costs(recorded)}")


def largest_costs(recorded: "profile") -> str:
    """Return a table of the operations with the largest time of their own."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    on_gpu = ProfilerActivity.CUDA in recorded.activities
    costs = {}
    for event in recorded.key_averages():
        # The kernels of a GPU are counted with the operations that start them.
        if event.device_type == DeviceType.CPU and not event.is_user_annotation:
            used = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            costs[event.key] = (used, event.count)
    total = sum(used for used, _ in costs.values()) or 1
    rows = [["operation", "calls", f"{'CUDA' if on_gpu else 'CPU'} ms", "share"]]
    for key, (used, count) in sorted(costs.items(), key=lambda cost: -cost[1][0])[:ROWS]:
        name = text.clip(key, 60)
        rows.append([name, f"{count:,}", f"{used / 1000:,.1f}", f"{used / total:.1%}"])
    return text.aligned(rows, left={0})
