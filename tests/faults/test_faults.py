"""Runs whose processes are killed at drawn moments have the same bits as undisturbed ones."""

import random

import pytest

from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from tests.faults import hooks
from tests.faults.campaign import Campaign
from tests.faults.case import Case, outcome
from tests.faults.kinds import KINDS, Fault, draw
from tests.faults.rank import TIMEOUT_S

SEED = 4
KILLS = 30


@pytest.fixture(scope="module")
def campaign(tiny_dataset, tmp_path_factory) -> Campaign:
    """Without SIGSTOP, which costs seconds of waiting: `test_stopped_rank_…` has some."""
    return Campaign(
        SEED,
        tmp_path_factory.mktemp("faults"),
        tiny_dataset,
        tuple(k for k in KINDS if k != "hang"),
    )


def test_thirty_kills_change_no_bit(campaign):
    reports = []
    for report in campaign.reports():
        reports.append(report)
        assert not report.problems, (
            f"seed {SEED}, {report.name}: {report.problems} after {[m.what for m in report.met]}"
        )
        kinds = {
            m.kind for r in reports for m in r.met
        }  # which of those drawn are met depends on the machine, too
        if sum(m.kills for r in reports for m in r.met) >= KILLS and len(kinds) > len(KINDS) / 2:
            break
        assert len(reports) < KILLS, f"the kinds are not mixed: {sorted(kinds)}"


@pytest.mark.parametrize("moment", ["before forward", "before batch", "after batch"])
def test_stopped_rank_is_named_and_the_run_goes_on(campaign, moment):
    case = Case(
        campaign.forge,
        campaign.folder / f"hang {moment}",
        campaign.data_dir,
        ["train.log_interval=1"],
    )
    assert not case.attempt(2, Fault("hang", 2, 1, moment, 24, patience=5.0))
    assert not case.report.problems, (
        "a hang was met that the watchdog did not find, or of which it named another rank"
    )
    assert case.attempt(1, None)
    (met,) = case.report.met
    assert met.again_s < TIMEOUT_S / 2, "gloo ended it"
    assert list((case.run_dir / "hangs").glob("0001/hang-rank*.txt"))


def test_campaign_reports_a_difference(campaign):
    case = Case(
        campaign.forge, campaign.folder / "other", campaign.data_dir, ["train.log_interval=1"]
    )
    assert case.attempt(1, None)
    golden = outcome(case.run_dir)
    case.compare(golden)
    assert case.report.problems == []
    lines = journal.read(RunFolder(case.run_dir))
    journal.Journal(RunFolder(case.run_dir)).write(lines[-1])
    case.compare(golden)
    assert case.report.problems == ["curve differs from the golden run's"]
    case.compare(golden | {"optimizer.safetensors": b""})
    assert "optimizer.safetensors differs from the golden run's" in case.report.problems


def test_seed_draws_the_same_faults_and_all_kinds():
    first, second = random.Random(1), random.Random(1)
    faults = [f for _ in range(500) for f in draw(first)]
    assert faults == [f for _ in range(500) for f in draw(second)]
    assert {f.kind for f in faults} == set(KINDS)
    assert {f.world for f in faults} == {1, 2, 4}


def test_every_moment_is_a_function_of_the_product():
    for owner, attribute in hooks.POINTS.values():
        assert callable(getattr(owner, attribute, None)), f"{owner}.{attribute} was renamed"
