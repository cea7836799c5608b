"""How a sweep ended: its exit status, and advice for stages that ran out of memory."""

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
    if stop.requested(study.folder) is not None and not study.is_over:
        return Ending("again")
    states = {study.progress.states.of_trial(name) for name in study.trials}
    probes = {study.progress.states.of_trial(probe.name) for probe in study.probes.values()}
    if states <= {DONE, STOPPED} and not probes & {FAILED, BLOCKED}:
        return Ending("done")
    endings = _failures_with_advice(study, stages_at_a_time)
    if not endings or DIVERGED in states or any(e.kind != "user" for e in endings):
        return Ending("failed")
    return endings[0]


def _failures_with_advice(study: Study, stages_at_a_time: int) -> list[Ending]:
    """Return the endings of failed stages. The first out of memory gets advice and comes first."""
    failures = study.progress.failures
    for id_, ending in failures.items():
        if ending.cause != "out_of_memory":
            continue
        trial = study.progress.trials[study.progress.tree.by_id[id_].example]
        advised = advise(
            ending,
            study.folder,
            trial.experiment,
            trial.dataset,
            study.layout,
            stages_at_a_time,
        )
        failures[id_] = advised
        return [advised, *failures.values()]
    return list(failures.values())
