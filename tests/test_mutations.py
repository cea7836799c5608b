"""The table of `python -m tests.mutations` fits the code."""

import pytest

from tests.mutations import REPO, mutations


@pytest.mark.slow
@pytest.mark.parametrize("mutation", mutations(), ids=lambda mutation: mutation.wrong)
def test_line_of_a_mistake_is_there_once(mutation):
    assert (REPO / mutation.file).read_text("utf-8").count(mutation.old) == 1
    assert all((REPO / file).exists() for file in mutation.tests.split())
