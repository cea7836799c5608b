"""The training loop. Knows no Ray: runs the same under Ray Train, torchrun or pytest.

Eats an experiment, a run's folder, a dataset's folder and this process's place among the workers; yields checkpoints,
lines in the journal and samples of text in the run's folder. Every draw is keyed by (seed, step, micro-batch) and the
order of samples is a function of the step, so the whole state of a run is weights, moments and a few numbers.

Legend: B sequences per micro-batch, T tokens per sequence, M micro-batches per step over all workers.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.flops import mfu
from model.schedule import learning_rate
from orchestrator.config.experiment import Experiment
from orchestrator.data.batches import Batches, Prefetcher, TokenStream
from orchestrator.data.dataset import load_manifest
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.runs import journal
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.train import begin as resume
from orchestrator.train import nonfinite, state
from orchestrator.train.checkpointer import Writer
from orchestrator.train.evaluate import AbandonedError
from orchestrator.train.evaluator import Evaluator
from orchestrator.train.meter import memory_metrics
from orchestrator.train.numerics import Worker, agree, autocast, device_name, prepare_process
from orchestrator.train.step import Gradient, Step


def train(experiment: Experiment, run_dir: Path, data_dir: Path, worker: Worker = Worker()) -> int:  # noqa: B008
    """Train from the latest valid checkpoint, or from nothing, to `train.max_steps`.

    Every worker calls it with the same arguments and its own `worker`; where there are several, torch.distributed is
    initialised. Only rank 0 writes.

    Returns:
        The number of steps done: below max_steps only if the run stopped itself, which `stopped.json` explains.
    """
    run = Run(experiment, run_dir, data_dir, worker)
    for _ in run:
        pass
    return run.state.step


class Run:
    """The steps of one run, or a stretch of them: iterating trains, and yields each line of the journal as it is written.

    Args:
        run_dir, data_dir: folders of the run (or of the stage of a sweep) and of its tokens.
        parent: a checkpoint to begin from where the folder has none of its own; None: the experiment's first weights.
        stop: the step to end at. Below `train.max_steps` the end is one that a longer run only passes.
        rates: learning rate of each step; None: the experiment's schedule.
        stop_asked: on rank 0, whether the run is to stop; all workers then stop after one and the same step, with a
            checkpoint of it, and `stopped.json` says so. None: nobody ever asks.
        beat: told, on every worker, when it enters another phase of a step.
    """

    def __init__(
        self,
        experiment: Experiment,
        run_dir: Path,
        data_dir: Path,
        worker: Worker,
        *,
        parent: Path | None = None,
        stop: int | None = None,
        rates: Callable[[int], float] | None = None,
        stop_asked: Callable[[], bool] | None = None,
        beat: Callable[[str, int], None] = lambda phase, step: None,
    ):
        prepare_process(experiment, worker)
        self.experiment, self.run_dir, self.worker = experiment, Path(run_dir), worker
        self.stop = experiment.train.max_steps if stop is None else stop
        self.is_whole = self.stop == experiment.train.max_steps
        self.rates = rates or functools.partial(learning_rate, experiment.lr_schedule())
        self.device, self.autocast = (
            torch.device(worker.device),
            autocast(experiment, worker.device),
        )
        self.dataset, self.tokenizer = (
            load_manifest(data_dir),
            load_tokenizer(experiment.data.tokenizer, data_dir),
        )
        t, m = experiment.train, experiment.model
        self.streams = {split: TokenStream(data_dir, split) for split in ("train", "val")}
        self.batches = Batches(
            self.streams["train"], m.block_size, t.global_batch_size, t.micro_batch_size, t.seed
        )
        self.journal, self.stop_asked, self.beat = Journal(run_dir), stop_asked, beat
        self.guard = nonfinite.Guard(self.run_dir, t, self.batches, worker.is_main)
        begin = resume.begin(experiment, self.run_dir, self.tokenizer.n_vocab, worker, parent)
        self.state, self.is_own = begin.state, begin.is_own
        if worker.is_main:
            self._rewind(begin.is_restored)
        self.evaluator = (
            Evaluator(
                experiment,
                self.run_dir,
                self.streams,
                self.tokenizer,
                worker,
                self._goes_on,
                self._waiting,
            )
            if t.eval_interval
            else None
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with Writer(
            self.run_dir / "checkpoints", self.experiment.train.keep, self.run_dir
        ) as self.writer:
            # However the steps end, what was saved is committed then.
            yield from self._steps()
            self.journal.close()

    def _steps(self) -> Iterator[dict[str, Any]]:
        s = self.state
        begun_at, step = (
            s.step,
            Step(self.experiment, s, self.stop_asked or (lambda: False), self.beat),
        )
        try:
            if s.step == 0:
                yield from self._write(
                    self._measure(log=False, evaluate=self.evaluator is not None)
                )
            elif s.line_due:
                yield from self._after_step()
            with contextlib.closing(self._prefetch()) as batches:
                while s.step < self.stop:
                    gradient = step.gradient(batches)
                    if not self._apply(step, gradient):
                        return
                    yield from self._after_step(gradient.stop)
            if begun_at == self.stop and self.is_whole:
                yield from self._end_late()
            if begun_at == self.stop and not self.is_own:
                self._checkpoint({})
        except AbandonedError:
            self._stop_as_asked()

    def _apply(self, step: Step, gradient: Gradient) -> bool:
        """Update the weights, or leave that out where something is not finite; False where the run ends by it."""
        s, verdict = self.state, self.guard.judge(self.state, gradient)
        if verdict == nonfinite.STOP:
            return False
        if verdict == nonfinite.SKIP:
            step.skip()
        else:
            s.grad_norm = gradient.norm
            step.update(self.rates(s.step))
        if not self.experiment.train.log_interval:
            s.meter.losses.clear()  # nobody looks before the end, and the window would grow with the run
        s.meter.add(gradient.losses if verdict == nonfinite.APPLY else [])
        return True

    def _rewind(self, restored: bool) -> None:
        """The journal as it was at the checkpoint; a line written for an end that now is none keeps what was due."""
        s, t = self.state, self.experiment.train
        ended = self.is_whole and s.step == self.stop
        if not restored or s.line_due:
            self.journal.rewind(s.step - 1)
            return
        self.journal.rewind(
            s.step,
            None
            if ended
            else lambda line: journal.by_interval(line, t.log_interval, t.eval_interval),
        )

    def _prefetch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's micro-batches from the current step on, read and pinned in the background."""

        def fetch(item: tuple[int, int]) -> tuple[Tensor, Tensor]:
            arrays = (torch.from_numpy(a) for a in self.batches.micro_batch(*item))
            return tuple(a.pin_memory() if self.device.type == "cuda" else a for a in arrays)

        mine = [m for slot in self.state.gradients.my_slots() for m in slot]
        items = ((step, m) for step in range(self.state.step, self.stop) for m in mine)
        prefetcher = Prefetcher(fetch, items)
        try:
            for inputs, targets in prefetcher:
                yield (
                    inputs.to(self.device, non_blocking=True),
                    targets.to(self.device, non_blocking=True),
                )
        finally:
            prefetcher.close()

    def _after_step(self, stop: bool = False) -> Iterator[dict[str, Any]]:
        """Log, evaluate and checkpoint where they are due; the line is in the journal before the checkpoint is.

        Args:
            stop: a worker asked to stop here: what is due is left to the next start, which has the time.
        """
        s, t = self.state, self.experiment.train
        ends = s.step == self.stop

        def due(interval: int | None) -> bool:
            return bool(interval) and s.step % interval == 0

        s.line_due = due(t.log_interval) or due(t.eval_interval) or (ends and self.is_whole)
        if stop:
            raise AbandonedError
        window = s.meter.losses
        try:
            metrics = self._measure(due(t.log_interval), due(t.eval_interval))
            if ends and self.is_whole:
                metrics |= self._ending(*self._lacks(metrics))
        except AbandonedError:
            s.meter.losses = window  # the line is written by the next start
            raise
        s.line_due = False
        yield from self._write(metrics)
        if ends or due(t.checkpoint_interval):
            s.meter.lap("rest")
            self._checkpoint({k: v for k, v in metrics.items() if k.startswith("val/")})
            s.meter.lap("checkpoint")

    def _stop_as_asked(self) -> None:
        """A checkpoint of this step, and the word that it was not the run's own end."""
        if self.state.step:
            self._checkpoint({})
        if self.worker.is_main:
            self.writer.wait()
            step = self.state.step
            ending = Ending("again", f"asked to stop after step {step}", {"step": step})
            RunFolder(self.run_dir).write_ending(ending)

    def _lacks(self, line: dict[str, float]) -> tuple[bool, bool]:
        """Whether the last line of a run still needs the training window, and the evaluation."""
        return "train/loss" not in line, self.evaluator is not None and "val/loss" not in line

    def _ending(self, log: bool, evaluate: bool) -> dict[str, float]:
        """What the last line of a run has besides what is due by the intervals.

        The state stays that of a run that goes on: grown, or with others branching off, it must not show that one ended here.
        """
        going_on = self.state.meter.losses, self.state.best_val_loss
        try:
            return self._measure(log, evaluate)
        finally:
            self.state.meter.losses, self.state.best_val_loss = going_on

    def _end_late(self) -> Iterator[dict[str, Any]]:
        """The ending of a run whose last step was made before it was known to be the last."""
        lines = journal.read(self.run_dir) if self.worker.is_main else []
        line = lines[-1] if lines and lines[-1]["step"] == self.stop else {}
        log, evaluate = divmod(
            agree(
                sum(n * lack for n, lack in zip((2, 1), self._lacks(line), strict=True)),
                self.worker,
            ),
            2,
        )
        if log or evaluate:
            metrics = {k: v for k, v in line.items() if k not in ("step", "timestamp")}
            metrics |= self._ending(bool(log), bool(evaluate))
            if self.worker.is_main:
                self.journal.rewind(self.stop - 1)
            yield from self._write(metrics)

    def _measure(self, log: bool, evaluate: bool) -> dict[str, float]:
        """The metrics of this step's line: the training window's, the evaluation's, both or none."""
        metrics: dict[str, float] = {}
        if log:
            self.state.meter.lap("rest")
            metrics |= self._training_metrics()
        if evaluate:
            self.state.meter.lap("rest")
            metrics |= self.evaluator.measure(self.state)
            self.state.meter.lap("evaluation")
        return metrics

    def _write(self, metrics: dict[str, float]) -> Iterator[dict[str, Any]]:
        """Rank 0 appends the line; every worker yields it."""
        if metrics and self.worker.is_main:
            yield self.journal.append(self.state.step, metrics)
        elif metrics:
            yield {"step": self.state.step, **metrics}

    def _training_metrics(self) -> dict[str, float]:
        s, e, w = self.state, self.experiment, self.worker
        metrics = s.meter.flush(e.tokens_per_step)
        metrics |= {
            "train/tokens": s.step * e.tokens_per_step,
            "train/epoch": self.batches.epoch(s.step),
            "optim/lr": self.rates(s.step - 1),
            "optim/grad_norm": s.grad_norm,
            "run/attempt": w.attempt,
        }
        if s.skipped:
            metrics["train/skipped_steps"] = s.skipped
        if s.scaler.is_enabled():
            metrics["optim/loss_scale"] = s.scaler.get_scale()
        utilisation = mfu(
            metrics.get("perf/tokens_per_sec", 0.0),
            s.model.config,
            device_name(w.device),
            e.train.dtype,
            w.world_size,
        )
        return (
            metrics
            | ({} if utilisation is None else {"perf/mfu": utilisation})
            | memory_metrics(w.device)
        )

    def _goes_on(self) -> bool:
        """Whether an evaluation may take its next batch, agreed on by all workers."""
        with self._waiting():
            return self.stop_asked is None or not agree(int(self.stop_asked()), self.worker)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Where an evaluation waits for the other workers: who hangs there hangs for one of them."""
        self.beat("agreement", self.state.step)
        yield
        self.beat("evaluation", self.state.step)

    def _checkpoint(self, metrics: dict[str, float]) -> None:
        self.beat("checkpoint", self.state.step)
        if not self.worker.is_main:
            return
        if (
            no_room := self.journal.catch_up()
        ):  # a kill behind a checkpoint would lose for ever what only memory holds
            self.writer.leave_out(self.state.step, no_room)
        else:
            self.writer.save(
                self.state.step,
                *state.snapshot(self.state, self.experiment, self.dataset, self.worker, metrics),
            )
