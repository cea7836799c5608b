"""What is saved comes back bit for bit, and a checkpoint that was changed is refused."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint import format as checkpoint_format
from orchestrator.checkpoint import store
from orchestrator.errors import UserError
from tests.helpers.checkpoints import commit, flip, holds, save
from tests.helpers.facts import FACTS
from tests.helpers.open_files import resident

PARTS = ("MANIFEST.json", "experiment.yaml", "model.safetensors", "optimizer.safetensors")


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


# ---- round trip ----


def test_saved_tensors_come_back_bit_for_bit(tmp_path):
    odd = {
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "empty": torch.zeros(0, 3),
        "half": torch.ones(2).bfloat16(),
        "view": torch.arange(12.0).view(3, 4).t(),
        "int": torch.tensor(2**53 + 1),
    }
    directory = tmp_path / "checkpoints"
    facts = {"x": [1], **FACTS}
    path = save(directory, 3, {"model": odd, "optimizer": {}}, {"a.json": "ä"}, facts)
    manifest = store.verify(path)
    assert path == store.path_of(directory, 3)
    assert (manifest["step"], manifest["x"]) == (3, [1])
    assert set(manifest["parts"]) == {"model.safetensors", "optimizer.safetensors", "a.json"}
    assert (path / "a.json").read_text("utf-8") == "ä"
    loaded = store.load_tensors(path, "model")
    assert set(loaded) == set(odd)
    for name, value in odd.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert raw(loaded[name]) == raw(value)
    assert store.load_tensors(path, "optimizer") == {}


def test_commit_leaves_nothing_beside_the_checkpoint(tmp_path):
    commit(tmp_path, 1)
    commit(tmp_path, 1, seed=5)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert holds(tmp_path / "step-00000001", 5)


def test_stored_weights_have_the_hash_of_the_loaded_ones(tmp_path):
    path = commit(tmp_path, 1)
    expected = store.weights_sha256(store.load_tensors(path, "model"))
    assert store.stored_weights_sha256(path) == expected


def test_hash_of_weights_is_over_sorted_names_and_float32_bytes():
    weights = {"b": torch.tensor([1.5, -2.0]), "a": torch.tensor([[0.5]])}
    content = b"a" + b"\x00\x00\x00\x3f" + b"b" + b"\x00\x00\xc0\x3f\x00\x00\x00\xc0"
    expected = hashlib.sha256(content).hexdigest()
    assert store.weights_sha256(weights) == expected
    assert store.weights_sha256(dict(reversed(weights.items()))) == expected
    assert store.weights_sha256({k: v.bfloat16() for k, v in weights.items()}) == expected
    assert store.weights_sha256({**weights, "b": torch.tensor([1.5, 2.0])}) != expected


# ---- damage ----


@pytest.mark.parametrize("part", PARTS)
def test_change_of_any_byte_is_detected(tmp_path, part):
    file = commit(tmp_path, 1, loss=1e-05) / part
    content = file.read_bytes()
    for position in range(len(content)):
        file.write_bytes(flip(content, position, position % 8))
        with pytest.raises(UserError):
            store.verify(file.parent)
    file.write_bytes(content)
    store.verify(file.parent)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder with checkpoints of the steps 1 and 2."""
    directory = tmp_path_factory.mktemp("two")
    commit(directory, 1)
    commit(directory, 2)
    return directory


@given(
    part=st.sampled_from(PARTS),
    place=st.floats(0, 1, exclude_max=True),
    kind=st.sampled_from(["flip", "cut", "burst"]),
    bit=st.integers(0, 7),
)
def test_damage_is_detected_and_the_checkpoint_before_is_taken(two, part, place, kind, bit):
    file = store.path_of(two, 2) / part
    content = file.read_bytes()
    position = int(place * len(content))
    damaged = {
        "flip": flip(content, position, bit),
        "cut": content[:position],
        "burst": content[:position]
        + bytes(byte ^ 0xFF for byte in content[position : position + 9])
        + content[position + 9 :],
    }[kind]
    messages: list[str] = []
    file.write_bytes(damaged)
    try:
        assert store.latest_valid(two, messages.append) == store.path_of(two, 1)
        assert len(messages) == 1 and file.parent.name in messages[0]
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r", 1),
        lambda text: text + "\n",
        lambda text: text.replace(" ", "\t", 1),
        lambda text: text.replace("1e-05", "1E-05", 1),
        lambda text: text[:-1],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: '{"a":' * 100_000,
        lambda text: "9" * 1_000_000,
        lambda text: '{"step": 1e999999999}',
        lambda text: '"' + "x" * (1 << 20) + '"',
        lambda text: "\udcff",
    ],
)
def test_manifest_with_another_text_is_refused(tmp_path, change):
    file = commit(tmp_path, 1, loss=1e-05) / store.MANIFEST
    file.write_bytes(change(file.read_text("utf-8")).encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="MANIFEST"):
        store.verify(file.parent)


def test_parts_that_are_cut_longer_or_missing_are_named(tmp_path):
    path = commit(tmp_path, 1)
    for part in [file for file in sorted(path.iterdir()) if file.name != store.MANIFEST]:
        content = part.read_bytes()
        for wrong in (b"", content[:-1], content[: len(content) // 2], content + b"\0"):
            part.write_bytes(wrong)
            with pytest.raises(UserError, match=part.name):
                store.verify(path)
        part.unlink()
        with pytest.raises(UserError, match=f"{part.name}: missing"):
            store.verify(path)
        part.write_bytes(content)
    store.verify(path)


@pytest.mark.parametrize("number", [1, 2, 3, None])
def test_only_known_formats_are_read(tmp_path, number):
    path = commit(tmp_path, 1)
    parts = store.read_manifest(path)["parts"]
    text = checkpoint_format.manifest_text(1, parts, FACTS, number)
    (path / store.MANIFEST).write_text(text, "utf-8")
    with contextlib.nullcontext() if number in (1, 2) else pytest.raises(UserError, match="MANIF"):
        store.verify(path)


def test_folder_name_must_match_step_if_it_has_one(tmp_path):
    path = commit(tmp_path, 1)
    shutil.copytree(path, tmp_path / "step-00000002")
    shutil.copytree(path, tmp_path / "for-a-friend")
    with pytest.raises(UserError, match="checkpoint of step 1"):
        store.verify(tmp_path / "step-00000002")
    assert store.verify(tmp_path / "for-a-friend")["step"] == 1
    assert store.latest_valid(tmp_path, warn=[].append) == path


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["huge", "pipe", "endless", "folder"])
def test_part_that_is_not_a_plain_file_of_its_size_is_not_read(tmp_path, name, kind):
    before = commit(tmp_path, 1)
    file = commit(tmp_path, 2) / name
    file.unlink()
    if kind == "huge":  # sparse: it needs no space
        file.touch()
        os.truncate(file, 1 << 40)
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "endless":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    with bounded_memory():
        assert store.latest_valid(tmp_path, [].append) == before


@contextlib.contextmanager
def bounded_memory():
    """Fail if more than 300 MB are allocated."""
    Path("/proc/self/clear_refs").write_text("5")  # an earlier test may have had a higher peak
    before = resident("VmRSS")
    yield
    assert resident("VmHWM") - before < 300e6


# ---- names ----


@pytest.mark.parametrize(
    "name",
    ["step-000000003", "step-00000003\n", "step-٠٠٠٠٠٠٠٣", "step-00000003.bak", "step-3", "step-1"],
)
def test_names_that_only_look_like_a_checkpoint_are_ignored(tmp_path, name):
    path = commit(tmp_path / "checkpoints", 2)
    shutil.copytree(path, path.with_name(name))
    assert store.steps(path.parent) == [2]
    assert store.latest_valid(path.parent, pytest.fail) == path


def test_steps_beyond_eight_digits_are_in_order(tmp_path):
    for step in (100_000_000, 99_999_999):
        commit(tmp_path, step)
    assert store.steps(tmp_path) == [99_999_999, 100_000_000]


def test_manifest_is_json_with_the_fields_of_format_1(tmp_path):
    stored = json.loads((commit(tmp_path, 3) / store.MANIFEST).read_text("utf-8"))
    assert list(stored) == ["format", "step", "parts", "metrics", "fingerprints", "sha256"]
    assert (stored["format"], stored["step"]) == (1, 3)
    assert set(stored["parts"]["state.json"]) == {"size", "sha256"}
