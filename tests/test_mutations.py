"""The mistakes of mutations.toml fit the code."""

import pytest

from tests.mutations import REPO, mutations


@pytest.mark.parametrize("mutation", mutations(), ids=lambda mutation: mutation.wrong)
def test_mistake_can_be_made(mutation):
    assert (REPO / mutation.file).read_text("utf-8").count(mutation.old) == 1
    assert all((REPO / name).exists() for name in mutation.tests.split())
