"""Trains a stretch of a run again, from the nearest checkpoint, and compares the bits.

One process without Ray is enough, because the number of workers does not change the bits.

The lines of a run depend on its intervals, and its bits on the number of CPU threads. Both may
change between attempts. The stretch is therefore cut into segments at each checkpoint and at each
start of an attempt. Each segment is trained with the settings of its attempt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import fields_with
from orchestrator.config.fields import Effect
from orchestrator.data.batches import TokenStream
from orchestrator.data.dataset import Manifest, data_identity
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.replay.compare import Difference, compare_lines, compare_tensors
from orchestrator.replay.recorded import RecordedRun, Stretch
from orchestrator.replay.report import Cause, ChangeKind, ReplayResult
from orchestrator.runs import identity, journal
from orchestrator.runs.facts import own_sources
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Line
from orchestrator.text import differences
from orchestrator.train import numerics
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker

EXPLAINS = ("data", "seed", "experiment")  # changes that also change the proof of a checkpoint


@dataclass(frozen=True)
class Segment:
    """Steps of one attempt, from the end of the previous segment.

    Attributes:
        end: Last step.
        cpus: Number of CPU threads.
        settings: Values of the fields that change what an attempt logs.
    """

    end: int
    cpus: int
    settings: dict[str, Any]


class Replay:
    """Trains a stretch of a run again and compares it.

    Args:
        run: What the run stored.
        stretch: Steps to train; see `RecordedRun.stretch`.

    Attributes:
        experiment: Experiment of the run.
        data_identity: Identity of the tokens that the run was trained on.
        device: Device to train on, as torch names it.
        segments: Parts of the stretch.

    Raises:
        UserError: The run was trained on a GPU, and this machine has none.
    """

    def __init__(self, run: RecordedRun, stretch: Stretch) -> None:
        self.run = run
        self.stretch = stretch
        self.experiment = run.experiment(stretch.last)
        self.data_identity = run.fingerprints(stretch.last)["data"]
        self.device = _choose_device(run, stretch)
        self.segments = _segments(run, stretch)

    def compare(
        self, dataset: Manifest, scratch: RunFolder, report_line: Callable[[Line], None]
    ) -> ReplayResult:
        """Train the stretch and compare it.

        Args:
            dataset: Tokens to train on.
            scratch: Empty folder to train in.
            report_line: Called with each new journal line.
        """
        damage = _damage(dataset, self.experiment.data.tokenizer)
        report = ReplayResult(self.stretch, changes=damage + self._changes(dataset))
        if not damage:
            stopped = self._train(dataset, scratch, report, report_line)
            self._compare(scratch, report)
            if stopped is not None:
                report.differences.append(stopped)
                report.differences.sort(key=lambda difference: difference.step)
        report.damaged = self.run.damaged
        return report

    def _train(
        self,
        dataset: Manifest,
        scratch: RunFolder,
        report: ReplayResult,
        report_line: Callable[[Line], None],
    ) -> Difference | None:
        """Train all segments. Return a difference if the training stopped early."""
        parent = None
        if self.stretch.begin is not None:
            parent = self.run.folder.checkpoint(self.stretch.begin)
        for segment in self.segments:
            settings = {name.replace(".", "__"): v for name, v in segment.settings.items()}
            experiment = self.experiment.replace(
                **settings,
                train__checkpoint_interval=None,  # only at the end of each segment
                train__allow_drift=True,  # the report names it
                train__keep=len(self.segments),
            )
            trainer = Trainer(
                experiment,
                scratch,
                dataset.directory,
                Worker(device=self.device, cpus=segment.cpus),
                parent=parent,
                end_step=segment.end,
                steps=self.run.steps(self.experiment),
            )
            explained = any(change.kind in EXPLAINS for change in report.changes)
            if not trainer.start.is_own and not explained:
                # Another proof than that in the checkpoint of the run.
                report.changes += [Cause("numerics", line) for line in trainer.start.drift]
            for line in trainer.run():
                report_line(line)
            step = trainer.state.step
            if step < segment.end:
                ending = scratch.read_ending()
                reason = ending.reason if ending is not None else f"it ended after step {step}"
                return Difference(step, "the steps after it", note=f"not trained now: {reason}")
        return None

    def _compare(self, scratch: RunFolder, report: ReplayResult) -> None:
        """Compare lines and checkpoints by rising step."""
        then = self.run.lines
        now = {line["step"]: line for line in journal.read(scratch)}
        checkpoints = self.run.folder.checkpoint_steps()
        trained = scratch.checkpoint_steps()
        for step in sorted(filter(self.stretch.includes, {*then, *now, *checkpoints})):
            if step in then or step in now:
                report.lines += 1
                report.differences += compare_lines(step, then.get(step, {}), now.get(step, {}))
            if step in checkpoints and step in trained and self.run.is_valid(step):
                differences = self._compare_checkpoint(step, scratch)
                report.differences += differences
                report.weights[step] = not differences

    def _compare_checkpoint(self, step: int, scratch: RunFolder) -> list[Difference]:
        differences: list[Difference] = []
        parts = ["model", "optimizer"] + ["ema"] * (self.experiment.train.ema is not None)
        for part in parts:
            then = checkpoint.load_tensors(self.run.folder.checkpoint(step), part)
            now = checkpoint.load_tensors(scratch.checkpoint(step), part)
            differences += compare_tensors(step, part, then, now)
        return differences

    # ---- changes since the run ----

    def _changes(self, dataset: Manifest) -> list[Cause]:
        """Return what has changed since the stretch was first trained."""
        changes: list[Cause] = []
        sources = {self.run.source(segment.end) for segment in self.segments}
        if self.stretch.begin is not None:
            sources.add(self.run.folder.checkpoint(self.stretch.begin))
        for source in sorted(sources):
            changes += self._changes_since(source, dataset)
        changes += _code_changes(self.run.record.get("tags", {}))
        return list(dict.fromkeys(changes))

    def _changes_since(self, source: Path, dataset: Manifest) -> list[Cause]:
        """Return how data, experiment and numerics differ from those of a checkpoint."""
        changes = []
        manifest = checkpoint.read_manifest(source)
        fingerprints = manifest["fingerprints"]
        if fingerprints["data"] != data_identity(dataset):
            words = f"the tokens in {dataset.directory} are not those that the run was trained on"
            changes.append(Cause("data", words))
        stored = RunFolder(source).read_experiment()
        for line in identity.identity_differences(stored, self.experiment, manifest["step"]):
            kind: ChangeKind = "seed" if line.startswith("train.seed:") else "experiment"
            words = f"{line} (before: the checkpoint's experiment.yaml, now: the run's)"
            changes.append(Cause(kind, words))
        # The number of threads is not a change: each segment has that of its attempt.
        worker = Worker(device=self.device, cpus=fingerprints["numerics"]["cpus_per_worker"])
        now = numerics.fingerprint(self.experiment, worker)
        for line in differences(fingerprints["numerics"], now):
            changes.append(Cause("numerics", line))
        return changes


def _segments(run: RecordedRun, stretch: Stretch) -> list[Segment]:
    """Cut the stretch at each checkpoint and at each start of an attempt."""
    start = stretch.begin or 0
    attempts = run.attempts()
    cuts = {attempt.get("from_step", 0) for attempt in attempts}
    cuts.update(run.folder.checkpoint_steps())
    ends = [step for step in sorted(cuts) if start < step < stretch.last]
    segments = []
    for end in [*ends, stretch.last]:
        begun = [attempt for attempt in attempts if attempt.get("from_step", 0) <= start]
        segments.append(_segment(run, end, begun[-1] if begun else {}))
        start = end
    return segments


def _segment(run: RecordedRun, end: int, attempt: dict[str, Any]) -> Segment:
    """Return a segment with the settings of its attempt, or else those in a checkpoint."""
    stored = RunFolder(run.source(end)).read_experiment().flat() | attempt
    settings = {name: stored[name] for name in fields_with(Effect.ATTEMPT)}
    layout = attempt.get("layout") or run.fingerprints(end)["numerics"]
    return Segment(end, layout["cpus_per_worker"], settings)


def _choose_device(run: RecordedRun, stretch: Stretch) -> str:
    """Return a device of the kind that the run was trained on."""
    name = run.fingerprints(stretch.last)["numerics"]["device"]
    attempts = run.attempts()
    layout = attempts[-1].get("layout") if attempts else None
    used_gpu = bool(layout and layout.get("use_gpu"))
    if not torch.cuda.is_available():
        if used_gpu:
            raise UserError(
                f"{run.folder.path} was trained on {name}, and this machine has no GPU: the "
                "bits would differ; replay it on a machine with that GPU"
            )
        return "cpu"
    if used_gpu or name == torch.cuda.get_device_name("cuda:0"):
        return "cuda:0"
    return "cpu"


def _damage(dataset: Manifest, tokenizer: str) -> list[Cause]:
    """Return why the tokens cannot be read; empty if they can."""
    try:
        for split in ("train", "val"):
            TokenStream(dataset.directory, split)
        load_tokenizer(tokenizer, dataset.directory)
    except UserError as error:
        return [Cause("data", str(error))]
    return []


def _code_changes(tags: dict[str, str]) -> list[Cause]:
    """Compare the hash of the sources with that of the last attempt."""
    now = own_sources()
    if tags.get("source.sha256") in (None, now["sources_sha256"]):
        return []
    commit = tags.get("mlflow.source.git.commit", "unknown")
    words_then = _commit_words(commit, tags.get("source.dirty") == "true")
    words_now = _commit_words(now["commit"], bool(now["dirty"]))
    return [Cause("code", f"{words_then} then, {words_now} now")]


def _commit_words(commit: str, dirty: bool) -> str:
    changes = " with changes that were not committed" if dirty else ""
    return f"commit {commit[:12]}{changes}"
