"""How a sweep ended: its exit status, and advice for stages that ran out of memory."""

from orchestrator.config.experiment import Experiment
from orchestrator.runs import stop
from orchestrator.runs.ending import Ending
from orchestrator.sweep.states import BLOCKED, DIVERGED, DONE, FAILED, STOPPED
from orchestrator.sweep.study import Study
from orchestrator.workers.diagnose import advise


def ending_of(study: Study, stages_at_a_time: int) -> Ending:
    """Return how the sweep ended, once no stage runs any more.

    If a stage ran out of memory, this searches for a micro-batch that fits, for up to two minutes.
    The ending is "user" only if the user has to change something for every stage that failed.
    """
    asked = stop.requested(study.folder)
    if asked is not None and not study.is_over:
        return Ending("again", f"asked to stop: {asked}")
    states = {study.progress.states.of_trial(name) for name in study.trials}
    probes = {study.progress.states.of_trial(probe.name) for probe in study.probes.values()}
    if states <= {DONE, STOPPED} and not probes & {FAILED, BLOCKED}:
        return Ending("done")
    endings = _failures_with_advice(study, stages_at_a_time)
    if study.progress.full_disk is not None:
        endings.insert(0, Ending("user", study.progress.full_disk, cause="disk_full"))
    unreadable = [ending for ending in endings if ending.kind == "again"]
    if unreadable:
        return unreadable[0]
    if not endings or DIVERGED in states or any(e.kind != "user" for e in endings):
        return Ending("failed")
    return endings[0]


def _failures_with_advice(study: Study, stages_at_a_time: int) -> list[Ending]:
    """Return the endings of failed stages. The first out of memory gets advice and comes first."""
    failures = study.progress.failures
    lacking = [id_ for id_, ending in failures.items() if ending.cause == "out_of_memory"]
    if not lacking:
        return list(failures.values())
    trials = {id_: study.progress.trials[study.progress.tree.by_id[id_].example] for id_ in lacking}
    first = trials[lacking[0]]
    advised = advise(
        failures[lacking[0]],
        study.folder,
        first.experiment,
        first.dataset,
        study.layout,
        stages_at_a_time,
    )
    for id_, trial in trials.items():
        if _needs_as_much(trial.experiment, first.experiment):
            failures[id_] = advised
    return [advised, *failures.values()]


def _needs_as_much(a: Experiment, b: Experiment) -> bool:
    """Return whether a step of two experiments needs the same memory."""
    parts = [
        (e.model, e.optim, e.train.dtype, e.train.micro_batch_size, e.slots, e.data.tokenizer)
        for e in (a, b)
    ]
    return parts[0] == parts[1]
