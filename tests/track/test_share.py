"""A sqlite database on a network file system is warned of."""

from types import SimpleNamespace

import psutil
import pytest

from orchestrator.track.server import share_warning

MOUNTS = {"/": "ext4", "/mnt": "tmpfs", "/mnt/share": "nfs4", "/mnt/share/local": "xfs"}


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("sqlite:////mnt/share/runs/mlflow/mlflow.db", "nfs4"),
        ("sqlite:////mnt/share/local/mlflow.db", None),
        ("sqlite:////mnt/shared/mlflow.db", None),
        ("sqlite:////home/me/mlflow.db?timeout=5", None),
        ("http://127.0.0.1:5000", None),
        ("postgresql://host/mlflow", None),
    ],
)
def test_database_on_a_share_is_warned_of(monkeypatch, uri, kind):
    mounts = [SimpleNamespace(mountpoint=path, fstype=name) for path, name in MOUNTS.items()]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    warning = share_warning(uri)
    assert (warning is not None) == (kind is not None)
    if kind is not None:
        assert f"/mnt/share/runs/mlflow/mlflow.db is on a network file system ({kind})" in warning
