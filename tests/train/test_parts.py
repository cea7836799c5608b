"""Several ranks write a checkpoint in parts and read it together; kills leave complete ones."""

import contextlib
import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train import state
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.train.ranks import reading
from tests.helpers import forked, part_rank, train_rank
from tests.helpers.allocated import Allocated
from tests.helpers.checkpoints import damage, hidden
from tests.helpers.curves import final_outcome
from tests.helpers.tiny import TINY

REPO = Path(__file__).resolve().parents[2]
WORDS = [
    *TINY,
    "train.max_steps=8",
    "train.log_interval=2",
    "train.eval_interval=null",
    "train.checkpoint_interval=4",
    "train.global_batch_size=8",
    "train.reduction_slots=4",
    "train.ema=0.9",
    "model.n_embd=64",  # several shards
]


def run_ranks(folder: RunFolder, data_dir: Path, ranks: int, *words: str) -> list[int]:
    """Train with several ranks; return their exit statuses."""
    processes = train_rank.start(folder, data_dir, [*WORDS, *words], ranks)
    for process in processes:
        process.join(120)
    Path(f"{folder.path}-store").unlink(missing_ok=True)
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module", params=["adamw", "muon"])
def begun(request, tiny_dataset, tmp_path_factory) -> tuple[dict, Path]:
    """Outcome of a run with one rank, and the folder of one that four ranks have begun."""
    words = [*WORDS, f"optim.kind={request.param}"]
    folder = tmp_path_factory.mktemp("parts")
    (folder / "whole").mkdir()
    (folder / "begun").mkdir()
    whole = RunFolder(folder / "whole")
    train(load_experiment(None, words), whole, tiny_dataset)
    assert run_ranks(RunFolder(folder / "begun"), tiny_dataset, 4, words[-1]) == [0] * 4
    return final_outcome(whole), folder / "begun"


def kind_of(folder: RunFolder) -> list[str]:
    experiment = RunFolder(folder.checkpoint(4)).read_experiment()
    return [f"optim.kind={experiment.optim.kind}"]


def test_four_ranks_write_what_one_writes_each_a_part_of_one_size(begun):
    whole, path = begun
    folder = RunFolder(path)
    assert final_outcome(folder) == whole
    assert hidden(folder.checkpoints) == []
    found = store.verify(folder.checkpoint(8))
    assert found["format"] == 2
    for group in ("model", "ema"):
        sizes = [found["parts"][f"{group}-0000{i}-of-00004.safetensors"]["size"] for i in range(4)]
        assert max(sizes) - min(sizes) < 1500, "headers differ by some names"
    last = folder.checkpoint(8)
    held = [load_file(last / f"optimizer-0000{i}-of-00004.safetensors").keys() for i in range(4)]
    assert sum(bool(names) for names in held) > 1, "no rank gathers the state of the optimizer"
    weights = store.load_tensors(last, "model")
    assert store.stored_weights_sha256(last) == store.weights_sha256(weights)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_any_number_of_ranks_goes_on_from_a_part_of_the_run(begun, tiny_dataset, tmp_path, ranks):
    whole, path = begun
    folder = RunFolder(shutil.copytree(path, tmp_path / "run"))
    shutil.rmtree(folder.checkpoint(8))
    with opened_files(folder.checkpoint(4)) as opened:
        assert run_ranks(folder, tiny_dataset, ranks, *kind_of(folder)) == [0] * ranks
    assert final_outcome(folder) == whole
    tensors = [
        name for name in store.read_manifest(folder.checkpoint(4))["parts"] if "-of-" in name
    ]
    assert len(tensors) == 12
    assert {name: opened[name] for name in tensors} == dict.fromkeys(tensors, 1), "read once"


class Alone(reading.ReadTogether):
    """Reads as one of several ranks; what the others would send comes from their files."""

    def _receive(self, name, **kwargs):
        self.name, self.sent = name, 0
        yield from super()._receive(name, **kwargs)

    def broadcast(self, piece, src):
        content = (self.path / self.name).read_bytes()[self.sent : self.sent + len(piece)]
        piece.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.sent += len(piece)

    def tensors(self, *args):
        with Allocated() as allocated:
            found = super().tensors(*args)
        self.most = allocated.most
        return found


def test_rank_that_resumes_holds_its_part_of_the_optimizer(begun, monkeypatch):
    ranks = 4
    monkeypatch.setattr(reading, "BROADCAST_BYTES", 1 << 14)
    monkeypatch.setattr(state, "gather", lambda text, worker: [text] * worker.world_size)
    folder = RunFolder(begun[1])
    path = folder.checkpoint(8)
    experiment = RunFolder(path).read_experiment().replace(train__ema=None)
    stored = store.load_tensors(path, "optimizer").values()
    whole = sum(tensor.nbytes for tensor in stored if tensor.dim())
    held = []
    for rank in range(ranks):
        content = Alone(path, store.verify(path), Worker(rank, ranks), list(range(ranks)))
        monkeypatch.setattr(torch.distributed, "broadcast", content.broadcast)
        content.read_own()
        restored = state.restore(experiment, content, content.worker)
        values = [v for found in restored.optimizer.state.values() for v in found.values()]
        held.append(sum(value.nbytes for value in values if value.dim()))
        own = [n for n in content.readers if n[:3] == "opt" and content.readers[n] == rank]
        read = sum(content.manifest["parts"][name]["size"] for name in own)
        assert content.most <= held[-1] + read + (2 << 14) + 64, "and two pieces of other files"
    assert sum(held) == whole and max(held) < whole / 2


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["whole", "begun"])
def test_moments_of_a_rank_without_shards_take_only_their_own_memory(
    begun, monkeypatch, name, ranks
):
    monkeypatch.setattr(reading, "BROADCAST_BYTES", 1 << 14)
    monkeypatch.setattr(state, "gather", lambda text, worker: [text] * worker.world_size)
    path = RunFolder(begun[1].parent / name).checkpoint(8)
    experiment = RunFolder(path).read_experiment()
    experiment = experiment.replace(train__ema=None, train__shard_optimizer=False)
    content = Alone(path, store.verify(path), Worker(ranks - 1, ranks), list(range(ranks)))
    monkeypatch.setattr(torch.distributed, "broadcast", content.broadcast)
    content.read_own()
    restored = state.restore(experiment, content, content.worker)
    values = [v for found in restored.optimizer.state.values() for v in found.values()]
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values}
    header = 1 << 14
    assert sum(storages.values()) <= sum(value.nbytes for value in values) + header


def test_damaged_part_is_named_and_the_checkpoint_before_is_taken(begun, tiny_dataset, tmp_path):
    whole, path = begun
    folder = RunFolder(shutil.copytree(path, tmp_path / "run"))
    damage(folder.checkpoint(8), "optimizer-00002-of-00004.safetensors")
    assert run_ranks(folder, tiny_dataset, 2, *kind_of(folder)) == [0, 0]
    [event] = [event for event in events.read(folder) if event["kind"] == "checkpoint_damaged"]
    assert "step-00000008/optimizer-00002-of-00004.safetensors: its content" in event["message"]
    assert len(list(folder.checkpoints.glob("damaged-step-00000008-*"))) == 1
    assert final_outcome(folder) == whole


def test_missing_part_is_named(begun, tmp_path):
    folder = RunFolder(shutil.copytree(begun[1], tmp_path / "run"))
    (folder.checkpoint(8) / "model-00001-of-00004.safetensors").unlink()
    messages: list[str] = []
    assert store.latest_valid(folder.checkpoints, messages.append) == folder.checkpoint(4)
    assert "step-00000008/model-00001-of-00004.safetensors: missing" in messages[0]


def test_checkpoint_that_only_another_rank_cannot_read_is_not_called_damaged(begun, tmp_path):
    folders = [RunFolder(shutil.copytree(begun[1], tmp_path / name)) for name in "ab"]
    for name in store.read_manifest(folders[1].checkpoint(8))["parts"]:
        damage(folders[1].checkpoint(8), name)
    assert save([folder.path for folder in folders], all_ranks={"read": 8}) == [1, 1]
    for rank, folder in enumerate(folders):
        error = (folder.path / f"error-{rank}").read_text()
        assert error.startswith("RuntimeError: rank 0 could read this checkpoint, and another")
        assert f"(rank 1 on {os.uname().nodename})" in error
    assert folders[0].checkpoint_steps() == [4, 8]


# ---- ranks that cannot write ----


def save(folders: list[Path], all_ranks: dict | None = None, **last_rank) -> list[int]:
    """Let one rank for each folder save three checkpoints; return the exit statuses."""
    job = {"ranks": len(folders), "store": f"{folders[0]}-store", "first": 1, "steps": 3}
    jobs = [job | {"rank": i, "folder": str(path)} for i, path in enumerate(folders)]
    jobs = [one | (all_ranks or {}) for one in jobs]
    jobs[-1] |= last_rank
    processes = forked.start(part_rank.work, jobs, "tests.helpers.part_rank")
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("kind", ["no folder", "a folder", "only its own files"])
def test_rank_that_writes_to_another_folder_is_named_with_its_node(tmp_path, kind):
    folders = [tmp_path / "share", tmp_path / "local"]
    for folder in folders:
        (folder / "checkpoints").mkdir(parents=True)
    if kind == "no folder":
        (folders[1] / "checkpoints").rmdir()
    if kind == "only its own files":
        assert save([folders[0]] * 2, loses=True)[0] == 1
    else:
        assert save(folders)[0] == 1
    error = (folders[0] / "error-0").read_text()
    assert error.startswith(f"UserError: {folders[0]}/checkpoints: rank 1 on {os.uname().nodename}")
    assert "does not write to the folder that rank 0" in error
    assert [list((folder / "checkpoints").glob("*")) for folder in folders] == [[], []]


def test_full_disk_of_another_rank_costs_one_checkpoint(tmp_path):
    assert save([tmp_path, tmp_path, tmp_path], full_at=2) == [0, 0, 0]
    folder = RunFolder(tmp_path)
    assert folder.checkpoint_steps() == [1, 3] and hidden(folder.checkpoints) == []
    assert part_rank.holds(folder.checkpoint(3), 3)
    [event] = events.read(folder)
    assert (event["kind"], event["step"]) == ("disk_full", 2)
    assert "rank 2 on" in event["message"]


@pytest.mark.parametrize(
    ("all_ranks", "steps"), [({}, [2, 3]), ({"full_at": 2}, [1, 3])], ids=["", "full disk"]
)
def test_rank_without_the_folder_sends_its_files_to_rank_0(tmp_path, all_ranks, steps):
    share, away = tmp_path / "share", tmp_path / "away"
    for folder in (share, away):
        folder.mkdir()
    assert save([share, share, away], all_ranks=all_ranks, away=True) == [0, 0, 0]
    folder = RunFolder(share)
    assert folder.checkpoint_steps() == steps and hidden(folder.checkpoints) == []
    assert all(part_rank.holds(folder.checkpoint(step), step) for step in steps)
    assert not list(away.rglob("*.safetensors"))


@pytest.mark.parametrize("ranks", [2, 4])
def test_rank_killed_during_a_commit_leaves_only_complete_checkpoints(tmp_path, ranks):
    command = [sys.executable, part_rank.__file__, str(tmp_path), str(ranks), "8"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["newest"] > 0 and result["torn"] > 0
    store.prune(tmp_path / "checkpoints", 2)
    assert hidden(tmp_path / "checkpoints") == []


# ---- files that processes open ----

IN_OPEN = 0x20
IN_CLOSE = 0x10 | 0x08
EVENT = struct.Struct("iIII")


@contextlib.contextmanager
def opened_files(folder: Path) -> Iterator[Counter[str]]:
    """Count how often files of a folder are opened in the `with` block, by any process."""
    libc = ctypes.CDLL(None)
    descriptor = libc.inotify_init()
    # With the ends as well: equal events in a row are reported once.
    assert libc.inotify_add_watch(descriptor, os.fsencode(folder), IN_OPEN | IN_CLOSE) > 0
    counts: Counter[str] = Counter()
    yield counts
    found = os.read(descriptor, 1 << 20)
    os.close(descriptor)
    while found:
        _, mask, _, size = EVENT.unpack_from(found)
        if mask & IN_OPEN:
            counts[found[EVENT.size : EVENT.size + size].rstrip(b"\0").decode()] += 1
        found = found[EVENT.size + size :]
