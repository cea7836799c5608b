"""Ask optuna for samples of `sweep.space`, and report their losses. Only this module uses optuna.

Every sample is written to `samples.jsonl` in the folder of the sweep before it is trained. A
continued sweep keeps its samples, and reports their losses to optuna again.
"""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UserError
from orchestrator.files import write_atomically
from orchestrator.own_files import present
from orchestrator.runs.folder import SweepFolder
from orchestrator.sweep.space.dimensions import Choices, Range, dimension

if TYPE_CHECKING:
    import optuna

DIGITS = 6  # of a float, as in random samples
_SAMPLE = re.compile(r"sample-(\d+)")


class Sampler:
    """Samples of a sweep.

    Args:
        folder: Folder of the sweep.
        space: `sweep.space`.
        seed: Seed of the sampler.
        model: Kind of the model.

    Attributes:
        earlier: The values of all samples, by their number.
    """

    def __init__(
        self, folder: SweepFolder, space: Mapping[str, Any], seed: int, model: str
    ) -> None:
        optuna = require_optuna()
        self.file = folder.optuna_file
        self._trial_names = [trial.name for trial in folder.trials()]
        self.distributions = {
            key: _distribution(dimension(key, words, model)) for key, words in space.items()
        }
        self.earlier = self._read()
        # A new seed after each restart: with the old one, optuna would draw the same samples again.
        sampler = optuna.samplers.TPESampler(seed=seed + len(self.earlier))
        self.study = optuna.create_study(sampler=sampler)
        self.asked: dict[int, Any] = {}  # optuna's trials
        self.told: set[int] = set()

    def _read(self) -> list[dict[str, Any]]:
        lines = self.file.read_bytes().split(b"\n")[:-1] if self.file.exists() else []
        try:
            samples = [json.loads(line) for line in lines]
        except ValueError:
            samples = []
        for sample in samples:
            if "optim.kind" in sample:  # a file of the user, which may have been edited
                sample["optim.kind"] = present("optim", sample["optim.kind"])
        used = [int(match[1]) for match in map(_SAMPLE.match, self._trial_names) if match]
        if len(samples) <= max(used, default=-1):
            raise UserError(
                f"{self.file}: empty, cut or overwritten: sample-{len(samples)} is missing, which "
                "has a trial; restore the file, or give the sweep a new name (name=…)"
            )
        return samples

    def ask(self) -> tuple[int, dict[str, Any]]:
        """Return the number of a new sample and its values, after they were written to disk."""
        trial = self.study.ask(self.distributions)
        number = len(self.earlier)
        values = {key: _rounded(trial.params[key]) for key in self.distributions}
        self.asked[number] = trial
        self.earlier.append(values)
        lines = [json.dumps(sample) + "\n" for sample in self.earlier]
        write_atomically(self.file, "".join(lines), durable=True)
        return number, values

    def tell(self, number: int, loss: float | None) -> None:
        """Tell optuna the loss of a sample once; None if it has none."""
        optuna = require_optuna()
        if number in self.told:
            return
        self.told.add(number)
        states = optuna.trial.TrialState
        state = states.FAIL if loss is None else states.COMPLETE
        if number in self.asked:
            self.study.tell(self.asked[number], loss, state=state)
            return
        try:
            trial = optuna.trial.create_trial(
                state=state,
                value=loss,
                params=self.earlier[number],
                distributions=self.distributions,
            )
            self.study.add_trial(trial)
        except ValueError:
            pass  # drawn before a restart, from a space that has changed since


def require_optuna() -> Any:
    """Import optuna, which takes a second and need not be installed."""
    try:
        import optuna
    except ImportError:
        raise UserError(
            "sweep.sampler: optuna is not installed; pip install 'espalier[optuna]', or use random"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(dimension: Choices | Range) -> "optuna.distributions.BaseDistribution":
    kinds = require_optuna().distributions
    if isinstance(dimension, Choices):
        return kinds.CategoricalDistribution(dimension.values)
    low = dimension.low
    high = dimension.high
    if dimension.integer:
        step = int(dimension.step or 1)
        return kinds.IntDistribution(int(low), int(high), log=dimension.log, step=step)
    return kinds.FloatDistribution(low, high, log=dimension.log, step=dimension.step)


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
