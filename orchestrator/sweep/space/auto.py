"""What `auto` stands for in the trials of a sweep."""

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.cluster.dtypes import suitable
from orchestrator.cluster.layout import Layout
from orchestrator.config.fields import AUTO
from orchestrator.config.sections import Train
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.runs.identity import recorded_train
from orchestrator.sweep.space.expand import Trial
from orchestrator.workers.fitting import with_known_size


class AutoValues:
    """Replaces `auto` in the section `train` of trials.

    A trial that has not begun gets the values of those that have, to be comparable.

    Args:
        folder: Folder of the sweep.
        layout: Workers of each stage.
        source: Folder of the run that the sweep branches off, if there is one.
    """

    def __init__(self, folder: SweepFolder, layout: Layout, source: RunFolder | None) -> None:
        self.folder = folder
        self.layout = layout
        self.source = source
        # The type of trials that have begun, by the one that suits the workers now.
        self._dtypes: dict[str, str] = {}
        self._size = layout.micro_batch_size

    def put_into(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials with values. A micro-batch that was not measured stays `auto`.

        Raises:
            UserError: A trial's batches do not fit the micro-batch of those that have begun.
        """
        recorded = {trial.name: self._recorded(trial) for trial in trials}
        return [self._with_values(trial, recorded[trial.name]) for trial in trials]

    def _recorded(self, trial: Trial) -> Train | None:
        """Return what a trial has begun with; None if it has not, or has no `auto`."""
        train = trial.experiment.train
        if AUTO not in (train.dtype, train.micro_batch_size):
            return None
        recorded = recorded_train(self.source or self.folder.trial(trial.name))
        if recorded is not None and train.dtype == AUTO:
            self._dtypes[suitable(trial.experiment, self.layout)] = recorded.dtype
        if recorded is not None and train.micro_batch_size == AUTO:
            self._size = recorded.micro_batch_size
        return recorded

    def _with_values(self, trial: Trial, recorded: Train | None) -> Trial:
        train = trial.experiment.train
        dtype: str = train.dtype
        if dtype == AUTO:
            suited = suitable(trial.experiment, self.layout)
            dtype = recorded.dtype if recorded else self._dtypes.get(suited, suited)
        size = recorded.micro_batch_size if recorded else self._size
        experiment = with_known_size(
            trial.experiment.replace(train__dtype=dtype), size, f"trial {trial.name}: "
        )
        return replace(trial, experiment=experiment)
