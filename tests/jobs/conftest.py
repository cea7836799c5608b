"""What a job needs to run without Ray."""

import pytest

from tests.helpers import local_job


@pytest.fixture(scope="session")
def tokens(tiny_corpus, tiny_dataset):
    """Overrides for the small corpus and its prepared tokens."""
    return [f"data.corpus={tiny_corpus}", f"data.dir={tiny_dataset}"]


@pytest.fixture(scope="module")
def without_ray():
    """Let a `LocalTrainJob` run."""
    with local_job.without_ray():
        yield
