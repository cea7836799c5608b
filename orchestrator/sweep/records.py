"""The files of a stage: what it trains (stage.json), how it ended (result.json), and its curve."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.config.experiment import Experiment, parse_experiment
from orchestrator.config.steps import Steps, steps_of_json
from orchestrator.files import read_derived, write_json
from orchestrator.folders import make_folder
from orchestrator.own_files import load_copies
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Line
from orchestrator.sweep.branch import Branch, settings_of_steps
from orchestrator.sweep.states import State
from orchestrator.train.due import by_interval

if TYPE_CHECKING:
    from orchestrator.sweep.source import BaseRun


@dataclass(frozen=True)
class StageSpec:
    """Content of stage.json: what a stage trains.

    Attributes:
        id: Key of the state at the end of the stage.
        root: Hash of what is the same at every step, and of step 0; see `tree.Branch`.
        start, stop: The stage makes the updates [start, stop).
        experiment: One trial of the stage; one that ends with it, if there is any.
        steps: Settings of every step: the fields of `Steps`.
        data_dir: Folder of the token shards.
        parent: Folder whose journal lines come before this stage's; None at step 0.
        begin: Checkpoint to start from; None at step 0.
        diverged_above: `sweep.diverged_above`.
        made_by: Device, and hash of each module that decides the bits; empty in stages of earlier
            versions.
    """

    id: str
    root: str
    start: int
    stop: int
    experiment: dict[str, Any]
    steps: dict[str, Any]
    data_dir: str
    parent: str | None = None
    begin: str | None = None
    diverged_above: float | None = None
    made_by: dict[str, str] = field(default_factory=dict)

    def write(self, folder: RunFolder) -> None:
        """Write stage.json. A parent in the same sweep has a relative path: sweeps can move."""
        stored = asdict(self)
        if self.parent is not None and Path(self.parent).parent == folder.path.parent:
            stored["parent"] = f"../{Path(self.parent).name}"
        make_folder(folder.path)
        write_json(folder.stage_file, stored)

    def parsed_experiment(self) -> Experiment:
        return parse_experiment(self.experiment, f"stage {self.id}")

    def key(self, step: int) -> str:
        """Return the key of the state after `step` updates."""
        return self.keys([step])[step]

    def keys(self, steps: list[int]) -> dict[int, str]:
        """Return the keys of the states after some rising numbers of updates."""
        rates, others = settings_of_steps(self.settings, max(steps, default=0))
        return Branch("", self.root, rates, others=others).keys(steps)

    @property
    def settings(self) -> Steps:
        """Settings of every step."""
        return steps_of_json(self.steps)


def read_spec(folder: RunFolder, base: "BaseRun | None" = None) -> StageSpec | None:
    """Read stage.json; None if the folder is not that of a stage, or the file is damaged.

    Args:
        folder: The stage.
        base: The run that the sweep branches off. It may be elsewhere than when the file was
            written: in another cache, or on another machine.
    """
    spec = read_derived(folder.stage_file, _parse_spec)
    if spec is None or spec.parent is None:
        return spec
    if spec.parent.startswith("../"):
        return replace(spec, parent=str(folder.path.parent / spec.parent.removeprefix("../")))
    if base is not None and spec.start <= base.step:
        return replace(spec, parent=str(base.folder))
    return spec


def _parse_spec(stored: dict[str, Any]) -> StageSpec:
    if "rates" in stored:  # of earlier versions: only the learning rate could change
        rates = stored.pop("rates")
        plan = asdict(parse_experiment(stored["experiment"], "").steps().plan)
        plans = {
            name: rates[old] and {**plan, "lr": {**plan["lr"], **rates[old]}}
            for name, old in (("plan", "schedule"), ("before", "before"))
        }
        stored["steps"] = {**rates, **plans}
        del stored["steps"]["schedule"]
    return StageSpec(**stored)


@dataclass(frozen=True)
class StageResult:
    """Content of result.json: how a stage ended.

    Attributes:
        id, start, stop: As in stage.json.
        step: Updates after which the stage ended.
        outcome: done, diverged or stopped.
        key: Key of the state after `step` updates, by which later trees find the result.
        seconds, steps_run: Time and updates of the last attempt.
        is_whole: True if a trial ends here, with the evaluation at its end.
        limit: `sweep.diverged_above` if the stage diverged by it.
        weights_sha256: Only of a stage where a trial ends.
        reason: Why it is not done.
        numerics: Fingerprint of the numerics.
    """

    id: str
    start: int
    stop: int
    step: int
    outcome: State
    key: str
    seconds: float
    steps_run: int
    is_whole: bool = False
    limit: float | None = None
    weights_sha256: str | None = None
    reason: str | None = None
    numerics: dict[str, Any] | None = None

    def write(self, folder: RunFolder) -> None:
        stored = asdict(self)
        stored["kind"] = self.outcome  # as in stopped.json; see `Ending`
        if self.numerics is None:
            del stored["numerics"]
        write_json(folder.result_file, stored)


def read_result(folder: RunFolder) -> StageResult | None:
    """Read result.json; None if the stage has not ended, or the file is damaged."""
    return read_derived(folder.result_file, parse_result)


def parse_result(stored: dict[str, Any]) -> StageResult:
    """Return the content of result.json."""
    stored.pop("kind", None)
    return StageResult(**stored)


def curve(
    folder: RunFolder, last_step: int | None = None, base: "BaseRun | None" = None
) -> list[Line]:
    """Return the journal lines from step 0 through a stage: those of its parents and its own.

    Args:
        folder: A stage, or a run that a sweep branches off.
        last_step: Leave out the folder's own lines after this step, and the metrics that only the
            end of a run has from the line at this step. None: all lines as they are.
        base: As for `read_spec`.
    """
    spec = read_spec(folder, base)
    own = journal.read(folder) if last_step is None else lines_until(folder, last_step)
    if spec is None or spec.parent is None:
        return own
    before = curve(RunFolder(spec.parent), spec.start, base)
    return [line for line in before if not own or line["step"] < own[0]["step"]] + own


def has_whole_curve(spec: StageSpec, base: "BaseRun | None" = None) -> bool:
    """Return whether all folders exist from which `curve` takes the lines before a stage."""
    if spec.parent is None:
        return True
    parent = RunFolder(spec.parent)
    before = read_spec(parent, base)  # None: the run that the sweep branches off
    return parent.path.exists() and (before is None or has_whole_curve(before, base))


def lines_until(folder: RunFolder, last_step: int) -> list[Line]:
    """Return the own lines of a folder as a longer run would have them; see `curve`."""
    spec = read_spec(folder)
    if spec is not None:
        load_copies(spec.experiment, folder.path)
    experiment = folder.read_experiment() if spec is None else spec.parsed_experiment()
    config = experiment.train
    found = []
    for line in journal.read(folder):
        if line["step"] < last_step:
            found.append(line)
        elif line["step"] == last_step:
            reduced = by_interval(line, config.log_interval, config.eval_interval)
            if reduced:
                found.append(reduced)
    return found
