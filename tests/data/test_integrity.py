"""Training does not start if a byte of the dataset was changed; the message names the file."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from orchestrator.config.experiment import load_experiment
from orchestrator.config.sections import Data
from orchestrator.data import dataset as manifest
from orchestrator.data.batches import TokenStream
from orchestrator.data.dataset import load_manifest
from orchestrator.data.index import documents_of
from orchestrator.data.prepared import dataset_dir, find_prepared
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.data.tokenizers import pairs
from orchestrator.errors import UserError
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from tests.helpers.local_job import LocalTrainJob, without_ray

FILES = [
    "train-00000.parquet",
    "val-00000.parquet",
    "documents.parquet",
    "tokenizer.json",
    "manifest.json",
]
SMALL = [
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=2",
    "train.max_steps=2",
    "train.eval_tokens=64",
    "schedule.warmup_steps=0",
    "compute.use_gpu=false",
]


@pytest.fixture
def copy(tiny_dataset, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))


def read(folder: Path) -> None:
    """Open the files that a worker opens, in the same order, and then the index of documents."""
    found = load_manifest(folder)
    load_tokenizer(found.tokenizer["name"], folder)
    for split in found.splits:
        TokenStream(folder, split)
    documents_of(folder, "train", 0, 10)


def refusal(act) -> str:
    """Return the message of the UserError that `act` raises; empty if it raises none."""
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def damages(data: bytes, draw: random.Random) -> list[bytes]:
    """Return `data` with one changed byte in each region, cut, longer, and empty."""
    places = {0, 1, len(data) // 2, len(data) - 2, len(data) - 1}
    places |= {
        draw.randrange(a, min(len(data), a + len(data) // 24 + 1))
        for a in range(0, len(data), len(data) // 24 + 1)
    }
    found = [
        data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        for at in sorted(places)
    ]
    return [*found, data[:-1], data[: draw.randrange(len(data))], data[1:], data + b"\n", b""]


def test_dataset_has_these_files(tiny_dataset):
    assert {p.name for p in tiny_dataset.iterdir() if p.name != ".lock"} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_changed_byte_anywhere_names_the_file(copy, name):
    read(copy)
    file, seed = copy / name, random.randrange(2**32)
    whole, stat = file.read_bytes(), file.stat()
    for number, damaged in enumerate(damages(whole, random.Random(seed))):
        file.write_bytes(damaged)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # hides the change
        with pytest.raises(UserError) as caught:
            read(copy)
        assert str(file) in str(caught.value), (seed, number)
        assert "\n" not in str(caught.value)
    file.write_bytes(whole)
    read(copy)


@pytest.mark.parametrize("name", FILES[:-1])
def test_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=re.escape(str(copy / name))):
        read(copy)


@pytest.mark.parametrize("name", [n for n in FILES if n != "documents.parquet"])
def test_training_does_not_start(copy, tmp_path, name):
    file = copy / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=re.escape(str(file))):
        train(
            load_experiment(None, [f"data.dir={copy}", *SMALL]), RunFolder(tmp_path / "run"), copy
        )
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert not any(f.read_text() for f in (tmp_path / "run").glob("metrics.jsonl"))


@pytest.mark.parametrize("kept", [0, 0.5, -1], ids=["empty", "half", "all but a byte"])
def test_cut_shard_is_found_without_reading_it(copy, tiny_corpus, kept):
    data = Data(corpus=str(tiny_corpus), tokenizer="char", dir=str(copy))
    assert find_prepared(data, copy) is not None
    file = copy / "val-00000.parquet"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if kept >= 0 else kept])
    with pytest.raises(UserError, match="val-00000.parquet is missing or cut; delete the folder"):
        find_prepared(data, copy)


def test_run_is_refused(copy, tiny_corpus, tmp_path):
    file = copy / "manifest.json"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    words = [f"storage={tmp_path}", f"data.dir={copy}", f"data.corpus={tiny_corpus}", "name=run"]
    job = LocalTrainJob(load_experiment(None, [*words, *SMALL]))
    with without_ray(), pytest.raises(UserError, match=re.escape(str(file))):
        job.run()


def test_manifest_with_other_text_is_refused(copy):
    file = copy / "manifest.json"
    raw = json.loads(file.read_bytes())
    for text in (
        json.dumps(raw),
        json.dumps(raw, indent=1),
        json.dumps({**raw, "new": 1}, indent=1, sort_keys=True) + "\n",
        json.dumps({k: v for k, v in raw.items() if k != "sha256"}, indent=1, sort_keys=True)
        + "\n",
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: "):
            load_manifest(copy)


def test_earlier_format_is_refused_and_has_another_folder(copy, tiny_corpus, tmp_path, monkeypatch):
    file = copy / "manifest.json"
    raw = json.loads(file.read_bytes())
    del raw["sha256"], raw["files"]
    file.write_text(json.dumps({**raw, "format_version": 1}, indent=1, sort_keys=True) + "\n")
    data = Data(corpus=str(tiny_corpus), tokenizer="char", dir=str(copy))
    with pytest.raises(
        UserError,
        match=f"format 1, this program reads {manifest.FORMAT}; delete the folder, or set another",
    ):
        find_prepared(data, dataset_dir(data, tmp_path))
    by_default = data.replace(dir=None)
    now = dataset_dir(by_default, tmp_path)
    monkeypatch.setattr("orchestrator.data.prepared.FORMAT", 1)
    assert dataset_dir(by_default, tmp_path) != now


def test_ranks_with_a_changed_byte_are_not_used(gpt2_ranks, tmp_path, monkeypatch):
    import tiktoken.load
    import tiktoken.registry

    def unreachable(_path):
        raise ConnectionError("no route to host")

    cache = Path(shutil.copytree(gpt2_ranks, tmp_path / "ranks"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.setattr(tiktoken.load, "read_file", unreachable)
    pairs._encoding.cache_clear()
    before, found = load_tokenizer("gpt2").sha256, []
    for file in sorted(cache.iterdir()):
        content = file.read_bytes()
        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
        file.write_bytes(content[:999] + bytes([content[999] ^ 1]) + content[1000:])
        pairs._encoding.cache_clear()
        used = "replaces a damaged file" in refusal(lambda: load_tokenizer("gpt2"))
        found.append(used)
        if used:
            file.write_bytes(content)
    assert sum(found) == 2  # vocab.bpe and encoder.json
    assert load_tokenizer("gpt2").sha256 == before
