"""Names become paths: none leads out of its folder, also if symlinks were planted there."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.files import write_atomically
from orchestrator.sweep.space.expand import load_sweep
from orchestrator.sweep.space.names import trial_name
from tests.helpers.checkpoints import save
from tests.helpers.facts import FACTS

ROOT = Path("/storage/runs")
PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
ODD = [*"ab1._-/\\~ \0\n:*$`'\"", "..", "../", "%2e", "\u2215", "ä", "\u202e"]
names = st.lists(st.sampled_from(ODD), max_size=12).map("".join) | st.text(max_size=140)


def stays(name: str) -> None:
    """Assert that a folder of this name is directly below its root and not hidden."""
    assert PLAIN.fullmatch(name)
    assert Path(os.path.normpath(ROOT / name)).parent == ROOT
    assert not name.startswith(".")
    assert len(name.encode()) < 256


@given(name=names)
@example(name="..")
@example(name=".hidden")
@example(name="a/../../b")
@example(name="a\n")
@example(name="/etc")
@example(name="~")
def test_name_of_a_run_is_plain_or_refused(name):
    try:
        found = load_experiment(None, [f"name={json.dumps(name)}"]).name
    except UserError:
        return
    assert found == name
    stays(found)


@given(name=names)
@example(name="..")
@example(name="../x")
@example(name=".hidden")
def test_name_of_a_trial_is_plain_or_refused(name):
    trials = json.dumps({name: {"train": {"seed": 1}}, "other": {"train": {"seed": 2}}})
    try:
        sweep = load_sweep(None, [f"sweep.trials={trials}"])
    except UserError:
        return
    for spec in sweep.trials:
        stays(spec.name)


@given(
    fields=st.dictionaries(
        st.sampled_from(["data.corpus", "data.tokenizer", "schedule.max_lr", "train.init_from"]),
        names | st.floats(allow_nan=False) | st.integers() | st.booleans() | st.none(),
        min_size=1,
    )
)
@example(fields={"data.corpus": ".."})
@example(fields={"data.corpus": "../../etc/passwd"})
def test_name_of_a_trial_made_from_its_values_is_plain(fields):
    stays(trial_name(fields))


# ---- planted symlinks ----

WRITES = [
    lambda path: write_atomically(path, b"new"),
    lambda path: write_atomically(path, "new", durable=True),
    lambda path: load_tokenizer("byte").save(path.parent),
]


@pytest.fixture
def victim(tmp_path) -> Path:
    """A folder with a file, outside of the folders that are written; it must not change."""
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "precious.txt").write_text("as it was")
    yield folder
    assert [(f.name, f.read_text()) for f in folder.iterdir()] == [("precious.txt", "as it was")]


@pytest.mark.parametrize(
    "link",
    ["step-00000001", ".step-00000009.1-abc", ".step-00000001.aside", ".step-00000003.aside"],
)
def test_removing_checkpoints_follows_no_symlink(tmp_path, victim, link):
    folder = tmp_path / "checkpoints"
    for step in (2, 3):
        save(folder, step, {"model": {"a": torch.ones(2)}}, {}, FACTS)
    (folder / link).symlink_to(victim, target_is_directory=True)
    checkpoint.latest_valid(folder, lambda _: None)
    checkpoint.prune(folder, 1)
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    assert checkpoint.latest_valid(folder, lambda _: None) == folder / "step-00000003"


@pytest.mark.parametrize("write", WRITES)
def test_symlink_is_replaced_and_its_target_stays(tmp_path, victim, write):
    path = tmp_path / "run" / "tokenizer.json"
    path.parent.mkdir()
    path.symlink_to(victim / "precious.txt")
    write(path)
    assert not path.is_symlink()
    assert path.read_text() != "as it was"


@pytest.mark.parametrize("write", WRITES)
def test_name_of_a_temporary_file_cannot_be_guessed(tmp_path, victim, write):
    path = tmp_path / "run" / "tokenizer.json"
    path.parent.mkdir()
    (path.parent / f".{path.name}.{os.getpid()}").symlink_to(victim / "precious.txt")
    write(path)


@pytest.mark.parametrize("to", ["victim", "nowhere"])
def test_checkpoint_replaces_a_symlink_of_its_name(tmp_path, victim, to):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00000001").symlink_to(tmp_path / to, target_is_directory=True)
    saved = save(folder, 1, {"model": {"a": torch.ones(2)}}, {}, FACTS)
    assert not saved.is_symlink()
    checkpoint.verify(saved)
