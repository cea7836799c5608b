"""Sections of an experiment that say where it runs and where it is shown."""

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.config.fields import Effect, Section, Steps, Text


class Compute(Section):
    """Workers and their devices."""

    effect = Effect.NOTHING

    num_workers: Steps | Literal["auto"] | Annotated[list[Steps], Field(min_length=1)] = Field(
        "auto",
        description="training processes, up to the number of reduction slots; auto: as few as make "
        "the shortest steps on the GPUs that there are, or 1 without GPUs; a list such as [1, 2]: "
        "the largest of these for which there is room, also while nodes come and go",
    )
    cpus_per_worker: Steps | Literal["auto"] = Field(
        "auto",
        description="CPUs and torch threads of each worker; auto: all for one worker without a "
        "GPU, else 1",
    )
    hang_after_s: float = Field(
        30.0,
        gt=0,
        description="a worker hangs if one phase of a step takes more than this many seconds and "
        "more than ten times its longest duration so far",
    )
    wait_for_nodes_s: float = Field(
        1800.0,
        gt=0,
        description="seconds that a run waits for room for its workers; then status 75",
    )
    use_gpu: bool | Literal["auto"] = Field(
        "auto", description="one GPU per worker; auto: if the cluster has GPUs"
    )

    @property
    def worker_counts(self) -> list[int]:
        """The permitted numbers of workers; empty: auto."""
        if self.num_workers == "auto":
            return []
        return self.num_workers if isinstance(self.num_workers, list) else [self.num_workers]


class Tracking(Section):
    """The MLflow server."""

    effect = Effect.NOTHING

    uri: Text | None = Field(
        None,
        description="MLflow tracking URI; null: $MLFLOW_TRACKING_URI, else sqlite in the storage",
    )
    experiment: Text = Field("espalier", description="name of the MLflow experiment")
    alert: Literal["all", "problems", "never"] = Field(
        "all",
        description="what is sent as JSON to the webhook $ESPALIER_ALERT_URL, if it is set: that a "
        "run, a sweep or a trial failed or diverged, or that a run or sweep hangs, waits or "
        "finished; problems: all but finished",
    )
