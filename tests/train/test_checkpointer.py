"""Checkpoints beside training: the bytes of the moment of `save`, in order, whole, and whatever fails is heard of."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.track import outbox
from orchestrator.train.checkpointer import Checkpointer
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker
from tests.helpers.facts import FACTS

HELPER = Path(__file__).resolve().parent.parent / "helpers" / "full_disk.py"
SMALL = [
    "name=small",
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    "train.max_steps=20",
    "train.log_interval=1",
    "train.eval_interval=null",
    "train.checkpoint_interval=4",
    "train.keep=9",
    "schedule.max_lr=1e-2",
]


def state(value: float, size: int = 1000) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((size,), value), "half": torch.full((3, 2), value).bfloat16()},
        "optimizer": {"w/step": torch.tensor(value)},
    }


def holds(path: Path, value: float, size: int = 1000) -> bool:
    checkpoint.verify(path)
    return all(
        torch.equal(loaded, state(value, size)[group][name])
        and loaded.dtype == state(value, size)[group][name].dtype
        for group in ("model", "optimizer")
        for name, loaded in checkpoint.load_tensors(path, group).items()
    )


def checkpointer(run_dir: Path) -> Checkpointer:
    return Checkpointer(RunFolder(run_dir), 2, journal.Journal(run_dir))


def trainer(run_dir: Path, data_dir: Path) -> Trainer:
    return Trainer(load_experiment(None, SMALL), RunFolder(run_dir), data_dir, Worker(cpus=1))


@pytest.fixture
def writer(tmp_path):
    writer = checkpointer(tmp_path)
    yield writer
    writer.close()


@pytest.fixture
def gate(monkeypatch):
    """Commits begin when it is set."""
    gate, real = threading.Event(), checkpoint.commit

    def commit(*args):
        assert gate.wait(60)
        return real(*args)

    monkeypatch.setattr(checkpoint, "commit", commit)
    yield gate
    gate.set()


# ---- what is committed ----
def test_the_bytes_of_the_moment_of_save_are_committed_although_training_goes_on(
    writer, gate, tmp_path
):
    tensors = state(1.0)
    writer.save(1, tensors, {"a.txt": "one"}, FACTS)
    for group in tensors.values():
        for tensor in group.values():
            tensor.fill_(7.0)
    assert checkpoint.steps(tmp_path / "checkpoints") == []  # it has not even begun
    gate.set()
    writer.wait()
    path = checkpoint.path_of(tmp_path / "checkpoints", 1)
    assert holds(path, 1.0)
    assert (path / "a.txt").read_text() == "one"


def test_a_save_waits_for_the_commit_before_it_and_does_not_touch_its_bytes(writer, gate, tmp_path):
    writer.save(1, state(1.0), {}, FACTS)
    second = threading.Thread(target=writer.save, args=(2, state(2.0), {}, FACTS))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    gate.set()
    second.join(60)
    writer.wait()
    assert [
        holds(checkpoint.path_of(tmp_path / "checkpoints", step), float(step)) for step in (1, 2)
    ] == [True, True]


def test_buffers_are_kept_while_they_fit(writer, tmp_path):
    def buffers():
        writer.wait()
        return [file.data.obj.ctypes.data for file in writer._files.values()]

    writer.save(1, state(1.0), {}, FACTS)
    first = buffers()
    writer.save(2, state(2.0), {}, FACTS)
    assert buffers() == first
    writer.save(3, state(3.0, size=2000), {}, FACTS)
    assert buffers()[0] != first[0] and buffers()[1] == first[1]
    writer.save(4, {"model": state(4.0)["model"], "optimizer": {}}, {}, FACTS)
    writer.wait()
    assert holds(checkpoint.path_of(tmp_path / "checkpoints", 3), 3.0, size=2000)
    assert holds(checkpoint.path_of(tmp_path / "checkpoints", 4), 4.0)
    assert checkpoint.steps(tmp_path / "checkpoints") == [3, 4]  # pruned to the latest two


def test_it_writes_what_saving_at_once_writes(writer, tmp_path):
    writer.save(5, state(5.0), {"a.txt": "ä"}, {"metrics": {"val/loss": 1.5}})
    writer.wait()
    ours = checkpoint.path_of(tmp_path / "checkpoints", 5)
    other = checkpoint.save(
        tmp_path / "other", 5, state(5.0), {"a.txt": "ä"}, {"metrics": {"val/loss": 1.5}}
    )
    assert {p.name: p.read_bytes() for p in ours.iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: copies into pinned memory are not tried"
)
def test_a_state_on_a_gpu_is_copied_before_save_returns(writer, tmp_path):
    tensors = {
        "model": {"w": torch.full((5_000_000,), 1.0, device="cuda")},
        "optimizer": {"w/step": torch.tensor(1.0)},
    }
    writer.save(1, tensors, {}, FACTS)
    tensors["model"]["w"].fill_(7.0)
    writer.wait()
    assert writer._files["model"]._buffer.is_pinned()
    loaded = checkpoint.load_tensors(checkpoint.path_of(tmp_path / "checkpoints", 1), "model")["w"]
    assert torch.equal(loaded, torch.full((5_000_000,), 1.0))


# ---- how it ends ----
def obstruct(directory: Path) -> None:
    """Something that no commit can get past, and that is no full disk."""
    directory.parent.mkdir(exist_ok=True)
    directory.write_text("a file where the folder should be")


def used(tmp_path: Path, then, size: int = 1000) -> None:
    """A writer as a context, with one checkpoint saved before `then(writer)`."""
    with checkpointer(tmp_path) as writer:
        writer.save(1, state(1.0, size), {}, FACTS)
        then(writer)


@pytest.mark.parametrize(
    "then",
    [lambda writer: writer.save(2, state(2.0), {}, FACTS), Checkpointer.wait, lambda writer: None],
    ids=["save", "wait", "end"],
)
def test_a_failure_in_the_background_is_raised_by_the_next_call(tmp_path, then):
    obstruct(tmp_path / "checkpoints")
    with pytest.raises(FileExistsError):
        used(tmp_path, then)


def test_an_error_of_training_is_not_hidden_by_one_of_the_writer(tmp_path, capsys):
    obstruct(tmp_path / "checkpoints")
    with pytest.raises(ZeroDivisionError):
        used(tmp_path, lambda writer: 1 / 0)
    assert "the last checkpoint was not written" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit])
def test_what_was_saved_before_an_error_is_committed(tmp_path, error):
    def fail(writer):
        raise error

    with pytest.raises(error):
        used(tmp_path, fail, size=3_000_000)
    assert holds(checkpoint.path_of(tmp_path / "checkpoints", 1), 1.0, size=3_000_000)


def test_a_run_that_is_left_early_has_committed_what_it_saved(tiny_dataset, tmp_path):
    (tmp_path / "run").mkdir()
    for line in trainer(tmp_path / "run", tiny_dataset).run():
        if line["step"] == 9:
            break
    assert (
        checkpoint.latest_valid(tmp_path / "run" / "checkpoints", pytest.fail).name
        == "step-00000008"
    )
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_damage_is_noted_once_for_each_checkpoint_and_start(tiny_dataset, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for line in trainer(run_dir, tiny_dataset).run():
        if line["step"] == 13:
            break
    for step, part in ((12, "model.safetensors"), (8, "MANIFEST.json")):
        file = checkpoint.path_of(run_dir / "checkpoints", step) / part
        file.write_bytes(file.read_bytes()[:-1])
    run = trainer(run_dir, tiny_dataset)
    assert run.state.step == 4
    noted = [
        e["message"] for e in events.read(RunFolder(run_dir)) if e["kind"] == "checkpoint_damaged"
    ]
    assert len(noted) == 2
    assert "step-00000012/model.safetensors" in noted[0] and "step-00000008" in noted[1]
    for _ in run.run():
        pass
    assert checkpoint.latest_valid(run_dir / "checkpoints", pytest.fail).name == "step-00000020"


# ---- a full disk ----
@pytest.fixture(scope="module")
def full_disks(tiny_dataset, tmp_path_factory) -> dict:
    """Real runs on real small disks, in a mount namespace of their own."""
    folder = tmp_path_factory.mktemp("disks")
    (folder / "try").mkdir()
    alone = ["unshare", "--mount", "--propagation", "private"]
    try:
        tried = subprocess.run(
            [*alone, "mount", "-t", "tmpfs", "none", str(folder / "try")],
            capture_output=True,
            text=True,
        )
        why = tried.returncode and tried.stderr.strip()
    except OSError as error:
        why = str(error)
    if why:
        pytest.skip(f"a small disk cannot be mounted here: {why}")
    command = [
        *alone,
        sys.executable,
        str(HELPER),
        str(folder),
        str(tiny_dataset),
        json.dumps([*SMALL, "train.eval_interval=5", "train.eval_tokens=200"]),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"output": done.stdout}


@pytest.mark.parametrize("kind", ["bytes", "files"])
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(full_disks, kind):
    result, golden = full_disks[f"{kind} for a while"], full_disks["golden"]
    assert result["error"] is None
    assert result["events"] == [["disk_full", 8], ["disk_full", 12]]
    assert result["torn"] == []
    assert result["steps"] == [4, 16, 20]
    assert {key: result[key] for key in golden} == golden
    assert "no room for the checkpoint of step 8" in full_disks["output"]


@pytest.mark.parametrize("kind", ["bytes", "files"])
def test_a_disk_that_is_full_at_the_end_is_an_error_that_says_what_to_do_and_loses_nothing(
    full_disks, kind
):
    result, golden = full_disks[f"{kind} for ever"], full_disks["golden"]
    assert result["updates"] == 20
    assert result["steps"] == [4]
    assert result["events"] == [["disk_full", step] for step in (8, 12, 16, 20)]
    for words in (
        "/run/checkpoints: no room for the checkpoint of step 20",
        "No space left on device",
        "of step 4",
        "run the same command again",
    ):
        assert words in result["error"]
    assert {key: result[key] for key in golden} == golden  # the same command again, with room


def test_a_disk_without_a_byte_for_a_while_costs_checkpoints_and_samples_and_nothing_else(
    full_disks,
):
    result, golden = full_disks["all for a while"], full_disks["golden"]
    assert result["error"] is None
    assert result["steps"] == [4, 16, 20]
    assert result["samples"] == [0, 5, 15, 20]
    assert result["torn"] == []
    assert result["events"] == [["disk_full", 15]], "there is room again"
    assert {key: result[key] for key in golden} == golden


def test_a_disk_without_a_byte_at_the_end_ends_the_run_with_words_and_loses_nothing(full_disks):
    result, golden = full_disks["all for ever"], full_disks["golden"]
    assert result["asked"] == "SIGTERM", "a full disk does not hear a stop"
    assert (result["updates"], result["steps"], result["samples"]) == (20, [4], [0, 5])
    assert "/run/metrics.jsonl: no room for the line of step " in result["error"]
    for words in ("No space left on device", "Free some room there and run the same command again"):
        assert words in result["error"]
        assert words in result["stopped"]
    assert {key: result[key] for key in golden} == golden  # the same command again, with room


def test_the_user_hears_of_a_full_disk_from_wait_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(
        os, "statvfs", lambda path: os.statvfs_result((4096, 4096, 100, 10, 10, 0, 0, 0, 0, 255))
    )
    writer = checkpointer(tmp_path)
    writer.save(1, state(1.0), {}, FACTS)
    writer.save(2, state(2.0), {}, FACTS)
    with pytest.raises(UserError, match="of step 2 .*there is none yet"):
        writer.wait()
    monkeypatch.undo()
    writer.save(3, state(3.0), {}, FACTS)
    writer.wait()
    writer.close()
    assert checkpoint.steps(tmp_path / "checkpoints") == [3]
    assert [e["step"] for e in events.read(RunFolder(tmp_path))] == [1, 2]


@pytest.fixture
def calls(monkeypatch):
    """What is synced and renamed, in order: a power cut cannot be had here."""
    calls, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)),
    )
    monkeypatch.setattr(
        os, "rename", lambda old, new: (rename(old, new), calls.append(os.path.basename(new)))
    )
    return calls


def test_the_journal_is_on_the_disk_before_a_checkpoint_has_its_name_and_before_others_are_told(
    calls, writer, tmp_path
):
    journal.Journal(RunFolder(tmp_path)).append(1, {"train/loss": 2.0})
    writer.save(1, state(1.0), {}, {})
    writer.wait()
    assert calls.index("metrics.jsonl") < calls.index("step-00000001")
    calls.clear()
    lines = outbox.MetricQueue(RunFolder(tmp_path))
    lines.refresh(outbox.Sent("", None))
    assert next(lines.batches()).rows
    assert "metrics.jsonl" in calls
