"""Where a worker finds the run."""

import pytest

from orchestrator.errors import UserError
from orchestrator.objects.address import parse
from orchestrator.runs.folder import RunFolder
from orchestrator.workers import places


@pytest.mark.parametrize(
    ("mirror", "says"),
    [
        (None, "storage: .* has no run in .*/run; mount the same folder on all nodes"),
        ("s3://bucket/m", "storage: s3://bucket/m on several nodes needs a worker on the machine"),
    ],
)
def test_rank_0_without_the_folder_of_the_run_is_refused(tmp_path, monkeypatch, mirror, says):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = RunFolder(tmp_path / "run")
    address = None if mirror is None else parse("mirror", mirror)
    config = places.of_driver(folder, tmp_path / "data", address) | {"key": "that of the driver"}
    with pytest.raises(UserError, match=says) as refused:
        places.find(config, 0)
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "cache").exists()
