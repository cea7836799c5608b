"""Builds the first state: from a checkpoint of the run or of its parent, or with new weights.

A state from a checkpoint is used only if this process computes the same bits as the one that wrote
the checkpoint: both compute the proof, a hash of what the next step computes first.
"""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint import store
from orchestrator.checkpoint.format import Fingerprints, step_of
from orchestrator.code_hashes import module_hashes
from orchestrator.config.experiment import Experiment
from orchestrator.config.steps import Steps
from orchestrator.data.batches import Batches
from orchestrator.errors import UnreadableError, UserError
from orchestrator.runs import events, journal_copy
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.identity import require_no_checkpoints
from orchestrator.text import differences
from orchestrator.train import numerics
from orchestrator.train.init_from import initial_model
from orchestrator.train.numerics import Worker, agree, gather
from orchestrator.train.ranks.reading import ReadTogether, read_together
from orchestrator.train.state import TrainState, build, restore
from orchestrator.train.step import Step

_NONE = -1  # instead of the step of a checkpoint


@dataclass(frozen=True)
class Begin:
    """State at the start of training.

    Attributes:
        state: The state; the same on all ranks.
        is_own: It was read from a checkpoint in the folder of this run.
        drift: Why the last bits differ from those of an uninterrupted run; empty if they do not.
    """

    state: TrainState
    is_own: bool
    drift: list[str]


def begin(
    experiment: Experiment,
    folder: RunFolder,
    n_vocab: int,
    batches: Batches,
    worker: Worker,
    steps: Steps,
    parent: Path | None = None,
) -> Begin:
    """Build the state that training starts from.

    Damaged checkpoints in `folder` are skipped: rank 0 renames them and records an event. It also
    restores lines of the journal that were lost.

    Args:
        experiment: The configuration.
        folder: Folder of the run. Its newest valid checkpoint is used.
        n_vocab: Number of tokens of the tokenizer.
        batches: Micro-batches of the run.
        worker: This process. All ranks must call this function.
        steps: Settings of every step.
        parent: Checkpoint to start from if `folder` has none. None: new weights, as
            `train.init_from` says.

    Raises:
        UnreadableError: A checkpoint cannot be read at the moment.
        UserError: `parent` is damaged; or the run had checkpoints and has none now; or the bits
            would not be those of an uninterrupted run, or not the same on all ranks, and
            `train.allow_drift` is false.
    """
    # The hashes of what was imported: files may be edited while the run trains.
    module_hashes(experiment.model.kind, experiment.optim.kind)
    content = _read_newest(folder, worker)
    is_own = content is not None
    if content is None and parent is not None:
        content = read_together(parent, worker)
    if content is None:
        state = build(experiment, initial_model(experiment, n_vocab), worker, steps)
    else:
        state = restore(experiment, content, worker, steps)
    drift: list[str] = []
    if content is not None or worker.world_size > 1:
        drift = _check_bits(folder, Step(experiment, state, steps), batches, worker, content)
    return Begin(state, is_own, drift)


def _read_newest(folder: RunFolder, worker: Worker) -> ReadTogether | None:
    """Return the newest valid checkpoint; None if there never was one.

    Rank 0 chooses, and all ranks read each checkpoint that it tries.
    """
    if not worker.is_main:
        while (step := agree(0, worker)) != _NONE:
            try:
                return read_together(folder.checkpoint(step), worker)
            except UnreadableError:
                raise
            except UserError:
                continue  # rank 0 reports it
        return None

    found: list[ReadTogether] = []

    def read(path: Path) -> None:
        agree(step_of(path) or 0, worker)
        found.append(read_together(path, worker))

    def skip(message: str) -> None:
        print(message, flush=True)
        events.note(folder, "checkpoint_damaged", message)

    if store.latest_valid(folder.checkpoints, skip, set_aside=True, read=read) is None:
        require_no_checkpoints(folder)
        agree(_NONE, worker)
        return None
    journal_copy.restore(folder, found[-1].manifest["step"])
    return found[-1]


# ---- proof ----


def prove(step: Step, batches: Batches, worker: Worker) -> str:
    """Return the proof of the current state. All ranks must call this function.

    Raises:
        UserError: A rank computes other bits than rank 0, and `train.allow_drift` is false.
    """
    proof = step.proof(batches)
    step.report_phase("exchange", step.state.step)  # this rank waits for the others now
    proofs = gather(proof, worker)
    step.report_phase("checkpoint", step.state.step)
    numerics.refuse_drift(_ranks_that_differ(proofs), step.experiment, f"step {step.state.step}")
    return proofs[0]


def _ranks_that_differ(proofs: list[str]) -> list[str]:
    return [
        f"rank {rank} computes other bits than rank 0; use machines of one kind"
        for rank, proof in enumerate(proofs)
        if proof != proofs[0]
    ]


def _check_bits(
    folder: RunFolder,
    step: Step,
    batches: Batches,
    worker: Worker,
    content: store.Content | None,
) -> list[str]:
    """Refuse a start that would change the bits, or record it if `train.allow_drift`.

    Args:
        folder: Folder of the run, for events.
        step: The step, with the state at the start.
        batches: Micro-batches of the run.
        worker: This process. All ranks must call this function.
        content: Checkpoint that the state was read from; None: it has new weights.

    Returns:
        Why the last bits differ from those of an uninterrupted run; empty if they do not.
    """
    proofs = gather(step.proof(batches), worker)
    drift = _ranks_that_differ(proofs)
    changed = ""
    if content is not None:
        stored = content.manifest["fingerprints"]
        lines = _changes(stored, step.experiment, worker)
        changed = "; ".join(lines)
        if stored.get("proof") != proofs[0]:
            drift.append(f"the next step has other bits (changed: {changed or 'nothing recorded'})")
        else:
            drift += [line for line in lines if line.startswith(numerics.NOT_PROVEN)]
    numerics.refuse_drift(drift, step.experiment, folder.path)
    if worker.is_main:
        for line in drift:
            message = f"results will differ in their last bits from an uninterrupted run: {line}"
            events.note(folder, "drift", message, step=step.state.step)
        if changed and not drift:
            message = (
                f"the next step has the same bits as before, though this has changed: {changed}"
            )
            events.note(folder, "changed", message, step=step.state.step)
    return drift


def _changes(stored: Fingerprints, experiment: Experiment, worker: Worker) -> list[str]:
    """Return what has changed since a checkpoint was written, as far as it is recorded."""
    lines = differences(stored["numerics"], numerics.fingerprint(experiment, worker))
    if "environment" in stored:
        before = stored["environment"]
        # A variable may also have been removed.
        lines += differences(before, dict.fromkeys(before) | numerics.environment())
    if "code" in stored:
        lines += differences(
            stored["code"], module_hashes(experiment.model.kind, experiment.optim.kind)
        )
    return lines
