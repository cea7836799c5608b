"""A run whose folder is removed, moved or replaced ends, and writes nothing in its place."""

import os
import shutil

import pytest

from orchestrator import files, folders
from orchestrator.errors import EXIT_DONE
from tests.helpers.local_job import start


def remove(path):
    """Remove the folder at once; the thread that saves checkpoints may write to it."""
    path.rename(path.with_name("elsewhere"))
    shutil.rmtree(path.with_name("elsewhere"))


def replace(path):
    path.rename(path.with_name("elsewhere"))
    path.mkdir()


@pytest.mark.parametrize(
    ("move", "left"),
    [
        (remove, []),
        (lambda path: path.rename(path.with_name("elsewhere")), ["elsewhere"]),
        (replace, ["elsewhere", "run"]),
    ],
)
def test_run_ends_and_writes_nothing_in_place_of_its_folder(
    without_ray, tokens, tmp_path, move, left
):
    def act(line):
        if line["step"] == 9:
            move(tmp_path / "run")

    with pytest.raises(folders.MovedError, match="removed or moved while its run was going on"):
        start(tmp_path, tokens, act=act)
    assert sorted(set(os.listdir(tmp_path)) - {"mlflow"}) == left
    if "run" in left:
        assert os.listdir(tmp_path / "run") == []
    if "elsewhere" in left:  # put back, it goes on
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        (tmp_path / "elsewhere").rename(tmp_path / "run")
        assert start(tmp_path, tokens) == EXIT_DONE


def test_only_files_in_a_held_folder_are_refused(tmp_path):
    held, other = tmp_path / "run", tmp_path / "run-2"
    for folder in (held, other):
        folder.mkdir()
    with folders.holding(held):
        files.write_atomically(held / "a", "1")
        held.rename(tmp_path / "moved")
        held.mkdir()
        files.write_atomically(other / "a", "1")
        for write in (
            lambda: files.write_atomically(held / "a", "1"),
            lambda: open(held / "b", "a", opener=files.opener),  # noqa: SIM115
            lambda: folders.make_folder(held / "c" / "d"),
            lambda: files.replace_symlink(held / "e", other),
        ):
            with pytest.raises(folders.MovedError):
                write()
        assert os.listdir(held) == []
    files.write_atomically(held / "a", "1")
