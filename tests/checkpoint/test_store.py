"""A checkpoint is whole or not there: what is written comes back, what was changed is refused, whoever dies when."""

import builtins
import contextlib
import errno
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import format as integrity
from orchestrator.checkpoint import store as checkpoint
from orchestrator.errors import NO_ROOM, UnreadableError, UserError
from orchestrator.runs.folder import RunFolder
from orchestrator.track import contents
from tests.helpers.facts import FACTS

# Every file-system call that a commit makes.
CALLS = [
    (os, name)
    for name in [
        "mkdir",
        "rename",
        "open",
        "write",
        "fsync",
        "close",
        "scandir",
        "unlink",
        "rmdir",
        "stat",
        "statvfs",
    ]
] + [(builtins, "open")]
FLIPS = int(os.environ.get("ESPALIER_FLIPS", "1000"))  # random ones; more for a campaign


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    model = {
        "wte": torch.randn(5, 3, generator=generator),
        "ln": torch.randn(3, generator=generator),
    }
    return {
        "model": model,
        "optimizer": {
            "wte/exp_avg": torch.randn(5, 3, generator=generator),
            "wte/step": torch.tensor(7.0),
        },
    }


def commit(directory: Path, step: int, seed: int | None = None, loss: float | None = None) -> Path:
    texts = {
        "state.json": json.dumps({"step": step}),
        "experiment.yaml": f"name: schön\nseed: {seed}\n",
    }
    return checkpoint.save(
        directory,
        step,
        tensors(step if seed is None else seed),
        texts,
        {"metrics": {} if loss is None else {"val/loss": loss}, **FACTS},
    )


def holds(path: Path, seed: int) -> bool:
    return all(
        torch.equal(value, checkpoint.load_tensors(path, group)[name])
        for group, values in tensors(seed).items()
        for name, value in values.items()
    )


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def hidden(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name.startswith("."))


def flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


# ---- round trip ----
def test_what_is_saved_verifies_and_comes_back_bit_for_bit(tmp_path):
    odd = {
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "none": torch.zeros(0, 3),
        "half": torch.ones(2).bfloat16(),
        "view": torch.arange(12.0).view(3, 4).t(),
        "whole": torch.tensor(2**53 + 1),
    }
    path = checkpoint.save(
        tmp_path / "new" / "checkpoints",
        3,
        {"model": odd, "optimizer": {}},
        {"a.json": "ä"},
        {"x": [1], **FACTS},
    )
    manifest = checkpoint.verify(path)
    assert path == checkpoint.path_of(tmp_path / "new" / "checkpoints", 3)
    assert (manifest["step"], manifest["x"]) == (3, [1])
    assert set(manifest["parts"]) == {"model.safetensors", "optimizer.safetensors", "a.json"}
    assert (path / "a.json").read_text("utf-8") == "ä"
    loaded = checkpoint.load_tensors(path, "model")
    assert set(loaded) == set(odd)
    for name, value in odd.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        assert raw(loaded[name]) == raw(value)
    assert checkpoint.load_tensors(path, "optimizer") == {}


def test_a_commit_leaves_nothing_beside_the_checkpoint(tmp_path):
    commit(tmp_path, 1)
    commit(tmp_path, 1, seed=5)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert holds(tmp_path / "step-00000001", 5)


def test_the_hash_of_weights_is_over_sorted_names_and_float32_bytes():
    weights = {"b": torch.tensor([1.5, -2.0]), "a": torch.tensor([[0.5]])}
    expected = hashlib.sha256(
        b"a" + b"\x00\x00\x00\x3f" + b"b" + b"\x00\x00\xc0\x3f\x00\x00\x00\xc0"
    ).hexdigest()
    assert checkpoint.weights_sha256(weights) == expected
    assert checkpoint.weights_sha256(dict(reversed(weights.items()))) == expected
    assert checkpoint.weights_sha256({k: v.bfloat16() for k, v in weights.items()}) == expected
    assert checkpoint.weights_sha256({**weights, "b": torch.tensor([1.5, 2.0])}) != expected


# ---- what was changed is refused ----
def test_every_changed_byte_of_every_part_is_detected(tmp_path):
    path, draw = commit(tmp_path, 1), random.Random(3)
    checkpoint.verify(path)
    undetected = []
    for part in sorted(path.iterdir()):
        content = part.read_bytes()
        for at in range(len(content)):
            part.write_bytes(flipped(content, at, draw.randrange(8)))
            with contextlib.suppress(UserError):
                checkpoint.verify(path)
                undetected.append((part.name, at))
        part.write_bytes(content)
    assert undetected == []
    checkpoint.verify(path)


def test_every_flipped_bit_of_the_manifest_is_detected(tmp_path):
    path = commit(tmp_path, 1, loss=1e-05)
    content = (path / checkpoint.MANIFEST).read_bytes()
    assert b"1e-05" in content
    for at in range(len(content)):
        for bit in range(8):
            (path / checkpoint.MANIFEST).write_bytes(flipped(content, at, bit))
            with pytest.raises(UserError, match="MANIFEST"):
                checkpoint.read_manifest(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r", 1),
        lambda text: text + "\n",
        lambda text: text.replace(" ", "\t", 1),
        lambda _: "",
        lambda _: "[]",
        lambda _: "null",
        lambda text: text[:-1],
        lambda text: text.replace("1e-05", "1E-05", 1),
    ],
)
def test_a_manifest_that_only_means_the_same_is_refused_too(tmp_path, change):
    path = commit(tmp_path, 1, loss=1e-05)
    text = (path / checkpoint.MANIFEST).read_text("utf-8")
    (path / checkpoint.MANIFEST).write_text(change(text), "utf-8")
    with pytest.raises(UserError, match="MANIFEST"):
        checkpoint.verify(path)


def test_a_truncated_a_longer_and_a_missing_part_are_named(tmp_path):
    path = commit(tmp_path, 1)
    for part in [p for p in sorted(path.iterdir()) if p.name != checkpoint.MANIFEST]:
        content = part.read_bytes()
        for wrong in (b"", content[:-1], content[: len(content) // 2], content + b"\0"):
            part.write_bytes(wrong)
            with pytest.raises(UserError, match=part.name):
                checkpoint.verify(path)
        part.unlink()
        with pytest.raises(UserError, match=f"{part.name}: missing"):
            checkpoint.verify(path)
        part.write_bytes(content)
    checkpoint.verify(path)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "..", ".", "", "a/../../secret", "sub/part", ".hidden"]
)
def test_a_manifest_whose_part_lies_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "secret").write_text("s")
    path = commit(tmp_path / "checkpoints", 1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text("utf-8"))
    manifest.pop("sha256")
    forge(path, manifest)
    checkpoint.verify(path)  # so that the forgery below fails for its name alone
    manifest["parts"][name] = {"size": 1, "sha256": hashlib.sha256(b"s").hexdigest()}
    forge(path, manifest)
    with pytest.raises(UserError, match="MANIFEST"):
        checkpoint.verify(path)


@pytest.mark.parametrize("parts", [None, 3, [1], {"a": None}, {"a": {}}])
def test_a_manifest_of_another_shape_is_refused(tmp_path, parts):
    path = commit(tmp_path, 1)
    (path / "a").write_text("")
    forge(path, {"format": checkpoint.FORMAT, "step": 1, "parts": parts})
    with pytest.raises(UserError):
        checkpoint.verify(path)


def forge(path: Path, manifest: dict) -> None:
    """Write a manifest whose own checksum is right."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / checkpoint.MANIFEST).write_text(
        json.dumps({**manifest, "sha256": digest}, indent=1), "utf-8"
    )


def test_another_format_is_refused(tmp_path):
    path = commit(tmp_path, 1)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text("utf-8"))
    del manifest["sha256"]
    forge(path, {**manifest, "format": checkpoint.FORMAT + 1})
    with pytest.raises(UserError, match="MANIFEST"):
        checkpoint.verify(path)


def test_a_checkpoint_under_the_name_of_another_step_is_refused_and_under_a_name_of_its_own_is_not(
    tmp_path,
):
    path = commit(tmp_path, 1)
    shutil.copytree(path, tmp_path / "step-00000002")
    shutil.copytree(path, tmp_path / "for-a-friend")
    with pytest.raises(UserError, match="holds step 1"):
        checkpoint.verify(tmp_path / "step-00000002")
    assert checkpoint.verify(tmp_path / "for-a-friend")["step"] == 1
    assert checkpoint.latest_valid(tmp_path, warn=[].append) == path


def test_random_flips_and_truncations_are_detected_and_the_one_before_is_taken(tmp_path):
    """ESPALIER_FLIPS of them: one bit, a cut, or a few bytes, in any part and in the manifest."""
    before, path, draw = commit(tmp_path, 1), commit(tmp_path, 2), random.Random(FLIPS)
    parts = {part: part.read_bytes() for part in sorted(path.iterdir())}
    assert len(parts) == 5
    weights, undetected = [len(content) for content in parts.values()], []
    for number in range(FLIPS):
        [part] = draw.choices(list(parts), weights) if number % 2 else [draw.choice(list(parts))]
        content, told = parts[part], []
        at = draw.randrange(len(content))
        kind = draw.choice(["flip", "flip", "cut", "burst"])
        wrong = {
            "flip": flipped(content, at, draw.randrange(8)),
            "cut": content[:at],
            "burst": content[:at]
            + bytes(b ^ 0xFF for b in content[at : at + 9])
            + content[at + 9 :],
        }[kind]
        part.write_bytes(wrong)
        if (
            checkpoint.latest_valid(tmp_path, told.append) != before
            or len(told) != 1
            or path.name not in told[0]
        ):
            undetected.append((part.name, kind, at))
        part.write_bytes(content)
    assert undetected == []
    assert checkpoint.latest_valid(tmp_path) == path


# ---- what was forged is refused ----
HEADERS = {
    "2^63 bytes of header": (2**63).to_bytes(8, "little") + b"{}",
    "a header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "no header": b"\0\0",
    "deep nesting": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "deep nesting inside": (200_010).to_bytes(8, "little") + b'{"a":{"x":' + b"[" * 200_000,
    "2^63 of a tensor": None,
    "a tensor past the end": None,
    "a tensor of too few bytes": None,
    "an unknown dtype": None,
}
TENSORS = {
    "2^63 of a tensor": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 2**63]},
    "a tensor past the end": {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 2**22]},
    "a tensor of too few bytes": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    "an unknown dtype": {"dtype": "P0", "shape": [1], "data_offsets": [0, 4]},
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_safetensors_file_with_a_forged_header_is_refused_although_its_hash_is_right(
    tmp_path, what
):
    before, path, told = commit(tmp_path, 1), commit(tmp_path, 2), []
    text = json.dumps({"w": TENSORS.get(what)}).encode()
    content = HEADERS[what] or len(text).to_bytes(8, "little") + text + bytes(4)
    with bounded_memory():
        (path / "model.safetensors").write_bytes(content)
        manifest = json.loads((path / checkpoint.MANIFEST).read_text("utf-8"))
        del manifest["sha256"]
        manifest["parts"]["model.safetensors"] = {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        forge(path, manifest)
        with pytest.raises(UserError, match=r"model.safetensors: no safetensors file"):
            checkpoint.verify(path)
        assert checkpoint.latest_valid(tmp_path, told.append) == before
    assert len(told) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 1_000_000,
        '{"step": 1e999999999}',
        '"' + "x" * (1 << 20) + '"',
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
)
def test_a_manifest_that_would_bring_a_reader_down_is_refused(tmp_path, text):
    before, path, told = commit(tmp_path, 1), commit(tmp_path, 2), []
    (path / checkpoint.MANIFEST).write_text(text, "latin-1")
    assert checkpoint.latest_valid(tmp_path, told.append) == before
    assert len(told) == 1 and checkpoint.MANIFEST in told[0]


@pytest.mark.parametrize(
    "change",
    [
        {"step": None},
        {"step": "2"},
        {"step": 2.0},
        {"step": True},
        {"metrics": 3},
        {"metrics": None},
        {"parts": {"state.json": 1}},
        {"parts": {"state.json": {"size": 2**63, "sha256": ""}}},
        {"parts": {"state.json": {"size": "0", "sha256": None}}},
    ],
)
def test_a_manifest_with_a_right_hash_and_wrong_values_is_refused(tmp_path, change):
    before, path = commit(tmp_path, 1), commit(tmp_path, 2)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text("utf-8"))
    del manifest["sha256"]
    forge(path, manifest | change)
    with pytest.raises(UserError):
        checkpoint.verify(path)
    checkpoint.best(tmp_path)
    assert checkpoint.latest_valid(tmp_path, [].append) == before


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["giant", "pipe", "endless", "folder"])
def test_a_part_that_is_no_plain_file_of_its_size_is_refused_unread(tmp_path, name, kind):
    before, path = commit(tmp_path, 1), commit(tmp_path, 2)
    (path / name).unlink()
    if kind == "giant":  # sparse: it takes no room
        (path / name).touch()
        os.truncate(path / name, 1 << 40)
    elif kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "endless":
        (path / name).symlink_to("/dev/zero")
    else:
        (path / name).mkdir()
    with bounded_memory():
        assert checkpoint.latest_valid(tmp_path, [].append) == before


@contextlib.contextmanager
def bounded_memory():
    """Fail where more than 300 MB are allocated inside."""

    def resident() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = resident()
    yield
    assert resident() - before < 300_000


# ---- which one ----
def test_the_latest_valid_one_is_taken_and_each_one_passed_over_is_told(tmp_path):
    paths = [commit(tmp_path, step) for step in (1, 2, 3)]
    told: list[str] = []
    assert checkpoint.latest_valid(tmp_path, told.append) == paths[2]
    assert told == []
    damage(paths[2])
    (paths[1] / "state.json").unlink()
    assert checkpoint.latest_valid(tmp_path, told.append) == paths[0]
    assert [str(p) in line for p, line in zip((paths[2], paths[1]), told, strict=True)] == [
        True,
        True,
    ]
    damage(paths[0])
    assert checkpoint.latest_valid(tmp_path, told.append) is None


def damage(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(flipped(content, len(content) - 1, 0))


def test_where_nothing_is_there_is_no_checkpoint(tmp_path):
    assert checkpoint.latest_valid(tmp_path / "absent") is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-00000001.bak").mkdir()
    assert checkpoint.steps(tmp_path) == []
    assert checkpoint.latest_valid(tmp_path) is None
    assert checkpoint.best(tmp_path) is None


def test_steps_beyond_eight_digits_are_in_order(tmp_path):
    for step in (100_000_000, 99_999_999):
        commit(tmp_path, step)
    assert checkpoint.steps(tmp_path) == [99_999_999, 100_000_000]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([3.0, 1.0, 2.0], 2),
        ([1.0, 1.0, 2.0], 1),
        ([None, None, None], None),
        ([None, 5.0, None], 2),
        ([float("nan"), 5.0, 6.0], 2),
        ([5.0, float("nan"), 4.0], 3),
        ([float("nan")] * 3, None),
        ([float("-inf"), 5.0, 6.0], 2),
    ],
)
def test_the_best_one_has_the_lowest_finite_loss_and_is_the_earliest_of_equals(
    tmp_path, losses, best
):
    for step, loss in enumerate(losses, 1):
        commit(tmp_path, step, loss=loss)
    assert checkpoint.best(tmp_path) == best


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_pruning_keeps_the_latest_and_the_best_and_sweeps_what_killed_writers_left(tmp_path, keep):
    for step, loss in enumerate([5.0, 1.0, 3.0, 2.0, 4.0], 1):
        commit(tmp_path, step, loss=loss)
    (tmp_path / ".step-00000009.123-abc").mkdir()
    (tmp_path / ".step-00000009.123-abc" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint.prune(tmp_path, keep)
    assert checkpoint.steps(tmp_path) == sorted({2, *range(1, 6)[-keep:]})
    assert hidden(tmp_path) == []
    assert (tmp_path / "notes.txt").exists()
    assert all(
        holds(checkpoint.path_of(tmp_path, step), step) for step in checkpoint.steps(tmp_path)
    )


# ---- whoever comes meanwhile ----
def test_readers_beside_a_writer_always_find_a_whole_one_and_never_fail(tmp_path):
    """Commits, replacements and prunes without pause; every reader gets a checkpoint that was whole when it was read."""
    directory = tmp_path / "checkpoints"
    commit(directory, 1)
    ended, told = threading.Event(), []

    def write() -> None:
        try:
            for step in range(2, 80):
                commit(directory, step)
                commit(directory, step)
                checkpoint.prune(directory, 1)
        finally:
            ended.set()

    writer, latest, rounds = threading.Thread(target=write), 1, 0
    writer.start()
    try:
        while not ended.is_set():
            found = checkpoint.latest_valid(directory, told.append)
            assert found is not None
            latest, before, rounds = int(found.name.removeprefix("step-")), latest, rounds + 1
            assert (
                latest >= before - 1
            )  # while one is replaced, the one before it may be the latest
            assert len(contents.checkpoints(RunFolder(tmp_path))) <= 2
            checkpoint.best(directory)
    finally:
        writer.join()
    assert checkpoint.steps(directory) == [79]
    assert told == []
    assert rounds > 20


def test_a_vanished_checkpoint_is_no_damage_and_the_folder_is_listed_again(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    real = checkpoint.verify

    def verify(path):
        if path.name == "step-00000001":  # pruned in this moment, as a newer one came
            commit(tmp_path, 2)
            checkpoint.remove(path)
        return real(path)

    monkeypatch.setattr(checkpoint, "verify", verify)
    assert checkpoint.latest_valid(tmp_path, warn=pytest.fail) == checkpoint.path_of(tmp_path, 2)


@pytest.mark.parametrize(
    "name", ["step-000000003", "step-00000003\n", "step-٠٠٠٠٠٠٠٣", "step-00000003.bak", "step-3"]
)
def test_a_folder_that_is_only_called_like_a_checkpoint_is_none(tmp_path, name):
    path = commit(tmp_path / "run" / "checkpoints", 2)
    shutil.copytree(path, path.with_name(name))
    assert checkpoint.steps(path.parent) == [
        2
    ]  # else the next line would look for the third for ever
    assert checkpoint.latest_valid(path.parent, pytest.fail) == path
    assert list(contents.checkpoints(RunFolder(tmp_path / "run"))) == ["step-00000002"]


def test_a_dangling_link_with_a_checkpoints_name_is_passed_over(tmp_path):
    path, told = commit(tmp_path, 1), []
    (tmp_path / "step-00000002").symlink_to(tmp_path / "gone")
    assert checkpoint.latest_valid(tmp_path, told.append) == path
    assert len(told) == 1


def test_a_reader_that_puts_the_old_one_back_does_not_stop_its_replacement(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    real, once = os.rename, []

    def rename(source, target):
        real(source, target)
        if str(target).endswith(".aside") and not once:
            once.append(checkpoint.latest_valid(tmp_path, warn=pytest.fail))

    monkeypatch.setattr(os, "rename", rename)
    commit(tmp_path, 1, seed=5)
    assert once == [checkpoint.path_of(tmp_path, 1)]
    assert holds(once[0], 5)
    assert os.listdir(tmp_path) == ["step-00000001"]


# ---- whatever fails when; kills are in test_checkpoint_crash.py ----
class Countdown:
    """Counts file-system calls; the n-th finds a full disk."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None):
        self.count, self.at = 0, at
        for owner, name in CALLS:
            patch.setattr(owner, name, self.counted(getattr(owner, name), name))

    def counted(self, real, name):
        def call(*args, **kwargs):
            self.count += 1
            if self.count != self.at:
                return real(*args, **kwargs)
            if name == "write":  # what fits is taken
                real(args[0], args[1][:5])
            raise OSError(28, "No space left on device")

        return call


def interrupted(at: int | None, action) -> tuple[int, bool]:
    """Run `action` with its `at`-th file-system call failing; (calls made, whether it ended early)."""
    with pytest.MonkeyPatch.context() as patch:
        counter = Countdown(patch, at)
        try:
            action()
        except OSError:
            return counter.count, True
    return counter.count, False


@pytest.mark.parametrize("same_step", [False, True])
def test_a_commit_that_fails_at_any_call_leaves_the_old_or_the_new_one_and_nothing_torn(
    tmp_path, same_step
):
    new_step = 1 if same_step else 2
    commit(tmp_path / "count", 1)
    calls, early = interrupted(None, lambda: commit(tmp_path / "count", new_step, seed=9))
    assert calls > 20 and not early
    outcomes = set()
    for at in range(1, calls + 1):
        directory = tmp_path / str(at)
        commit(directory, 1)
        interrupted(at, lambda directory=directory: commit(directory, new_step, seed=9))
        found = checkpoint.latest_valid(directory, warn=pytest.fail)
        outcomes.add("new" if holds(found, 9) else "old")
        assert holds(found, 9) or holds(found, 1)
        for step in checkpoint.steps(directory):
            checkpoint.verify(checkpoint.path_of(directory, step))
        if at < calls - 12:  # the tail is the removal of the old one
            assert hidden(directory) == [], at
        commit(directory, new_step, seed=9)  # and the next one finds its way
        checkpoint.prune(directory, 1)
        assert os.listdir(directory) == [checkpoint.path_of(directory, new_step).name]
        assert holds(checkpoint.path_of(directory, new_step), 9)
        shutil.rmtree(directory)
    assert outcomes == {"old", "new"}


def test_what_a_killed_writer_left_is_removed_before_room_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / ".step-00000009.123-abc").mkdir()

    def statvfs(path):
        assert hidden(path) == []
        return os.statvfs_result((4096, 4096, 100, 10, 10, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(OSError, match="40,960 bytes free, 1,04") as raised:
        commit(tmp_path, 1)
    assert raised.value.errno in NO_ROOM
    assert os.listdir(tmp_path) == []


def test_what_a_writer_cannot_read_at_this_moment_it_does_not_pass_over(tmp_path, monkeypatch):
    commit(tmp_path, 1)
    commit(tmp_path, 2)

    def fail_with(number: int) -> None:
        def hash_part(path):
            raise OSError(number, os.strerror(number), str(path))

        monkeypatch.setattr(integrity, "_hash_part", hash_part)

    fail_with(errno.ESTALE)
    assert checkpoint.latest_valid(tmp_path, lambda message: None) is None, "a reader looks further"
    with pytest.raises(UnreadableError, match="cannot be read"):
        checkpoint.latest_valid(tmp_path, set_aside=True)
    assert checkpoint.steps(tmp_path) == [1, 2]
    fail_with(errno.EIO)  # a bad sector stays one
    assert checkpoint.latest_valid(tmp_path, set_aside=True) is None
    assert checkpoint.steps(tmp_path) == []


def test_what_the_writer_passes_over_loses_its_name_and_is_kept_to_be_looked_at(tmp_path):
    for step, loss in [(1, 5.0), (2, 4.0), (7, 1.0), (8, 1.0)]:
        commit(tmp_path, step, loss=loss)
    for step in (7, 8):
        (checkpoint.path_of(tmp_path, step) / "model.safetensors").write_bytes(b"torn")
    said = []
    assert checkpoint.latest_valid(tmp_path, said.append) == checkpoint.path_of(tmp_path, 2)
    assert checkpoint.steps(tmp_path) == [1, 2, 7, 8], "a reader changes nothing"
    assert checkpoint.latest_valid(tmp_path, said.append, set_aside=True) == checkpoint.path_of(
        tmp_path, 2
    )
    assert checkpoint.steps(tmp_path) == [1, 2]
    aside = sorted(f.name for f in tmp_path.glob("damaged-*"))
    assert [name.rpartition("-")[0] for name in aside] == [
        "damaged-step-00000007",
        "damaged-step-00000008",
    ]
    assert said[-1].endswith(f"; now {aside[0]}")
    commit(tmp_path, 3, loss=6.0)
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.steps(tmp_path) == [2, 3], "2 is the best"
    assert [f.name for f in sorted(tmp_path.glob("damaged-*"))] == aside


def test_a_process_killed_for_real_at_any_moment_leaves_only_whole_checkpoints(tmp_path):
    # One process imports torch; its forks commit without pause, replace some steps, and are killed.
    script = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from orchestrator.checkpoint import store as checkpoint
from orchestrator.runs.folder import RunFolder
from orchestrator.track import contents

facts = {"fingerprints": {"data": "d", "numerics": {"cpus_per_worker": 1, "device": "cpu"}}}

def write(directory, first):
    torch.set_num_threads(1)
    for step in range(first, 10**6):
        for again in range(2):
            weights = torch.full((50_000,), float(step))
            checkpoint.save(directory, step, {"model": {"w": weights}}, {"state.json": "{}"}, facts)
        checkpoint.prune(directory, 2)

directory, draw, seen = Path(sys.argv[1]), random.Random(7), 0
for round in range(25):
    child = os.fork()
    if not child:
        write(directory, seen + 1)
    time.sleep(0.04 + 0.06 * draw.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = checkpoint.latest_valid(directory, warn=sys.exit)
    step = int(found.name.removeprefix("step-")) if found else 0
    assert step >= seen, (step, seen)
    for other in checkpoint.steps(directory):
        checkpoint.verify(checkpoint.path_of(directory, other))
        weights = checkpoint.load_tensors(checkpoint.path_of(directory, other), "model")["w"]
        assert bool((weights == other).all())
    seen = step
print(seen)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 25
