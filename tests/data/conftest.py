"""Fixtures of the tests about data."""

from pathlib import Path

import pytest

from tests.helpers.datasets import write_mixed
from tests.helpers.here import here


@pytest.fixture(name="here")
def _here():
    """Run preparations in this process, without Ray."""
    with here():
        yield


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A corpus with every kind of file."""
    write_mixed(tmp_path / "mixed")
    return tmp_path / "mixed"
