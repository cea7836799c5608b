"""What a job needs to run without Ray."""

import pytest

from orchestrator.cluster.layout import Node


@pytest.fixture(scope="session")
def tokens(tiny_corpus, tiny_dataset):
    """Overrides for the small corpus and its prepared tokens."""
    return [f"data.corpus={tiny_corpus}", f"data.dir={tiny_dataset}"]


@pytest.fixture(scope="module")
def without_ray():
    """Let a `LocalTrainJob` run: a cluster of one CPU, and no estimate, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orchestrator.cluster.layout._nodes", lambda: [Node(1)])
        patch.setattr("orchestrator.jobs.train.estimate_of", lambda *_: None)
        patch.setattr("orchestrator.track.sender.POLL_S", 0.1)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield
