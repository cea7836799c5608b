"""Checkpoints in the background: the state at the time of `save`, their order, full disks."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.track import outbox
from orchestrator.train.checkpointer import Checkpointer
from orchestrator.train.loop import Trainer
from orchestrator.train.numerics import Worker
from orchestrator.train.ranks import writing
from tests.helpers.checkpoints import save
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
FULL_DISK = os.statvfs_result((4096, 4096, 100, 10, 10, 0, 0, 0, 0, 255))  # 10 free blocks


def state(value: float, size: int = 1000) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((size,), value), "half": torch.full((3, 2), value).bfloat16()},
        "optimizer": {"w/step": torch.tensor(value)},
    }


def holds(path: Path, value: float, size: int = 1000) -> bool:
    store.verify(path)
    for group, expected in state(value, size).items():
        for name, loaded in store.load_tensors(path, group).items():
            if loaded.dtype != expected[name].dtype or not torch.equal(loaded, expected[name]):
                return False
    return True


def open_checkpointer(folder: RunFolder) -> Checkpointer:
    return Checkpointer(folder, 2, Journal(folder))


@pytest.fixture
def checkpointer(folder):
    opened = open_checkpointer(folder)
    yield opened
    opened.close()


@pytest.fixture
def gate(monkeypatch):
    """Commits start when this event is set."""
    gate = threading.Event()
    commit = store.commit

    def wait_and_commit(*args):
        assert gate.wait(60)
        return commit(*args)

    monkeypatch.setattr(store, "commit", wait_and_commit)
    yield gate
    gate.set()


# ---- what is written ----


def test_state_at_the_time_of_save_is_written(checkpointer, gate, folder):
    tensors = state(1.0)
    checkpointer.save(1, tensors, {"a.txt": "one"}, FACTS)
    for group in tensors.values():
        for tensor in group.values():
            tensor.fill_(7.0)
    assert folder.checkpoint_steps() == [], "the commit has not started"
    gate.set()
    checkpointer.wait()
    assert holds(folder.checkpoint(1), 1.0)
    assert (folder.checkpoint(1) / "a.txt").read_text() == "one"


def test_save_waits_for_the_commit_before_it(checkpointer, gate, folder):
    checkpointer.save(1, state(1.0), {}, FACTS)
    second = threading.Thread(target=checkpointer.save, args=(2, state(2.0), {}, FACTS))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    gate.set()
    second.join(60)
    checkpointer.wait()
    assert holds(folder.checkpoint(1), 1.0) and holds(folder.checkpoint(2), 2.0)


def test_buffers_are_kept_while_they_fit(checkpointer, folder):
    def addresses() -> list[int]:
        checkpointer.wait()
        return [file._buffer.data_ptr() for file in checkpointer._files.values()]

    checkpointer.save(1, state(1.0), {}, FACTS)
    first = addresses()
    checkpointer.save(2, state(2.0), {}, FACTS)
    assert addresses() == first
    checkpointer.save(3, state(3.0, size=2000), {}, FACTS)
    assert addresses()[0] != first[0] and addresses()[1] == first[1]
    checkpointer.save(4, {"model": state(4.0)["model"], "optimizer": {}}, {}, FACTS)
    checkpointer.wait()
    assert holds(folder.checkpoint(3), 3.0, size=2000)
    assert holds(folder.checkpoint(4), 4.0)
    assert folder.checkpoint_steps() == [3, 4], "only the newest two are kept"


def test_checkpointer_writes_the_same_bytes_as_save(checkpointer, folder, tmp_path):
    content = (5, state(5.0), {"a.txt": "ä"}, {"metrics": {"val/loss": 1.5}})
    checkpointer.save(*content)
    checkpointer.wait()
    other = save(tmp_path / "other", *content)
    assert {p.name: p.read_bytes() for p in folder.checkpoint(5).iterdir()} == {
        p.name: p.read_bytes() for p in other.iterdir()
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_state_on_a_gpu_is_copied_before_save_returns(checkpointer, folder):
    tensors = {
        "model": {"w": torch.full((5_000_000,), 1.0, device="cuda")},
        "optimizer": {"w/step": torch.tensor(1.0)},
    }
    checkpointer.save(1, tensors, {}, FACTS)
    tensors["model"]["w"].fill_(7.0)
    checkpointer.wait()
    assert checkpointer._files["model"]._buffer.is_pinned()
    loaded = store.load_tensors(folder.checkpoint(1), "model")["w"]
    assert torch.equal(loaded, torch.full((5_000_000,), 1.0))


# ---- errors ----


def save_and(folder: RunFolder, then, size: int = 1000) -> None:
    with open_checkpointer(folder) as checkpointer:
        checkpointer.save(1, state(1.0, size), {}, FACTS)
        then(checkpointer)


@pytest.mark.parametrize(
    "then",
    [
        lambda checkpointer: checkpointer.save(2, state(2.0), {}, FACTS),
        lambda checkpointer: checkpointer.wait(),
        lambda checkpointer: None,
    ],
    ids=["save", "wait", "end"],
)
def test_failure_in_the_background_is_raised_by_the_next_call(folder, then):
    folder.checkpoints.write_text("a file where the folder should be")
    with pytest.raises(FileExistsError):
        save_and(folder, then)


def test_error_of_training_is_not_replaced_by_one_of_the_checkpointer(folder, capsys):
    folder.checkpoints.write_text("a file where the folder should be")
    with pytest.raises(ZeroDivisionError):
        save_and(folder, lambda checkpointer: 1 / 0)
    assert "the last checkpoint was not written" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit])
def test_checkpoint_saved_before_an_error_is_written(folder, error):
    def fail(checkpointer):
        raise error

    with pytest.raises(error):
        save_and(folder, fail, size=3_000_000)
    assert holds(folder.checkpoint(1), 1.0, size=3_000_000)


def test_rank_with_an_error_does_not_wait_for_a_rank_that_is_silent(folder, monkeypatch, capsys):
    answer = threading.Event()
    monkeypatch.setattr("orchestrator.train.checkpointer.LEAVES_S", 0.1)
    monkeypatch.setattr(writing, "messages", lambda _: lambda text: answer.wait(60) and [text])

    def fail():
        with Checkpointer(folder, 2, Journal(folder), Worker(1, 2)) as checkpointer:
            checkpointer.save(1, state(1.0), {}, FACTS)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "not written: another rank does not answer" in capsys.readouterr().err
    assert not answer.is_set()
    answer.set()


# ---- in a run ----


def open_trainer(folder: RunFolder, data_dir: Path) -> Trainer:
    return Trainer(load_experiment(None, SMALL), folder, data_dir, Worker(cpus=1))


def train_until(step: int, folder: RunFolder, data_dir: Path) -> None:
    for line in open_trainer(folder, data_dir).run():
        if line["step"] == step:
            break


def test_run_that_is_left_early_has_written_what_it_saved(tiny_dataset, folder):
    train_until(9, folder, tiny_dataset)
    assert store.latest_valid(folder.checkpoints, pytest.fail) == folder.checkpoint(8)
    assert not list(folder.checkpoints.glob(".*"))


def test_damage_is_recorded_once_for_each_checkpoint(tiny_dataset, folder):
    train_until(13, folder, tiny_dataset)
    for step, part in ((12, "model.safetensors"), (8, "MANIFEST.json")):
        file = folder.checkpoint(step) / part
        file.write_bytes(file.read_bytes()[:-1])
    trainer = open_trainer(folder, tiny_dataset)
    assert trainer.state.step == 4
    recorded = [event for event in events.read(folder) if event["kind"] == "checkpoint_damaged"]
    assert len(recorded) == 2
    assert "step-00000012/model.safetensors" in recorded[0]["message"]
    assert "step-00000008" in recorded[1]["message"]
    for _ in trainer.run():
        pass
    assert store.latest_valid(folder.checkpoints, pytest.fail) == folder.checkpoint(20)


# ---- a full disk ----


@pytest.fixture(scope="module")
def full_disks(tiny_dataset, tmp_path_factory) -> dict:
    """Results of runs on small disks, which are mounted for one process only."""
    folder = tmp_path_factory.mktemp("disks")
    (folder / "try").mkdir()
    unshare = ["unshare", "--mount", "--propagation", "private"]
    mount = [*unshare, "mount", "-t", "tmpfs", "none", str(folder / "try")]
    try:
        tried = subprocess.run(mount, capture_output=True, text=True)
        reason = tried.stderr.strip() if tried.returncode else ""
    except OSError as error:
        reason = str(error)
    if reason:
        pytest.skip(f"a small disk cannot be mounted here: {reason}")
    overrides = json.dumps([*SMALL, "train.eval_interval=5", "train.eval_tokens=200"])
    done = subprocess.run(
        [*unshare, sys.executable, str(HELPER), str(folder), str(tiny_dataset), overrides],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HELPER.parents[2])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"output": done.stdout}


def equals_uninterrupted(full_disks: dict, result: dict) -> bool:
    golden = full_disks["golden"]
    return {key: result[key] for key in golden} == golden


@pytest.mark.parametrize("kind", ["bytes", "files"])
def test_disk_that_is_full_for_a_while_costs_only_checkpoints(full_disks, kind):
    result = full_disks[f"{kind} for a while"]
    assert result["error"] is None
    assert result["events"] == [["disk_full", 8], ["disk_full", 12]]
    assert result["torn"] == []
    assert result["steps"] == [4, 16, 20]
    assert equals_uninterrupted(full_disks, result)
    assert "no room for the checkpoint of step 8" in full_disks["output"]


@pytest.mark.parametrize("kind", ["bytes", "files"])
def test_disk_that_is_full_at_the_end_is_an_error_and_loses_nothing(full_disks, kind):
    result = full_disks[f"{kind} for ever"]
    assert (result["updates"], result["steps"]) == (20, [4])
    assert result["events"] == [["disk_full", step] for step in (8, 12, 16, 20)]
    for words in (
        "/run/checkpoints: no room for the checkpoint of step 20",
        "No space left on device",
        "of step 4",
        "run the same command again",
    ):
        assert words in result["error"]
    assert equals_uninterrupted(full_disks, result), "after the same command, with space"


def test_disk_without_a_free_byte_for_a_while_costs_only_checkpoints_and_samples(full_disks):
    result = full_disks["all for a while"]
    assert result["error"] is None
    assert result["steps"] == [4, 16, 20]
    assert result["samples"] == [0, 5, 15, 20]
    assert result["torn"] == []
    assert result["events"] == [["disk_full", 15]], "only the event that there is space again"
    assert equals_uninterrupted(full_disks, result)


def test_disk_without_a_free_byte_at_the_end_is_an_error_and_loses_nothing(full_disks):
    result = full_disks["all for ever"]
    assert result["asked"] == "SIGTERM", "a stop can be requested on a full disk"
    assert (result["updates"], result["steps"], result["samples"]) == (20, [4], [0, 5])
    assert "/run/metrics.jsonl: no room for the line of step " in result["error"]
    for words in ("No space left on device", "run the same command again"):
        assert words in result["error"]
        assert words in result["stopped"]
    assert equals_uninterrupted(full_disks, result), "after the same command, with space"


def test_only_wait_raises_an_error_for_a_full_disk(folder, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: FULL_DISK)
    checkpointer = open_checkpointer(folder)
    checkpointer.save(1, state(1.0), {}, FACTS)
    checkpointer.save(2, state(2.0), {}, FACTS)
    with pytest.raises(UserError, match="of step 2 .*there is none yet"):
        checkpointer.wait()
    monkeypatch.undo()
    checkpointer.save(3, state(3.0), {}, FACTS)
    checkpointer.wait()
    checkpointer.close()
    assert folder.checkpoint_steps() == [3]
    assert [event["step"] for event in events.read(folder)] == [1, 2]


def test_no_checkpoint_is_written_while_lines_wait(folder, monkeypatch):
    """There may be room for the checkpoint: a run that resumed from it would lose the lines."""
    checkpointer = open_checkpointer(folder)
    write = Journal.write

    def full(self, line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Journal, "write", full)
    checkpointer.lines.append(1, {"train/loss": 2.0})
    checkpointer.save(1, state(1.0), {}, FACTS)
    assert folder.checkpoint_steps() == []
    with pytest.raises(UserError, match="no room for the checkpoint of step 1"):
        checkpointer.wait()
    monkeypatch.setattr(Journal, "write", write)
    checkpointer.save(2, state(2.0), {}, FACTS)
    checkpointer.wait()
    checkpointer.close()
    assert folder.checkpoint_steps() == [2]
    assert [line["step"] for line in journal.read(folder)] == [1]


# ---- order on disk ----


@pytest.fixture
def synced_and_renamed(monkeypatch) -> list[str]:
    """Paths that are passed to fsync and rename, in order: what a power failure would leave."""
    names: list[str] = []
    fsync = os.fsync
    rename = os.rename

    def record_fsync(descriptor):
        names.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(source, target):
        rename(source, target)
        names.append(os.path.realpath(target))

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    return names


def test_journal_is_on_disk_before_the_checkpoint_and_before_it_is_sent(
    synced_and_renamed, checkpointer, folder
):
    checkpointer.lines.append(1, {"train/loss": 2.0})
    checkpointer.save(1, state(1.0), {}, {})
    checkpointer.wait()
    name = os.path.realpath(folder.journal_file)  # the checkpoint has a copy of the same name
    checkpoint = os.path.realpath(folder.checkpoint(1))
    assert synced_and_renamed.index(name) < synced_and_renamed.index(checkpoint)
    synced_and_renamed.clear()
    queue = outbox.MetricQueue(folder)
    queue.refresh(outbox.Sent("", None))
    assert next(queue.batches()).rows
    assert name in synced_and_renamed
