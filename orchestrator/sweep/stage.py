"""One stage of a sweep, run in its folder `stages/<id>/`. Knows no Ray and no tree.

    stage.json     what to run: experiment, rates, steps [start, stop), the checkpoint to begin from
    metrics.jsonl, checkpoints/, samples/    as in a run's folder, for these steps alone
    stopped.json   with "again": it was asked to stop, left a checkpoint of that very step, and goes on from it
    result.json    how it ended, written last: with it the stage is done and is never run again

A stage is a stretch of a run (`train.loop.Trainer`), so whatever interrupts it, it goes on from its own last checkpoint.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.errors import UserError
from orchestrator.files import read_json, write_atomically
from orchestrator.runs import journal, lock
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep.tree import Trial
from orchestrator.train import rates
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker, fingerprint
from orchestrator.workers.marks import HELD
from orchestrator.workers.watchdog import Watchdog

DONE, DIVERGED, STOPPED = "done", "diverged", "stopped"
WRITER_WAIT_S = 60


@dataclass(frozen=True)
class Order:
    """stage.json. `parent`: the folder whose lines come before this stage's; `begin`: the checkpoint, both absolute."""

    id: str
    root: str
    start: int
    stop: int
    experiment: dict[str, Any]
    rates: dict[str, Any]
    data_dir: str
    parent: str | None = None
    begin: str | None = None
    diverged_above: float | None = None

    def write(self, folder: Path) -> None:
        """Another stage's folder is named from this one: the whole sweep may be moved."""
        stored = asdict(self)
        if self.parent and Path(self.parent).parent == folder.parent:
            stored["parent"] = f"../{Path(self.parent).name}"
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "stage.json", json.dumps(stored, indent=1))


def read_order(folder: Path) -> Order | None:
    stored = read_json(folder / "stage.json")
    if stored and stored["parent"] and stored["parent"].startswith("../"):
        stored["parent"] = str(folder.parent / stored["parent"][3:])
    return Order(**stored) if stored else None


def run_stage(
    folder: Path, worker: Worker, stop_asked: Callable[[], bool] | None = None
) -> Iterator[dict[str, Any]]:
    """Run the stage of `folder` to its end, watched; yields each line of its journal, on every worker alike.

    Every worker calls it, with torch.distributed initialised where there are several. Ends without a line where the
    stage has its result, and without a result where it was asked to stop. An exception leaves the folder as it is, to go
    on in.

    Args:
        stop_asked: as `train.loop.Trainer`'s.
    """
    order, started = read_order(folder), time.monotonic()
    experiment = parse_experiment(order.experiment, f"{folder}/stage.json")
    if has_result(folder, order, experiment):
        return
    # The worker of a driver that was killed may live a little longer than it: nobody writes beside it.
    writing = (
        lock.held(RunFolder(folder).writer_lock, WRITER_WAIT_S)
        if worker.is_main
        else contextlib.nullcontext()
    )
    with writing, Watchdog(RunFolder(folder), worker, experiment.compute.hang_after_s) as dog:
        if worker.is_main:
            for stale in (folder / "stopped.json", folder / "result.json"):
                stale.unlink(missing_ok=True)
        if worker.is_main and order.start == order.stop:
            _take_over_line(folder, order)
        run = Trainer(
            experiment,
            RunFolder(folder),
            Path(order.data_dir),
            worker,
            parent=Path(order.begin) if order.begin else None,
            end_step=order.stop,
            lr_at=rates.from_json(order.rates),
            stop_requested=stop_asked,
            report_phase=dog.report_phase,
        )
        begun_at, limit, above = run.state.step, order.diverged_above, None
        for line in run.run():
            dog.report_phase(HELD, run.state.step)
            yield line
            loss = line.get("train/loss", 0.0)
            # An end's own line has another window than that of the trials that go on: it decides nothing.
            if (
                limit
                and loss > limit
                and line["step"] % (experiment.train.log_interval or order.stop) == 0
            ):
                above = (
                    line["step"],
                    f"step {line['step']}: train/loss {loss:.4f} is above sweep.diverged_above={limit:g}",
                )
                break
        if worker.is_main:
            facts = {"seconds": time.monotonic() - started, "steps_run": run.state.step - begun_at}
            stopped = read_json(folder / "stopped.json") or {}
            if stopped.get("again"):
                write_atomically(folder / "stopped.json", json.dumps(stopped | facts, indent=1))
                return
            if stopped:  # the loss of the next step was not finite, on every worker
                above = run.state.step + 1, stopped["reason"]
            step, reason = above or (order.stop, None)
            facts |= {"reason": reason, "numerics": fingerprint(experiment, worker)}
            _write_result(folder, order, experiment, step, DIVERGED if reason else DONE, facts)


def note_stop(folder: Path, reason: str) -> dict[str, Any]:
    """result.json of a stage that a scheduler ended at its last line."""
    order, own = read_order(folder), journal.read(RunFolder(folder))
    step = own[-1]["step"] if own else order.start
    result = {
        "id": order.id,
        "start": order.start,
        "stop": order.stop,
        "step": order.stop,
        "outcome": STOPPED,
        "key": order.id,
        "is_whole": False,
        "limit": None,
        "weights_sha256": None,
        "reason": f"{reason} after step {step}",
        "seconds": 0.0,
        "steps_run": step - order.start,
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=1))
    return result


def _take_over_line(folder: Path, order: Order) -> None:
    """Of a stage without steps, which only ends a trial where another folder's state stands: the line of its step."""
    if not journal.read(RunFolder(folder)):
        for line in lines(Path(order.parent), order.stop):
            if line["step"] == order.stop:
                journal.Journal(RunFolder(folder)).write(line)


def has_result(folder: Path, order: Order, experiment: Experiment) -> bool:
    """Whether the stage needs no run: it is done, also as an end if it is one now, or diverged below today's limit."""
    result = read_json(folder / "result.json")
    if not result or result["outcome"] == STOPPED:
        return False
    if result["outcome"] == DIVERGED:
        return result["limit"] is None or result["limit"] == order.diverged_above
    if not result["is_whole"] and order.stop == experiment.train.max_steps:
        return False
    try:
        checkpoint.verify(checkpoint.path_of(folder / "checkpoints", order.stop))
    except UserError:  # removed or damaged, and needed again
        return False
    return True


def _write_result(
    folder: Path,
    order: Order,
    experiment: Experiment,
    step: int,
    outcome: str,
    facts: dict[str, Any],
) -> None:
    """result.json, and of a stage that others only begin from, its end as the only checkpoint."""
    is_whole = outcome == DONE and order.stop == experiment.train.max_steps
    checkpoints = folder / "checkpoints"
    if outcome == DONE and not is_whole:
        checkpoint.keep_only(checkpoints, step)
    by_loss = outcome == DIVERGED and not (folder / "stopped.json").exists()
    weights = (
        checkpoint.load_tensors(checkpoint.path_of(checkpoints, step), "model")
        if is_whole
        else None
    )
    result = {
        "id": order.id,
        "start": order.start,
        "stop": order.stop,
        "step": step,
        "outcome": outcome,
        # What it proves is about the state after `step` updates, whatever stages a later plan has.
        "key": Trial("", order.root, rates.from_json(order.rates).first(step)).key(step),
        "is_whole": is_whole,
        "limit": order.diverged_above if by_loss else None,
        "weights_sha256": checkpoint.weights_sha256(weights) if weights else None,
        **facts,
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=1))


def lines(folder: Path, upto: int | None = None) -> list[dict[str, Any]]:
    """The curve from step 0 through this stage: its ancestors' lines and its own.

    Args:
        folder: of a stage, or of a run that a sweep branches off.
        upto: the folder's own lines up to this step, as a run that goes on there has them; None: all.
    """
    order, own = read_order(folder), journal.read(RunFolder(folder))
    if upto is not None:
        t = (
            parse_experiment(order.experiment, str(folder))
            if order
            else RunFolder(folder).read_experiment()
        ).train
        here = [
            journal.by_interval(line, t.log_interval, t.eval_interval)
            for line in own
            if line["step"] == upto
        ]
        own = [line for line in own if line["step"] < upto] + [line for line in here if line]
    if order is None or order.parent is None:
        return own
    before = lines(Path(order.parent), order.start)
    return [line for line in before if not own or line["step"] < own[0]["step"]] + own
