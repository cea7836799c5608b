"""The training loop. Knows no Ray: runs the same under Ray Train, torchrun or pytest.

Eats an experiment, a run's folder, a dataset's folder and this process's place among the workers; yields checkpoints,
lines in the journal and samples of text in the run's folder. Every draw is keyed by (seed, step, micro-batch) and the
order of samples is a function of the step, so the whole state of a run is weights, moments and a few numbers.

Legend: B sequences per micro-batch, T tokens per sequence, M micro-batches per step over all workers.
"""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.flops import mfu
from model.generate import generate
from model.schedule import learning_rate
from orchestrator import checkpoint, events, journal, state
from orchestrator.batches import Batches, Prefetcher, TokenStream, eval_batches
from orchestrator.config import Experiment
from orchestrator.evaluation import EvalSet
from orchestrator.init_from import initial_model
from orchestrator.journal import Journal
from orchestrator.manifest import load_manifest
from orchestrator.meter import memory_metrics
from orchestrator.numerics import Worker, autocast, device_name, keyed_seed, prepare_process
from orchestrator.step import Step
from orchestrator.tokenizer import load_tokenizer
from orchestrator.writer import Writer

SAMPLE_PROMPT, SAMPLE_TOKENS = 16, 64  # of the text that every evaluation writes: tokens of val, then of the model


def train(experiment: Experiment, run_dir: Path, data_dir: Path, worker: Worker = Worker()) -> int:  # noqa: B008
    """Train from the latest valid checkpoint, or from nothing, to `train.max_steps`.

    Every worker calls it with the same arguments and its own `worker`; where there are several, torch.distributed is
    initialised. Only rank 0 writes.

    Returns:
        The number of updates done: below max_steps only if the run stopped itself, which `stopped.json` explains.
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
    """

    def __init__(self, experiment: Experiment, run_dir: Path, data_dir: Path, worker: Worker, *, parent: Path | None = None,
                 stop: int | None = None, rates: Callable[[int], float] | None = None):
        prepare_process(experiment, worker)
        self.experiment, self.run_dir, self.worker = experiment, Path(run_dir), worker
        self.stop = experiment.train.max_steps if stop is None else stop
        self.is_whole = self.stop == experiment.train.max_steps
        self.rates = rates or functools.partial(learning_rate, experiment.lr_schedule())
        self.device, self.autocast = torch.device(worker.device), autocast(experiment, worker.device)
        self.dataset, self.tokenizer = load_manifest(data_dir), load_tokenizer(experiment.data.tokenizer, data_dir)
        t, m = experiment.train, experiment.model
        self.streams = {split: TokenStream(data_dir, split) for split in ("train", "val")}
        self.batches = Batches(self.streams["train"], m.block_size, t.global_batch_size, t.micro_batch_size, t.seed)
        self.journal = Journal(run_dir)
        self.state = self._restore(parent)
        self.eval_sets = self._eval_sets() if t.eval_interval else {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with Writer(self.run_dir / "checkpoints", self.experiment.train.keep, self.run_dir) as self.writer:
            # However the steps end, what was saved is committed then.
            yield from self._steps()

    def _steps(self) -> Iterator[dict[str, Any]]:
        s, step = self.state, Step(self.experiment, self.state)
        begun_at = s.step
        if s.step == 0:
            yield from self._write(self._measure(log=False, evaluate=bool(self.eval_sets)))
        with contextlib.closing(self._prefetch()) as batches:
            while s.step < self.stop:
                losses, s.grad_norm = step.gradient(batches)
                if not self._all_finite(losses, s.grad_norm):
                    return
                step.update(self.rates(s.step))
                if not self.experiment.train.log_interval:
                    s.meter.losses.clear()  # nobody looks before the end, and the window would grow with the run
                s.meter.add(losses)
                yield from self._after_step()
        if begun_at == self.stop and self.is_whole:
            yield from self._end_late()
        if begun_at == self.stop and not self.is_own:
            self._checkpoint({})

    def _restore(self, parent: Path | None) -> state.TrainState:
        folder = self.run_dir / "checkpoints"
        found = checkpoint.latest_valid(folder, self._passed_over) if self.worker.is_main else None
        step = self._agree(int(found.name.removeprefix("step-")) if found else -1)
        self.is_own = step >= 0
        path = checkpoint.path_of(folder, step) if self.is_own else parent
        if path and (not self.worker.is_main or path == parent):
            checkpoint.verify(path)
        if path is None:
            s = state.build(self.experiment, initial_model(self.experiment, self.tokenizer.n_vocab), self.worker)
        else:
            s = state.build(self.experiment, state.load_model(path), self.worker)
            state.restore(s, path)
        if self.worker.is_main:
            self._rewind(s.step if path else -1)
        return s

    def _passed_over(self, message: str) -> None:
        print(message, flush=True)
        events.note(self.run_dir, "checkpoint_damaged", message)

    def _rewind(self, step: int) -> None:
        """The journal as it was at the checkpoint; a line written for an end that now is none keeps what was due."""
        t = self.experiment.train
        ended = self.is_whole and step == self.stop
        self.journal.rewind(step, None if ended else lambda line: journal.by_interval(line, t.log_interval, t.eval_interval))

    def _agree(self, number: int) -> int:
        """Rank 0's number, on every worker."""
        if self.worker.world_size == 1:
            return number
        shared = torch.tensor([number], dtype=torch.int64, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared.item())

    def _eval_sets(self) -> dict[str, EvalSet]:
        """The fixed stretch of val, and as many tokens of train."""
        e, lengths = self.experiment, self.tokenizer.byte_lengths
        limit = min(e.train.eval_tokens or self.streams["val"].tokens, self.streams["val"].tokens)
        return {split: EvalSet(eval_batches(stream, e.model.block_size, e.train.micro_batch_size,
                                            min(limit, stream.tokens)), lengths)
                for split, stream in self.streams.items()}

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
                yield inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        finally:
            prefetcher.close()

    def _all_finite(self, losses: list[float], grad_norm: float) -> bool:
        """False, with `stopped.json` written, where the update must not be applied."""
        bad = [m for m, loss in enumerate(losses) if not math.isfinite(loss)]
        # An infinite gradient is how a float16 scaler learns its scale: it skips that update by itself.
        if not bad and (self.state.scaler.is_enabled() or math.isfinite(grad_norm)):
            return True
        step, size = self.state.step, self.experiment.train.micro_batch_size
        offsets = self.batches.offsets(step)
        windows = {m: [int(o) for o in offsets[m * size : (m + 1) * size]] for m in bad or range(len(losses))}
        what = "loss" if bad else "gradient norm"
        reason = (f"step {step + 1}: the {what} is not finite; the update was not applied. Micro-batches and the "
                  f"offsets of their windows in train: {windows}. Lower schedule.max_lr or look at that text.")
        if self.worker.is_main:
            facts = {"reason": reason, "step": step, "windows": windows}
            (self.run_dir / "stopped.json").write_text(json.dumps(facts, indent=1), "utf-8")
        return False

    def _after_step(self) -> Iterator[dict[str, Any]]:
        """Log, evaluate and checkpoint where they are due; the line is in the journal before the checkpoint is."""
        s, t = self.state, self.experiment.train

        def due(interval: int | None) -> bool:
            return bool(interval) and s.step % interval == 0

        metrics = self._measure(due(t.log_interval), due(t.eval_interval))
        if s.step == self.stop and self.is_whole:
            metrics |= self._ending(*self._lacks(metrics))
        yield from self._write(metrics)
        if s.step == self.stop or due(t.checkpoint_interval):
            s.meter.lap("rest")
            self._checkpoint({k: v for k, v in metrics.items() if k.startswith("val/")})
            s.meter.lap("checkpoint")

    def _lacks(self, line: dict[str, float]) -> tuple[bool, bool]:
        """Whether the last line of a run still needs the training window, and the evaluation."""
        return "train/loss" not in line, bool(self.eval_sets) and "val/loss" not in line

    def _ending(self, log: bool, evaluate: bool) -> dict[str, float]:
        """What the last line of a run has besides what is due by the intervals.

        The state stays that of a run that goes on: grown, or with others branching off, it must not show that one ended here.
        """
        going_on = self.state.meter.losses, self.state.best_val_loss
        metrics = self._measure(log, evaluate)
        self.state.meter.losses, self.state.best_val_loss = going_on
        return metrics

    def _end_late(self) -> Iterator[dict[str, Any]]:
        """The ending of a run whose last step was made before it was known to be the last."""
        lines = journal.read(self.run_dir) if self.worker.is_main else []
        line = lines[-1] if lines and lines[-1]["step"] == self.stop else {}
        log, evaluate = divmod(self._agree(sum(n * lack for n, lack in zip((2, 1), self._lacks(line), strict=True))), 2)
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
            metrics |= self._evaluate()
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
        metrics |= {"train/tokens": s.step * e.tokens_per_step, "train/epoch": self.batches.epoch(s.step),
                    "optim/lr": self.rates(s.step - 1), "optim/grad_norm": s.grad_norm, "run/attempt": w.attempt}
        if s.scaler.is_enabled():
            metrics["optim/loss_scale"] = s.scaler.get_scale()
        utilisation = mfu(metrics.get("perf/tokens_per_sec", 0.0), s.model.config,
                          device_name(w.device), e.train.dtype, w.world_size)
        return metrics | ({} if utilisation is None else {"perf/mfu": utilisation}) | memory_metrics(w.device)

    def _evaluate(self) -> dict[str, float]:
        s, w = self.state, self.worker
        results = {split: eval_set.evaluate(s.forward, self.device, self.autocast, w.rank, w.world_size)
                   for split, eval_set in self.eval_sets.items()}
        val = results["val"]
        s.best_val_loss = val.loss if s.best_val_loss is None else min(s.best_val_loss, val.loss)
        if w.is_main:
            self._write_sample()
        return {"val/loss": val.loss, "val/bits_per_byte": val.bits_per_byte, "val/best_loss": s.best_val_loss,
                "train/eval_loss": results["train"].loss}

    def _write_sample(self) -> None:
        """What the model makes of the first tokens of val, drawn with a seed of its own for each step."""
        s, folder = self.state, self.run_dir / "samples"
        prompt = self.streams["val"].read(0, min(SAMPLE_PROMPT, self.streams["val"].tokens))
        tokens = torch.from_numpy(prompt.astype("int64"))[None].to(self.device)  # (1, SAMPLE_PROMPT)
        with self.autocast:
            drawn = generate(s.model, tokens, SAMPLE_TOKENS, top_k=50, n_vocab=self.tokenizer.n_vocab,
                             seed=keyed_seed(self.experiment.train.seed, s.step))
        folder.mkdir(exist_ok=True)
        (folder / f"step-{s.step:08d}.txt").write_text(self.tokenizer.decode(drawn[0].tolist()), "utf-8")

    def _checkpoint(self, metrics: dict[str, float]) -> None:
        if self.worker.is_main:
            self.writer.save(self.state.step, *state.snapshot(self.state, self.experiment, self.dataset, self.worker, metrics))
