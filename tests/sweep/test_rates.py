"""Learning rates of a trial: its schedule, another run's before the branch, an anneal to zero."""

import json

import pytest

from model.schedule import Schedule, learning_rate
from orchestrator.sweep.rates import Rates, from_json

COSINE = Schedule("cosine", 1.0, 0.1, warmup_steps=3, decay_steps=20)
WSD = Schedule("wsd", 0.5, 0.0, warmup_steps=3, decay_steps=30, decay_fraction=0.2)


def test_rates_without_branch_are_the_schedule():
    assert list(Rates(COSINE).first(25)) == [learning_rate(COSINE, n) for n in range(25)]


def test_rates_before_the_branch_are_those_of_the_other_run():
    rates = list(Rates(COSINE, before=WSD, splice=7).first(20))
    assert rates == [learning_rate(WSD, n) for n in range(7)] + [
        learning_rate(COSINE, n) for n in range(7, 20)
    ]


def test_anneal_equals_a_wsd_run_with_a_linear_decay_to_zero():
    trunk = Schedule("wsd", 0.5, 0.0, warmup_steps=3, decay_steps=100)
    probe = Rates(trunk, anneal_at=24, anneal_steps=6)
    assert list(probe.first(30)) == pytest.approx(list(Rates(WSD).first(30)), rel=1e-12)
    # The trials share these steps, so their rates have the same bits.
    assert list(probe.first(25)) == list(Rates(trunk).first(25))
    assert probe(30) == 0.0


@pytest.mark.parametrize(
    "rates", [Rates(COSINE), Rates(COSINE, WSD, 7), Rates(WSD, anneal_at=5, anneal_steps=3)]
)
def test_json_restores_the_same_bits(rates):
    again = from_json(json.loads(json.dumps(rates.to_json())))
    assert again == rates
    assert again.first(40).tobytes() == rates.first(40).tobytes()
