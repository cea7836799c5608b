"""Probes: short anneals that show which trials to stop (`sweep.stop: anneal_probe`)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from orchestrator.config.schedules import ScheduleSection
from orchestrator.sweep.trials import PlannedTrial


def probes_of(trials: Iterable[PlannedTrial], step: int, steps: int) -> dict[str, PlannedTrial]:
    """Return the probe of every trial longer than `step`, by the name of the trial.

    Trials that are equal up to `step` share one probe. From there on, the learning rate of the
    probe falls to zero in `steps` steps.
    """
    by_key: dict[str, PlannedTrial] = {}
    found: dict[str, PlannedTrial] = {}
    for trial in trials:
        if trial.branch.steps <= step:
            continue
        key = trial.branch.key(step)
        if key not in by_key:
            by_key[key] = _probe(trial, len(by_key) + 1, step, steps)
        found[trial.name] = by_key[key]
    return found


def _probe(trial: PlannedTrial, number: int, step: int, steps: int) -> PlannedTrial:
    # `steps` has the settings of the probe; the fields only have to be valid for its length.
    experiment = trial.experiment.replace(
        name=f"probe-{number}",
        train__max_steps=step + steps,
        train__global_batch_size=trial.experiment.batch_sizes.at(0),
        train__batch_schedule=None,
        schedule=ScheduleSection(kind="constant", max_lr=trial.experiment.schedule.max_lr),
        optim__momentum_warmup_steps=0,
    )
    name = f"probe~{number}"  # a name that no trial can have
    return replace(
        trial,
        name=name,
        setting=name,
        experiment=experiment,
        steps=replace(trial.steps, anneal_at=step, anneal_steps=steps),
        is_probe=True,
    )


def worse_trials(
    losses: Mapping[str, list[float]], settings: Mapping[str, str], margin: float
) -> dict[str, str]:
    """Return the trials whose probes end above the best one by more than the margin, with a reason.

    Args:
        losses: Final losses of the probes of each setting, one for each seed that has one. A probe
            that diverged counts as infinite.
        settings: The setting of each trial that has a probe.
        margin: `sweep.probe_margin`, in nats.
    """
    means = {setting: sum(values) / len(values) for setting, values in losses.items() if values}
    least = min(means.values(), default=0.0)
    worse = {}
    for trial, setting in settings.items():
        mean = means.get(setting)
        if mean is not None and mean > least + margin:
            worse[trial] = (
                f"its probe ended at {mean:.4f}, more than sweep.probe_margin={margin:g} above the "
                f"best probe's {least:.4f}"
            )
    return worse
