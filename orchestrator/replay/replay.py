"""Replay: a stretch of a run, made again from its nearest checkpoint and compared with what it left, bit for bit.

Eats a run's folder, which it only reads, its tokens, and an empty folder to train in; yields a `Verdict`. One process,
whatever the number of workers was: the bits are the same by design. Knows no Ray.

What the run logged depends on its intervals, and its bits on its threads. Both may have changed between attempts, so the
stretch is made in pieces: each ends where a checkpoint stands or an attempt began, with the settings of its own attempt.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import Experiment
from orchestrator.data.batches import TokenStream
from orchestrator.data.dataset import Manifest, data_identity
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.files import read_json, write_atomically
from orchestrator.replay import verdict
from orchestrator.replay.recorded import Recorded
from orchestrator.replay.verdict import Cause, Difference, Verdict
from orchestrator.runs import events, identity, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.sources import source_facts
from orchestrator.train import numerics
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker

SETTINGS = (
    "log_interval",
    "eval_interval",
    "on_nonfinite",
)  # of `train`: may change between attempts, and show in the lines
FOLDER = "replays"  # in the run's: verdicts, and what was made again where it differs
SOURCES = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Stretch:
    """Steps `first` … `last`, made from the checkpoint of step `begin` on, or (None) from nothing."""

    begin: int | None
    first: int
    last: int

    def holds(self, step: int) -> bool:
        """Whether the line of `step` is made again and asked for."""
        return self.first <= step <= self.last and (self.begin is None or step > self.begin)


@dataclass(frozen=True)
class Piece:
    """Steps (start, stop] of one attempt: its settings of `SETTINGS`, and its `numerics.fingerprint`."""

    start: int
    stop: int
    settings: dict[str, Any]
    numerics: dict[str, Any]


# ---- what is made again ----
def stretch(run: Recorded, steps: tuple[int | None, int | None] | None = None) -> Stretch:
    """The stretch of steps A:B (None: from the start, to the end), or the default one: from the last checkpoint but one
    to the end, or the whole run where there are not two.

    Raises:
        UserError: steps that the run does not have, or that left nothing to compare.
    """
    end = run.end
    if steps is None:
        first, last = next(islice(run.whole(), 1, None), 0), end
    else:
        first, last = (0 if steps[0] is None else steps[0]), (end if steps[1] is None else steps[1])
    if not 0 <= first < last <= end:
        raise UserError(
            f"--steps: {first}:{last} is no stretch of this run, which has steps 0:{end}"
        )
    begin = next(
        (step for step in reversed(run.standing()) if step <= first and run.is_valid(step)), None
    )
    found = Stretch(begin, first, last)
    if not any(map(found.holds, [*run.lines, *run.standing()])):
        raise UserError(
            f"--steps: nothing was logged in steps {first}:{last}, and no checkpoint stands there; the run logged at "
            f"steps {_some(sorted(run.lines))}"
        )
    return found


def _some(steps: list[int]) -> str:
    return (
        ", ".join(map(str, steps if len(steps) <= 8 else [*steps[:4], "…", *steps[-3:]])) or "none"
    )


def pieces(run: Recorded, s: Stretch) -> list[Piece]:
    """The stretch, cut where a checkpoint stands and where an attempt began."""
    attempts, start = run.attempts(), s.begin or 0
    cuts = [
        step
        for step in {*run.standing(), *(a.get("from_step", 0) for a in attempts)}
        if start < step < s.last
    ]
    stops = sorted({*cuts, s.last})
    found = []
    for begin, stop in zip([start, *stops], stops, strict=False):
        attempt = next((a for a in reversed(attempts) if a.get("from_step", 0) <= begin), {})
        path = run.path(run.witness(stop))
        train = RunFolder(path).read_experiment().train
        recorded = checkpoint.read_manifest(path)["fingerprints"]["numerics"]
        cpus = (attempt.get("layout") or {}).get("cpus_per_worker", recorded["cpus_per_worker"])
        settings = {key: attempt.get(f"train.{key}", getattr(train, key)) for key in SETTINGS}
        found.append(Piece(begin, stop, settings, recorded | {"cpus_per_worker": cpus}))
    return found


def experiment_of(run: Recorded, s: Stretch) -> Experiment:
    """What the run's folder says that it is; a folder without experiment.yaml is its checkpoint's."""
    has_own = (run.run_dir / "experiment.yaml").is_file()
    return RunFolder(run.run_dir if has_own else run.path(run.witness(s.last))).read_experiment()


def data_wanted(run: Recorded, s: Stretch) -> str:
    """The identity of the tokens that the stretch was trained on."""
    return checkpoint.read_manifest(run.path(run.witness(s.last)))["fingerprints"]["data"]


def device_of(run: Recorded, s: Stretch) -> str:
    """The kind of device that the run had.

    Raises:
        UserError: a GPU, and there is none here.
    """
    name = checkpoint.read_manifest(run.path(run.witness(s.last)))["fingerprints"]["numerics"][
        "device"
    ]
    layout = (run.attempts() or [{}])[-1].get("layout") or {}
    has_gpu = torch.cuda.is_available()
    if layout.get("use_gpu") and not has_gpu:
        raise UserError(
            f"{run.run_dir} was trained on {name}, and here is no GPU: its bits would be others; replay it there"
        )
    return (
        "cuda:0"
        if has_gpu and (layout.get("use_gpu") or name == torch.cuda.get_device_name("cuda:0"))
        else "cpu"
    )


# ---- making it ----
def replay(
    run: Recorded,
    s: Stretch,
    dataset: Manifest,
    scratch: Path,
    say: Callable[[dict[str, Any]], None],
) -> Verdict:
    """Train the stretch in the empty folder `scratch` and compare; `say` is told every line as it is made."""
    experiment, device, parts = experiment_of(run, s), device_of(run, s), pieces(run, s)
    result = Verdict(
        s.first, s.last, s.begin, changed=changes(run, s, experiment, dataset, parts, device)
    )
    if damage := _damage(experiment, dataset):
        result.changed.insert(0, damage)
    else:
        made = _make(run, s, experiment, dataset, scratch, device, parts, say)
        _compare(run, s, scratch, result, made)
    result.passed_over = run.passed_over
    return result


def _damage(experiment: Experiment, dataset: Manifest) -> Cause | None:
    """What of the tokens cannot be read, so that nothing can be trained on them."""
    try:
        for split in ("train", "val"):
            TokenStream(dataset.directory, split)
        load_tokenizer(experiment.data.tokenizer, dataset.directory)
    except UserError as error:
        return Cause("data", str(error))
    return None


def _make(
    run: Recorded,
    s: Stretch,
    experiment: Experiment,
    dataset: Manifest,
    scratch: Path,
    device: str,
    parts: list[Piece],
    say: Callable[[dict[str, Any]], None],
) -> str | None:
    """Train piece after piece; each goes on from the end of the one before. Returns why it ended early, if it did."""
    lr = run.rates(experiment)
    for piece in parts:
        settings = {f"train__{field}": value for field, value in piece.settings.items()}
        as_then = experiment.replace(
            **settings,
            train__checkpoint_interval=None,
            train__keep=len(parts),  # all are compared at the end
        )
        parent = run.path(s.begin) if s.begin is not None else None
        again = Trainer(
            as_then,
            RunFolder(scratch),
            dataset.directory,
            Worker(device=device, cpus=piece.numerics["cpus_per_worker"]),
            parent=parent,
            end_step=piece.stop,
            lr_at=lr,
        )
        for line in again.run():
            say(line)
        if again.state.step < piece.stop:
            return (read_json(scratch / "stopped.json") or {}).get(
                "reason"
            ) or f"it ended after step {again.state.step}"
    return None


def _compare(
    run: Recorded, s: Stretch, scratch: Path, result: Verdict, ended_early: str | None
) -> None:
    """Fill in the verdict: line by line, checkpoint by checkpoint, by rising step."""
    now = {line["step"]: line for line in journal.read(RunFolder(scratch))}
    made = set(checkpoint.steps(scratch / "checkpoints"))
    for step in sorted(filter(s.holds, {*run.lines, *now, *run.standing()})):
        if step in run.lines or step in now:
            result.lines += 1
            result.differences += verdict.of_lines(step, run.lines.get(step, {}), now.get(step, {}))
        if step in run.standing() and step in made and run.is_valid(step):
            found = list(
                _of_checkpoints(
                    step, run.path(step), checkpoint.path_of(scratch / "checkpoints", step)
                )
            )
            result.differences += found
            result.weights[step] = not found
    if ended_early:
        end = Difference(
            max([s.begin or 0, *now]), "the steps after it", note=f"not made now: {ended_early}"
        )
        result.differences = sorted([end, *result.differences], key=lambda d: d.step)


def _of_checkpoints(step: int, then: Path, now: Path) -> Iterator[Difference]:
    for part in ("model", "optimizer"):
        yield from verdict.of_tensors(
            step, part, checkpoint.load_tensors(then, part), checkpoint.load_tensors(now, part)
        )


# ---- why it may differ ----
def changes(
    run: Recorded,
    s: Stretch,
    experiment: Experiment,
    dataset: Manifest,
    parts: list[Piece],
    device: str,
) -> list[Cause]:
    """What is not as it was when the stretch was made."""
    found: list[Cause] = []
    for step in sorted(
        {run.witness(piece.stop) for piece in parts} | ({s.begin} if s.begin is not None else set())
    ):
        path = run.path(step)
        if checkpoint.read_manifest(path)["fingerprints"]["data"] != data_identity(dataset):
            found.append(
                Cause(
                    "data",
                    f"the tokens in {dataset.directory} are not those that the run was trained on",
                )
            )
        for line in identity.identity_differences(
            RunFolder(path).read_experiment(), experiment, step
        ):
            kind = "seed" if line.startswith("train.seed:") else "experiment"
            found.append(
                Cause(kind, f"{line} (there: the checkpoint's experiment.yaml, here: the run's)")
            )
    for piece in parts:
        worker = Worker(device=device, cpus=piece.numerics["cpus_per_worker"])
        found += [
            Cause("numerics", line)
            for line in numerics.changes(piece.numerics, numerics.fingerprint(experiment, worker))
        ]
    return list(dict.fromkeys([*found, *_code_changes(run.facts.get("tags") or {})]))


def _code_changes(tags: dict[str, str]) -> list[Cause]:
    """The sources of the run's last attempt are told by their hash; the commits say which they are."""
    now = source_facts(SOURCES)
    if tags.get("source.sha256") in (None, now["sources_sha256"]):
        return []
    then_commit, then_dirty = (
        tags.get("mlflow.source.git.commit", "unknown"),
        tags.get("source.dirty") == "true",
    )
    words = [
        f"commit {commit[:12]}{' with changes that were not committed' * bool(dirty)}"
        for commit, dirty in ((then_commit, then_dirty), (now["commit"], now["dirty"]))
    ]
    return [Cause("code", f"{words[0]} then, {words[1]} now")]


# ---- keeping it ----
def new_folder(run_dir: Path) -> Path:
    """An empty folder beside the run's checkpoints, where there is room for one more, named by the time."""
    folder = run_dir / FOLDER / datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    folder.mkdir(parents=True)
    return folder


def keep(run_dir: Path, folder: Path, result: Verdict) -> Path:
    """Write the verdict beside `folder`, whose time names it, and note it among the run's events."""
    path = folder.with_name(f"{folder.name}.json")
    write_atomically(
        path,
        json.dumps(
            {"time": datetime.now(UTC).isoformat(timespec="seconds"), **result.to_json()}, indent=1
        ),
    )
    events.note(
        RunFolder(run_dir),
        "replay",
        result.sentence(),
        equal=result.equal,
        steps=[result.first_step, result.last_step],
        verdict=f"{FOLDER}/{path.name}",
        causes=[str(cause) for cause in result.causes()],
    )
    return path
