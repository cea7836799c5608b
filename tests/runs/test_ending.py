"""How something ended: exit status, MLflow's status and the stored form."""

import pytest

from orchestrator.files import replacement, write_json
from orchestrator.runs.ending import Ending


@pytest.mark.parametrize(
    ("kind", "exit_status", "mlflow_status"),
    [
        ("done", 0, "FINISHED"),
        ("failed", 1, "FAILED"),
        ("user", 2, "FAILED"),
        ("again", 75, "KILLED"),
        ("interrupted", 130, "KILLED"),
        ("diverged", 1, "FAILED"),
        ("stopped", 0, "KILLED"),
    ],
)
def test_statuses(kind, exit_status, mlflow_status):
    assert Ending(kind).exit_status == exit_status
    assert Ending(kind).mlflow_status == mlflow_status


@pytest.mark.parametrize(
    "ending",
    [
        Ending("again", "asked to stop after step 3", {"step": 3}),
        Ending("user", "the disk is full", cause="disk_full"),
        Ending("failed", "rank 1 hung", {"traceback": "…"}, "hang"),
    ],
)
def test_stored_ending_is_read_back(folder, ending):
    folder.write_ending(ending)
    assert folder.read_ending() == ending


@pytest.mark.parametrize(
    ("stored", "kind", "facts"),
    [
        ({"reason": "r", "again": True, "step": 3}, "again", {"step": 3}),
        ({"reason": "r", "user": True}, "user", {}),
        ({"reason": "r", "windows": [1]}, "diverged", {"windows": [1]}),
        ({"reason": "r", "outcome": "stopped"}, "stopped", {"outcome": "stopped"}),
        ({"reason": "r"}, "failed", {}),
    ],
)
def test_files_of_earlier_versions_are_read(folder, stored, kind, facts):
    write_json(folder.ending_file, stored)
    assert folder.read_ending() == Ending(kind, "r", facts)


def test_folder_of_a_running_job_has_no_ending(folder):
    assert folder.read_ending() is None


def test_error_of_a_full_disk_names_the_file(tmp_path):
    def write() -> None:
        with replacement(tmp_path / "file", durable=False) as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_bytes(b"x")

    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/file'"):
        write()
    assert list(tmp_path.iterdir()) == []
