"""A folder with what a run writes, and a mirror whose times are short."""

import json

import pytest

from orchestrator.mirror import lock, upload
from orchestrator.runs.folder import RunFolder
from tests.helpers.mirrored import add_checkpoint


@pytest.fixture
def fast(monkeypatch):
    """Let a holder of a lock show often that it lives. Copies are made by `sync` and `finish`."""
    monkeypatch.setattr(upload, "POLL_S", 600)
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "POLL_S", 0.02)


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A folder with what a run writes."""
    folder = RunFolder(tmp_path / "here" / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.run_file.write_text(json.dumps({"key": "k"}))
    folder.journal_file.write_text('{"step": 1}\n')
    add_checkpoint(folder, 4)
    return folder
