"""Asks optuna for trials, one sample after the other, and tells it how they ended. The only user of optuna.

Eats `sweep.space`; yields values of fields. `samples.jsonl` in the sweep's folder remembers every sample before it is run:
a sweep that goes on has the samples that it had, and optuna is told their losses again.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.errors import UserError
from orchestrator.files import fsync, write_atomically
from orchestrator.sweep.dimensions import Choices, Range, dimension


class Sampler:
    """`earlier` are the samples that the folder knows; `ask` gives a new one and its number, `tell` its loss."""

    def __init__(self, folder: Path, space: Mapping[str, Any], seed: int):
        optuna = _optuna()
        self.file = folder / "samples.jsonl"
        self.distributions = {
            key: _distribution(dimension(key, words)) for key, words in space.items()
        }
        # What follows the last newline is empty or torn: nobody has acted on it.
        lines = self.file.read_text("utf-8").split("\n")[:-1] if self.file.exists() else []
        self.earlier: list[dict[str, Any]] = [json.loads(line) for line in lines]
        # Samples drawn after a restart must not be those drawn before it.
        self.study = optuna.create_study(
            sampler=optuna.samplers.TPESampler(seed=seed + len(self.earlier))
        )
        self.asked: dict[int, Any] = {}
        self.told: set[int] = set()

    def ask(self) -> tuple[int, dict[str, Any]]:
        """A new sample: its number and the value of each field, noted before anyone acts on it."""
        trial, number = self.study.ask(self.distributions), len(self.earlier)
        values = {key: _plain(trial.params[key]) for key in self.distributions}
        self.asked[number] = trial
        self.earlier.append(values)
        write_atomically(self.file, "".join(json.dumps(v) + "\n" for v in self.earlier))
        fsync(self.file)
        return number, values

    def tell(self, number: int, loss: float | None) -> None:
        """How sample `number` ended; None: without a loss. Said once, whoever asked for it."""
        optuna = _optuna()
        if number in self.told:
            return
        self.told.add(number)
        state = optuna.trial.TrialState.FAIL if loss is None else optuna.trial.TrialState.COMPLETE
        if number in self.asked:
            self.study.tell(self.asked[number], loss, state=state)
        else:
            with contextlib.suppress(
                ValueError
            ):  # asked before a restart, of a space that it does not lie in any more
                self.study.add_trial(
                    optuna.trial.create_trial(
                        state=state,
                        value=loss,
                        params=self.earlier[number],
                        distributions=self.distributions,
                    )
                )


def check() -> None:
    """Refuse a sweep that needs optuna where there is none."""
    _optuna()


def _optuna():
    try:
        import optuna
    except ImportError:
        raise UserError(
            "sweep.sampler: optuna is not installed; pip install 'espalier[optuna]', or use random"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(one: Choices | Range):
    d = _optuna().distributions
    if isinstance(one, Choices):
        return d.CategoricalDistribution(one.values)
    if one.integer:
        return d.IntDistribution(int(one.low), int(one.high), log=one.log, step=int(one.step or 1))
    return d.FloatDistribution(one.low, one.high, log=one.log, step=one.step)


def _plain(value: Any) -> Any:
    """Floats with as many digits as other samples have; they travel as JSON."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
