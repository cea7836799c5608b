"""Runs the tasks of a preparation on Ray or on this machine, and prints how far they are."""

import contextlib
import functools
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
)
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from orchestrator.cluster import connection, nodes
from orchestrator.cluster.lookout import WAIT_S, Lookout
from orchestrator.data import tasks
from orchestrator.data.input.download import Progress
from orchestrator.data.tasks import Job
from orchestrator.errors import NO_ROOM, NOT_WRITABLE, NoRoomError, UnreadableError, UserError
from orchestrator.hashes import hash_here
from orchestrator.machine import available_cpus
from orchestrator.text import duration

Row = dict[str, str]  # JSON of a job, or of its result
MAX_CHUNK_BYTES = 32 << 20  # of a task
# A CPU tokenizes this in less than a minute.
SMALL_BYTES = 2 << 30
PROCESS_BYTES = 64 << 20  # a process starts in less time than it takes to tokenize this
TERMINAL_INTERVAL_S = 0.2
FILE_INTERVAL_S = 5.0  # for output to a file, where each line stays


class RayTasks:
    """Runs tasks on the Ray of this process or of $RAY_ADDRESS, else on a temporary local Ray.

    The temporary Ray starts when it is needed first.

    Args:
        progress: Called with (stage, bytes done, bytes in all); None prints a line.
        wait_s: Longest wait for a node with a CPU.
    """

    is_ours = False

    def __init__(self, progress: Progress | None = None, wait_s: float = WAIT_S) -> None:
        self.progress = progress or ProgressLine()
        self.wait_s = wait_s

    def __enter__(self) -> "RayTasks":
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_ours and connection.failure() is None:
            import ray

            ray.shutdown()

    def _connect(self) -> None:
        # `connect` checks variables before it imports Ray.
        was_connected = "ray" in sys.modules and sys.modules["ray"].is_initialized()
        connection.connect()
        self.is_ours |= not was_connected

    def check_shared(self, folder: Path) -> None:
        """Raise UserError if a node of the cluster does not share a folder."""
        self._connect()
        nodes.check_shared(folder)

    def cpus(self) -> int:
        """Return the number of CPUs; 1 if a cluster that grows has none yet."""
        self._connect()
        import ray

        return int(ray.cluster_resources().get("CPU", 0)) or 1

    def hash_files(self, paths: list[str]) -> list[str]:
        """Return the SHA-256 of files; if they are very large, tasks on Ray read them."""
        jobs: list[Job] = []
        sizes: list[int] = []
        for path in paths:
            if not sizes or sizes[-1] >= MAX_CHUNK_BYTES:
                jobs.append({"paths": []})
                sizes.append(0)
            jobs[-1]["paths"].append(path)
            sizes[-1] += os.path.getsize(path)
        if sum(sizes) > SMALL_BYTES // 4:
            print(f"hashing the corpus, {sum(sizes) / 1e6:,.0f} MB", flush=True)
        if sum(sizes) <= 8 * SMALL_BYTES:  # hashing is ten times as fast as tokenizing
            return hash_here(paths)
        return list(itertools.chain(*self.map("hashing", tasks.hash_files, jobs, sizes)))

    def map(
        self,
        stage: str,
        task: Callable[..., Any],
        jobs: list[Job],
        sizes: list[int],
        *,
        here: bool = False,
        threads: bool = False,
    ) -> list[Any]:
        """Run `task(**job)` for each job, and return the results in the order of the jobs.

        Jobs and results are passed as JSON, because Arrow would guess a type for each field.

        Args:
            stage: Name of the work, for the progress.
            task: A function at the top level of a module.
            jobs: Arguments of each call.
            sizes: Bytes of each job.
            here: Run the tasks on this machine, without Ray.
            threads: The tasks are few, or do not hold the lock of Python: threads are enough.

        Raises:
            UserError: A task raised it, or a file of the corpus cannot be opened.
            NoRoomError: The disk is full.
            UnreadableError: A process was killed, or no node had a CPU for too long.
        """
        results = [None] * len(jobs)
        done = 0
        total = sum(sizes)
        self.progress(stage, done, total)
        rows = [{"job": to_json([number, job])} for number, job in enumerate(jobs)]
        run = functools.partial(_run_job, task, os.environ.get("TIKTOKEN_CACHE_DIR"))
        processes = 1 if threads else min(available_cpus(), total // PROCESS_BYTES)
        found = _run_here(run, rows, processes) if here else self.run_rows(run, rows)
        with contextlib.closing(found):
            for row in found:
                number, result, error, is_full = json.loads(row["result"])
                if error is not None:
                    raise NoRoomError(error) if is_full else UserError(error)
                results[number] = result
                done += sizes[number]
                self.progress(stage, done, total)
        return results

    def run_rows(self, run: Callable[[Row], Row], rows: list[Row]) -> Generator[Row, None, None]:
        """Run a function on small rows with Ray Data, one task per row."""
        self._connect()
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # This logger warns that no progress bars are shown.
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run)
        with (
            contextlib.closing(iter(dataset.iter_rows())) as found,
            Lookout(self.wait_s) as lookout,
        ):
            try:
                for row in found:
                    lookout.task_ended()
                    yield row
            except KeyboardInterrupt:
                if lookout.error is not None:
                    raise lookout.error from None
                raise


def _run_here(
    run: Callable[[Row], Row], rows: list[Row], processes: int
) -> Generator[Row, None, None]:
    """Run a function on rows in several processes, or in threads of this one."""
    others = multiprocessing.active_children()
    futures: list[Future[Row]] = []
    with contextlib.ExitStack() as stack:
        stack.callback(tasks.interrupted.clear)  # when the threads have ended
        executor = stack.enter_context(_executor(processes))
        try:
            # The processes inherit the mask: Ctrl-C ends only the driver, and then they end.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                for row in rows:
                    futures.append(executor.submit(run, row))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise UnreadableError(
                "data.corpus: a process that read it was killed, perhaps because there was too "
                "little memory; the same command goes on from there"
            ) from None
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            if not all(future.done() for future in futures):
                tasks.interrupted.set()
                for process in multiprocessing.active_children():
                    if process not in others:
                        process.kill()


def _executor(processes: int) -> Executor:
    if processes < 2:
        return ThreadPoolExecutor(available_cpus())
    # Forked processes could inherit a lock that another thread holds.
    new = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, new, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this process when its parent has ended: a killed parent cannot do it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _run_job(task: Callable[..., Any], tiktoken_cache: str | None, row: Row) -> Row:
    if tiktoken_cache is not None:
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", tiktoken_cache)
    number, job = json.loads(row["job"])
    result = error = None
    is_full = False
    try:
        result = task(**job)
    except (UserError, PermissionError, FileNotFoundError) as raised:
        # Returned, not raised: Ray wraps exceptions and runs some tasks again.
        error = str(raised)
    except OSError as raised:
        if raised.errno not in NOT_WRITABLE:
            raise
        what, advice = NOT_WRITABLE[raised.errno]
        error = f"{what}: {raised}. {advice} and run the same command again"
        is_full = raised.errno in NO_ROOM
    return {"result": to_json([number, result, error, is_full])}


def to_json(content: list[Any]) -> str:
    """Return JSON in which a dataclass is a dict."""
    return json.dumps(content, default=vars)


# ---- progress ----


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
