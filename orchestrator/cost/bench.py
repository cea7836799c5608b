"""Time the parts of a run in this process: `python -m orchestrator.cost.bench <time of its start>`.

`orchestrator.cost.process` starts this process, whose threads and peak memory are then those of a
worker. The steps are real, on random tokens.

Not measured: traffic between workers (one worker's share of a step is timed), torch.compile (steps
are timed without it), and the time that a slow disk needs to read tokens.
"""

import contextlib
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.generate import generate
from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.cost.timing import Timing
from orchestrator.data.dataset import Manifest
from orchestrator.folders import folder_bytes
from orchestrator.own_code import Source, register
from orchestrator.runs.facts import model_facts
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.train import state
from orchestrator.train.checkpointer import Checkpointer
from orchestrator.train.evaluate import SAMPLE_PROMPT, SAMPLE_TOKENS, EvalSet
from orchestrator.train.meter import memory_metrics
from orchestrator.train.numerics import Worker, autocast, prepare_process
from orchestrator.train.ranks.slots import most_vectors
from orchestrator.train.step import Step

STEPS = 30  # steps that are timed, at most
FEW = 8  # steps or batches after which the timing may end
STANDARD_ERROR = 0.01  # of the mean, relative: then the timing ends before its time is over
# On a CPU, a micro-batch of more FLOPs is not timed as a whole, but a part of it.
MOST_FLOPS = 5e11
FEW_TOKENS = 8  # of the sample of a model whose steps are timed in part
# Memory of a Ray worker that this process lacks: 385 MiB after all imports, 257 MiB without Ray.
RAY_GIB = 0.125


def main() -> None:
    """Read a job from stdin; write the `Timing` of one worker to stdout."""
    be_expendable()
    ready = time.time()
    job = json.loads(sys.stdin.read())
    waited_s = time.time() - ready  # for the job
    worker = Worker(device=job["device"], cpus=job["cpus"])
    if worker.device != "cpu":
        free, total = torch.cuda.mem_get_info(worker.device)
        if free < 0.8 * total:
            # The times would be wrong, and the other process might run out of memory.
            sys.exit("the GPU is in use")
    code = [{**source, "content": source["content"].encode("latin-1")} for source in job["code"]]
    register(Source(**source) for source in code)
    experiment = parse_experiment(job["experiment"], "job")
    prepare_process(experiment, worker)
    startup_s = time.time() - float(sys.argv[1]) - waited_s
    bench = Bench(experiment, job["n_vocab"], worker, job["limit_s"] / 4, job["timed_s"])
    print(json.dumps(asdict(bench.run(startup_s))))
    gc.freeze()  # else Python looks for garbage for half a second before it exits


class Bench:
    """Times steps, evaluations, samples and checkpoints.

    Args:
        experiment: One worker's share of the run.
        n_vocab: Size of the vocabulary.
        worker: Device and threads of this process.
        step_budget_s: Seconds for the steps. If a whole step would take too long, one micro-batch
            is timed, and the time is multiplied.
        timed_s: Seconds in which steps and evaluations are timed, at most.
    """

    def __init__(
        self,
        experiment: Experiment,
        n_vocab: int,
        worker: Worker,
        step_budget_s: float,
        timed_s: float,
    ) -> None:
        self.experiment = experiment
        self.n_vocab = n_vocab
        self.worker = worker
        self.step_budget_s = step_budget_s
        self.timed_s = timed_s
        # The experiment that `state` was built for: one micro-batch per step.
        self.timed = experiment.replace(
            train__global_batch_size=experiment.train.micro_batch_size, train__reduction_slots=1
        )
        self.state = state.build(self.timed, experiment.new_model(n_vocab), worker)
        self.unused_bytes = 0.0  # what a whole step allocates, and the steps here did not
        self.whole = (experiment.train.micro_batch_size, experiment.model.block_size)  # (B, T)
        self.shape = self.whole
        if worker.device == "cpu" and timed_s > 0:
            self.shape = self._part()

    def run(self, startup_s: float) -> Timing:
        """Time all parts. `startup_s` was measured by the caller."""
        step_s = self.time_steps()
        eval_tokens_per_s = self._time_evaluation()
        sample_s = self._time_sample()
        memory_gib = peak_gib(self.worker.device)
        checkpoint_s, checkpoint_bytes = self._time_checkpoint()
        if self.shape == self.whole:
            memory_gib = peak_gib(self.worker.device)
        else:
            self.unused_bytes += checkpoint_bytes  # the copy of the state
        return Timing(
            step_s=step_s,
            eval_tokens_per_s=eval_tokens_per_s,
            sample_s=sample_s,
            checkpoint_s=checkpoint_s,
            checkpoint_bytes=checkpoint_bytes,
            memory_gib=memory_gib + self.unused_bytes / 2**30,
            startup_s=startup_s,
        )

    def time_steps(self) -> float:
        """Return the seconds of a step, within the budget."""
        count = self.experiment.micro_batches
        is_whole = self.shape == self.whole
        gradient_s, update_s = self._time_step() if is_whole else self._time_part()
        if is_whole and gradient_s < self.step_budget_s / 2:
            gradient_s, update_s = self._time_step()  # the first one was the warm-up
        if not is_whole or gradient_s * count > self.step_budget_s / 2:
            buffers, _ = most_vectors(self.experiment, [1])
            self.unused_bytes += (buffers - 1) * self.state.gradients.size * 4
            return gradient_s * count + update_s
        if count > 1:
            self.timed = self.experiment
            self.state = state.build(self.timed, self.state.model, self.worker)
            self._time_step()
        budget_s = min(0.8 * self.timed_s, self.step_budget_s)
        return mean_seconds(self._time_step, budget_s, STEPS)

    def _part(self) -> tuple[int, int]:
        """Return the sequences and their length, (B, T), whose FLOPs are not too many."""
        size, length = self.whole
        size = max(1, min(size, int(MOST_FLOPS / self._flops(1, length))))
        while length > 2 * FEW_TOKENS and self._flops(size, length) > MOST_FLOPS:
            length //= 2
        return size, length

    def _flops(self, size: int, length: int) -> float:
        """Return the FLOPs of a gradient of `size` sequences with `length` tokens."""
        facts = model_facts(self.experiment.replace(model__block_size=length), self.n_vocab)
        return size * length * (facts["flops_per_token"] or 6 * facts["parameters"])

    def _time_part(self) -> tuple[float, float]:
        """Return the seconds of the gradient of a micro-batch and of the update, from a part.

        A micro-batch of few tokens tells what does not grow with their number.
        """
        part = self.shape
        few = self.shape = (1, FEW_TOKENS)
        self._time_step()  # allocates the moments
        few_s, _ = self._time_step()
        few_gib = peak_gib(self.worker.device)
        self.shape = part
        part_s, update_s = self._time_step()
        grown_gib = peak_gib(self.worker.device) - few_gib
        tokens = math.prod(part)
        unseen = (math.prod(self.whole) - tokens) / (tokens - FEW_TOKENS)
        self.unused_bytes = unseen * grown_gib * 2**30
        flops = self._flops(*part)
        unseen = (self._flops(*self.whole) - flops) / (flops - self._flops(*few))
        return part_s + unseen * max(0.0, part_s - few_s), update_s

    def _time_step(self) -> tuple[float, float]:
        """Return the seconds of the gradient and of the update."""
        step = Step(self.timed, self.state)
        started = time.perf_counter()
        self.state.grad_norm = step.gradient(self._random_batches()).norm
        between = time.perf_counter()
        # Training on random tokens could give weights that generate no text.
        step.update(replace(step.steps(0), lr=0.0))
        if self.worker.device != "cpu":
            torch.cuda.synchronize()
        return between - started, time.perf_counter() - between

    def _random_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.timed.micro_batches):
            tokens = torch.randint(self.state.model.config.vocab_size, self.shape)  # (B, T)
            tokens = tokens.to(self.worker.device)
            yield tokens, tokens

    def _time_evaluation(self) -> float:
        """Return the tokens per second of an evaluation."""
        vocab_size = self.state.model.config.vocab_size
        inputs = np.random.default_rng(0).integers(vocab_size, size=self.shape)  # (B, T)
        eval_set = EvalSet([(inputs, inputs, np.arange(len(inputs)))], np.ones(vocab_size))
        device = torch.device(self.worker.device)
        context = autocast(self.experiment, self.worker.device)
        if self.shape == self.whole:
            eval_set.evaluate(self.state.forward, device, context)  # warm-up

        def evaluate() -> None:
            eval_set.evaluate(self.state.forward, device, context)

        return inputs.size / mean_seconds(evaluate, 0.2 * self.timed_s)

    def _time_sample(self) -> float:
        """Return the seconds of the text that an evaluation generates."""
        count = SAMPLE_TOKENS if self.shape == self.whole else FEW_TOKENS
        prompt = torch.zeros(1, SAMPLE_PROMPT, dtype=torch.int64, device=self.worker.device)
        started = time.perf_counter()
        with autocast(self.experiment, self.worker.device):
            tokens = generate(
                self.state.model, prompt, count, top_k=50, n_vocab=self.n_vocab, seed=0
            )
        tokens.tolist()  # waits for a GPU
        return (time.perf_counter() - started) * SAMPLE_TOKENS / count

    def _time_checkpoint(self) -> tuple[float, int]:
        """Return seconds and bytes of a checkpoint in the folder for temporary files.

        A run trains while most of the checkpoint is written. The peak memory therefore includes one
        more step beside the copy of the state.
        """
        with tempfile.TemporaryDirectory(prefix="espalier-") as path:
            folder = RunFolder(path)
            (folder.path / "tokenizer.json").write_text("{}", "utf-8")
            dataset = Manifest(folder.path, {}, {})
            started = time.perf_counter()
            with Checkpointer(folder, 1, Journal(folder)) as checkpointer:
                parts = state.snapshot(self.state, self.experiment, dataset, self.worker, {})
                checkpointer.save(self.state.step, *parts)
                checkpointer.wait()
                seconds = time.perf_counter() - started
                if self.shape == self.whole:
                    self._time_step()
            return seconds, folder_bytes(folder.checkpoints)


def mean_seconds(
    work: Callable[[], object],
    budget_s: float,
    most: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return the mean time of a call of `work`, from as many calls as it takes to know it.

    Args:
        work: Called once at least.
        budget_s: Seconds after which no call begins.
        most: Number of calls, at most.
        clock: Returns seconds.
    """
    times = [clock()]
    while True:
        work()
        times.append(clock())
        seconds = [after - before for before, after in pairwise(times)]
        mean = statistics.fmean(seconds)
        if len(seconds) >= most or times[-1] - times[0] >= budget_s:
            return mean
        if len(seconds) >= FEW:
            error = statistics.stdev(seconds) / math.sqrt(len(seconds))
            if error <= STANDARD_ERROR * mean:
                return mean


def peak_gib(device: str) -> float:
    """Return the peak memory of this process, as the journal of a Ray worker would show it."""
    status = Path("/proc/self/status")
    if device == "cpu" and status.exists():
        # Not `ru_maxrss`, which starts at the memory of the parent process.
        for line in status.read_text("utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return RAY_GIB + int(line.split()[1]) / 2**20
    [peak] = memory_metrics(device).values()
    return peak if device != "cpu" else RAY_GIB + peak


def be_expendable() -> None:
    """Let the kernel kill this process first if memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", "utf-8")


if __name__ == "__main__":
    main()
