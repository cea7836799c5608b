"""The campaign notices each of these mistakes, and nothing where there is none."""

from pathlib import Path

import pytest

from tests.faults.breaks import BREAKS
from tests.faults.campaign import Campaign, make_source

SEED = 1
CASES = 3  # at most, until a problem is found
STARTS = (2, 3)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


def problems(source: Path, path: Path, kinds: tuple[str, ...], breaks: str | None) -> list[str]:
    """Run cases until one has a problem."""
    campaign = Campaign(SEED, path, source, kinds, breaks, STARTS)
    for number in range(CASES):
        found = campaign.case(number).problems
        if found:
            return found
    return []


@pytest.mark.parametrize("name", BREAKS)
def test_broken_product_is_noticed(source, tmp_path, name):
    broken = BREAKS[name]
    found = problems(source, tmp_path, broken.kinds, name)
    assert any(problem.startswith(broken.shows) for problem in found), found


@pytest.mark.parametrize("kinds", sorted({broken.kinds for broken in BREAKS.values()}))
def test_the_same_faults_are_no_problem_for_the_product(source, tmp_path, kinds):
    assert problems(source, tmp_path, kinds, None) == []
