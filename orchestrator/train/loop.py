"""The training loop: optimizer steps, log lines, evaluations, checkpoints.

Read `Trainer.run` first, then `Trainer._finish_step`.

The loop imports neither Ray nor MLflow. Ray Train, Ray Tune, torchrun and pytest run the same code.

Every step is reproducible to the last bit. The samples of step n are a function of (dataset, seed,
n), and each random draw is seeded with (seed, step, micro-batch). A checkpoint therefore holds the
weights, the optimizer moments and a few numbers, and a resumed run equals an uninterrupted one.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.config.experiment import Experiment
from orchestrator.config.steps import Steps
from orchestrator.data.batches import Batches, TokenStream, check_unchanged
from orchestrator.data.dataset import load_manifest
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal, Line
from orchestrator.train import nonfinite
from orchestrator.train.begin import begin, prove
from orchestrator.train.checkpointer import Checkpointer
from orchestrator.train.due import Due, read_last_line, rewind_journal
from orchestrator.train.evaluate import Evaluator, StopRequested
from orchestrator.train.meter import Metrics, log_metrics
from orchestrator.train.numerics import Worker, prepare_process, resolve_auto
from orchestrator.train.state import snapshot
from orchestrator.train.step import Step, ignore_phase, micro_batches


def train(
    experiment: Experiment, folder: RunFolder, dataset_dir: Path, worker: Worker | None = None
) -> int:
    """Train from the newest valid checkpoint, or from new weights, to `train.max_steps`.

    This is the entry without Ray: for tests, benchmarks and torchrun. A run on Ray uses `Trainer`
    directly, under a watchdog (`workers/worker.py`). Every rank calls this function with its own
    `worker`. With more than one rank, torch.distributed must be initialized. Only rank 0 writes,
    but for the parts of checkpoints.

    Returns:
        The number of steps done; `folder.read_ending()` tells why it is below `max_steps`.
    """
    trainer = Trainer(experiment, folder, dataset_dir, worker or Worker())
    for _ in trainer.run():
        pass
    return trainer.state.step


class Trainer:
    """Trains one run, or one stage of a sweep.

    Args:
        experiment: The configuration.
        folder: Folder of the run or stage. The trainer resumes from its checkpoints.
        dataset_dir: Folder of the token shards.
        worker: Rank, world size and device of this process.
        parent: Checkpoint to start from if `folder` has none. None: new weights, as
            `train.init_from` says.
        end_step: Last step to train. None: `train.max_steps`. A smaller value is the end of a
            stage, not of the run, and adds no end-of-run evaluation.
        steps: Settings of every step. None: the configured ones.
        stop_requested: Returns True on rank 0 once the run should stop, and False on other ranks.
            Either all ranks or none pass a function.
        report_phase: Called on every rank with (phase, step) when a phase of the step starts. The
            watchdog uses it to find a rank that hangs.

    Raises:
        UserError: As `begin` says.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        dataset_dir: Path,
        worker: Worker,
        *,
        parent: Path | None = None,
        end_step: int | None = None,
        steps: Steps | None = None,
        stop_requested: Callable[[], bool] | None = None,
        report_phase: Callable[[str, int], None] | None = None,
    ) -> None:
        # First of all: a reused Ray process has the threads, seeds and flags of its last stage.
        prepare_process(experiment, worker)
        experiment = resolve_auto(experiment, folder, worker)
        config = experiment.train
        self.experiment = experiment
        self.folder = folder
        self.worker = worker
        self.end_step = config.max_steps if end_step is None else end_step
        self.steps = steps or experiment.steps()
        self.report_phase = report_phase or ignore_phase

        self.dataset = load_manifest(dataset_dir)
        tokenizer = load_tokenizer(experiment.data.tokenizer, dataset_dir)
        self.streams = {s: TokenStream(dataset_dir, s, self.dataset) for s in ("train", "val")}
        self.batches = Batches(
            self.streams["train"],
            experiment.model.block_size,
            self.steps.batch_sizes,
            config.micro_batch_size,
            config.seed,
        )

        self.start = begin(
            experiment, folder, tokenizer.n_vocab, self.batches, worker, self.steps, parent
        )
        self.state = self.start.state
        self.step = Step(experiment, self.state, self.steps, stop_requested, self.report_phase)
        self.guard = nonfinite.Guard(folder, config, self.batches, worker.is_main)
        self.journal = Journal(folder)
        self.checkpointer = Checkpointer(folder, config.keep, self.journal, worker)
        self.evaluator: Evaluator | None = None
        if config.eval_interval is not None:
            self.evaluator = Evaluator(
                experiment,
                folder,
                self.streams,
                tokenizer,
                worker,
                stop_requested,
                self.report_phase,
            )
        if worker.is_main:
            rewind_journal(self.journal, self.state, config, self.end_step)

    def run(self) -> Iterator[Line]:
        """Train to `end_step`. Yield each journal line after it was written.

        All ranks yield at the same steps, so a caller can end all of them at the same line.

        Raises:
            UserError: The disk is full at the end, or a token shard was changed.
        """
        state = self.state
        batches = micro_batches(self.batches, state.gradients, range(state.step, self.end_step))
        # On exit, the checkpointer waits until the last checkpoint is on disk.
        with self.checkpointer, contextlib.closing(batches):
            try:
                # Start or resume. After a resume, the journal already has the line of this step,
                # unless a stop request came before it was measured (`line_due`).
                if state.step == 0 or state.line_due:
                    yield from self._finish_step()
                elif state.step == self.end_step:
                    yield from self._finish_without_steps()

                while state.step < self.end_step:
                    # Forward and backward of all micro-batches, then the sum over all ranks.
                    gradient = self.step.gradient(batches)

                    # A loss or gradient that is not finite is skipped, or ends the run.
                    verdict = self.guard.judge(state, gradient)
                    if verdict == nonfinite.STOP:
                        break
                    if verdict == nonfinite.APPLY:
                        state.grad_norm = gradient.norm
                        self.step.update(self.steps(state.step))
                        state.meter.add(gradient.losses)
                    else:
                        self.step.skip()
                        state.meter.add([])

                    # A stop request travels with the gradient of rank 0, so that all ranks stop
                    # after the same step. The resumed run then evaluates and writes the line, as
                    # there may be only seconds left.
                    state.line_due = self._due().line
                    if gradient.stop:
                        raise StopRequested
                    yield from self._finish_step()
            except StopRequested:
                self._save_and_stop()
            except (IndexError, RuntimeError):  # as for a token that is not in the vocabulary
                check_unchanged(self.streams.values())
                raise
            self.journal.close()

    def _finish_step(self) -> Iterator[Line]:
        """Evaluate, log and checkpoint if they are due after the current step."""
        state = self.state
        due = self._due()

        # Evaluate before the log window is emptied: if a stop request ends the evaluation, the
        # checkpoint still has the whole window.
        metrics: Metrics = {}
        if due.evaluate or due.end_of_run:
            metrics = self._evaluate(update_best=due.evaluate)
        if due.log or due.end_of_run:
            metrics = self._log_metrics(empty_window=due.log) | metrics
        state.line_due = False
        if metrics:
            yield self._write_line(metrics)

        if due.end_of_run and not self.guard.accept_end(state, metrics.get("val/loss")):
            return

        # The checkpoint comes after the line. In the other order, a run killed between the two
        # would resume at this step and never write its line.
        if due.checkpoint or state.step == self.end_step:
            self._save_checkpoint(metrics)

    def _save_checkpoint(self, metrics: Metrics) -> None:
        """Copy the state; a thread of each rank writes it. `metrics` are of the current step."""
        check_unchanged(self.streams.values())
        state = self.state
        state.meter.lap("rest")
        self.report_phase("checkpoint", state.step)
        proof = prove(self.step, self.batches, self.worker)
        parts = snapshot(state, self.experiment, self.dataset, self.worker, metrics, proof)
        self.checkpointer.save(state.step, *parts)
        state.meter.lap("checkpoint")

    def _save_and_stop(self) -> None:
        """Save a checkpoint of the current step and record that the run should be started again."""
        step = self.state.step
        if step > 0:
            self._save_checkpoint({})
        if self.worker.is_main:
            self.checkpointer.wait()
            ending = Ending("again", f"asked to stop after step {step}", {"step": step})
            self.folder.write_ending(ending)

    def _finish_without_steps(self) -> Iterator[Line]:
        """Complete a run or stage that starts at its last step."""
        if self._due().end_of_run:
            yield from self._complete_last_line()
            line = read_last_line(self.folder, self.end_step, self.worker)
            if not self.guard.accept_end(self.state, line.metrics.get("val/loss")):
                return
        # A stage that starts from the checkpoint of its parent needs one in its own folder.
        if not self.start.is_own:
            self._save_checkpoint({})

    # ---- one journal line ----

    def _due(self) -> Due:
        return Due.after(self.state.step, self.end_step, self.experiment.train)

    def _evaluate(self, *, update_best: bool) -> Metrics:
        """Evaluate `val` and `train` on all ranks; empty if evaluation is off.

        Args:
            update_best: False if only the end of the run requires the evaluation; see `due`.

        Raises:
            StopRequested: The run should stop. Nothing was measured.
        """
        if self.evaluator is None:
            return {}
        best_before = self.state.best_val_loss
        self.state.meter.lap("rest")
        metrics = self.evaluator.measure(self.state)
        self.state.meter.lap("evaluation")
        if not update_best:
            self.state.best_val_loss = best_before
        return metrics

    def _log_metrics(self, *, empty_window: bool) -> Metrics:
        """Return loss, speed and memory since the last log line.

        Args:
            empty_window: False for a line that only the end of the run requires; see `due`.
        """
        window = self.state.meter.losses
        metrics = log_metrics(
            self.state,
            self.experiment,
            self.worker,
            epoch=self.batches.epoch(self.state.step),
            steps=self.steps,
        )
        if not empty_window:
            self.state.meter.losses = window
        return metrics

    def _write_line(self, metrics: Metrics) -> Line:
        """Append the line of the current step on rank 0; return it on every rank."""
        check_unchanged(self.streams.values())
        if self.worker.is_main:
            return self.journal.append(self.state.step, metrics)
        return {"step": self.state.step, **metrics}

    def _complete_last_line(self) -> Iterator[Line]:
        """Add the metrics that the end of a run requires to the line of the last step."""
        line = read_last_line(self.folder, self.end_step, self.worker)
        added: Metrics = {}
        if line.needs_evaluation:
            added = self._evaluate(update_best=False)
        if line.needs_log:
            added = self._log_metrics(empty_window=False) | added
        if not added:
            return
        if self.worker.is_main:
            self.journal.rewind(self.end_step - 1)
        yield self._write_line(line.metrics | added)
