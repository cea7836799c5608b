"""Preparation: the reference's tokens, the same bytes however it was run, nothing half done, and no other dataset.

Most tests run the jobs in this process, in a shuffled order; those marked so run them on Ray.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.config.experiment import Data
from orchestrator.data import index as documents_module
from orchestrator.data import parts, tasks
from orchestrator.data import prepare as prepare_module
from orchestrator.data.batches import TokenStream
from orchestrator.data.corpus import Source
from orchestrator.data.dataset import INDEX_FILE, load_manifest
from orchestrator.data.estimate import TokenEstimate, estimate_tokens
from orchestrator.data.index import documents_of, write_index
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import dataset_dir
from orchestrator.data.tasks import plan_chunks
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from tests.helpers.here import here

STORY = "It was a dark and stormy night;\r\nthe rain fell in torrents, except at <|endoftext|> intervals. 中文 😀\n"
BYTES = {"tokenizer": "byte", "append_eot": True}


def quiet(stage: str, done: int, total: int) -> None:
    assert 0 <= done <= total, stage


@pytest.fixture(name="here")
def _here():
    with here():
        yield


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Every kind of file, empty ones among them; 27 documents."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.txt").write_bytes((STORY * 40).encode())
    (folder / "b.txt").write_bytes(b"")
    (folder / "c.jsonl").write_text(
        "\n".join(json.dumps({"text": f"line {i} {STORY * (i % 3)}"}) for i in range(12))
    )
    pq.write_table(
        pa.table({"text": [STORY * (i % 4) for i in range(12)]}),
        folder / "d.parquet",
        row_group_size=5,
    )
    (folder / "e.txt").write_bytes((STORY * 7).encode())
    return folder


def documents(folder: Path) -> list[str]:
    """The texts of `mixed`, read another way."""
    lines = (folder / "c.jsonl").read_text().splitlines()
    return [
        (folder / "a.txt").read_bytes().decode(),
        "",
        *[json.loads(line)["text"] for line in lines],
        *pq.read_table(folder / "d.parquet")["text"].to_pylist(),
        (folder / "e.txt").read_bytes().decode(),
    ]


def stream(directory: Path, split: str) -> np.ndarray:
    s = TokenStream(directory, split)
    return s.read(0, s.tokens)


def fingerprint(directory: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in directory.iterdir()
        if p.name != ".lock"
    }


def text_of(ids: np.ndarray) -> str:
    return bytes(ids[ids < 256].astype(np.uint8)).decode()


def data(corpus: Path, **fields) -> Data:
    return Data(**{"corpus": str(corpus), "val_fraction": 0.25, **BYTES, **fields})


# ---- known numbers, on Ray ----
def test_gpt2_on_shakespeare_gives_the_known_streams(
    ray_cluster, shakespeare, gpt2_ranks, tmp_path
):
    made = prepare(
        Data(corpus=str(shakespeare), tokenizer="gpt2"),
        tmp_path / "s",
        progress=quiet,
        chunk_bytes=200_000,
    )
    assert {k: (s.tokens, s.stream_sha256, s.bytes) for k, s in made.splits.items()} == {
        "train": (
            301_966,
            "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f",
            1_003_854,
        ),
        "val": (
            36_059,
            "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b",
            111_540,
        ),
    }
    assert made.sources == [
        {
            "name": "tinyshakespeare.txt",
            "size": 1_115_394,
            "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        }
    ]
    theirs = np.array(
        load_tokenizer("gpt2").encode(shakespeare.read_text("utf-8")[: int(0.9 * 1_115_394)])
    )
    assert (stream(tmp_path / "s", "train") == theirs).all()


def test_characters_of_shakespeare(here, shakespeare, tmp_path):
    made = prepare(
        Data(corpus=str(shakespeare), tokenizer="char"),
        tmp_path / "s",
        progress=quiet,
        chunk_bytes=100_000,
    )
    assert [s.tokens for s in made.splits.values()] == [1_003_854, 111_540]
    assert made.tokenizer["n_vocab"] == 65
    text = load_tokenizer("char", tmp_path / "s").decode(stream(tmp_path / "s", "val"))
    assert text == shakespeare.read_text("utf-8")[1_003_854:]


# ---- the stream ----
@pytest.mark.parametrize("append_eot", [True, False])
@pytest.mark.parametrize("val_fraction", [0.1, 0.25, 0.5, 0.97])
def test_tail_splits_the_characters_and_encodes_each_side_by_itself(
    here, mixed, tmp_path, append_eot, val_fraction
):
    made = prepare(
        data(mixed, append_eot=append_eot, val_fraction=val_fraction),
        tmp_path / "d",
        progress=quiet,
        chunk_bytes=501,
    )
    texts, whole = documents(mixed), "".join(documents(mixed))
    cut = len(whole) - round(len(whole) * val_fraction + 0.4999)  # floor((1 - f) n)
    expected, position = {"train": [], "val": []}, 0
    for text in texts:
        before = text[: max(0, cut - position)]
        expected["train"] += list(before.encode())
        expected["val"] += list(text[len(before) :].encode())
        position += len(text)
        if append_eot:  # with its document's last character
            expected["train" if position <= cut and (text or position < cut) else "val"].append(256)
    for split, ids in expected.items():
        assert stream(tmp_path / "d", split).tolist() == ids
        assert made.splits[split].bytes == len([i for i in ids if i != 256])
    assert sum(s.tokens for s in made.splits.values()) == len(whole.encode()) + append_eot * len(
        texts
    )


def test_a_cut_exactly_between_two_documents_and_one_inside(here, tmp_path):
    for name, text in (("a", "x" * 60), ("b", "y" * 20), ("c", "z" * 20)):
        (tmp_path / f"corpus_{name}.txt").write_text(text)
    for fraction, counts in ((0.2, (2, 1)), (0.3, (2, 2))):
        out = tmp_path / str(fraction)
        made = prepare(
            data(tmp_path / "corpus_*.txt", val_fraction=fraction),
            out,
            progress=quiet,
            chunk_bytes=20,
        )
        assert tuple(s.documents for s in made.splits.values()) == counts
    assert stream(tmp_path / "0.2", "train").tolist() == [120] * 60 + [256] + [121] * 20 + [256]
    assert stream(tmp_path / "0.3", "val").tolist() == [121] * 10 + [256] + [122] * 20 + [256]


@pytest.mark.parametrize("append_eot", [True, False])
def test_every_cut_of_every_chunking_puts_every_character_and_end_where_it_belongs(
    tmp_path, append_eot
):
    """Exhaustive over a corpus of empty, cuttable and uncuttable documents: streams and the index of documents."""
    texts = ["", "ab", "c d", "", "", "efghi", ""]
    for i, text in enumerate(texts):
        (tmp_path / str(i)).write_text(text)
    load_tokenizer("byte").save(tmp_path)
    for chunk_bytes in (1, 2, 3, 100):
        for cut in range(11):
            found = by_hand(tmp_path, texts, chunk_bytes, cut, append_eot)
            assert found == expected_split(texts, cut, append_eot), (chunk_bytes, cut)


def by_hand(folder: Path, texts: list[str], chunk_bytes: int, cut: int, append_eot: bool) -> dict:
    """Run the tasks over a corpus: {split: (ids, [(document, first token)])}."""
    out = folder / f"{chunk_bytes}-{cut}"
    out.mkdir()
    ids: dict = {"train": [], "val": []}
    index: dict = {"train": [], "val": []}
    before = 0
    sources = [Source(str(i), folder / str(i), len(text)) for i, text in enumerate(texts)]
    for i, spans in enumerate(plan_chunks(sources, chunk_bytes, Data())):
        json_spans = [asdict(span) for span in spans]
        tasks.tokenize(
            chunk=i,
            spans=json_spans,
            train_characters=cut - before,
            val_files=[],
            val_fraction=0.5,
            tokenizer=("byte", ""),
            append_eot=append_eot,
            dataset=str(folder),
            folder=str(out),
        )
        before += tasks.survey(json_spans, True)["characters"]
        for split in ids:
            made = json.loads((out / f"{i:08d}.{split}.json").read_bytes())
            index[split] += [(document, first + len(ids[split])) for document, first in made]
            ids[split] += np.fromfile(out / f"{i:08d}.{split}.bin", "<u2").tolist()
    return {split: (ids[split], index[split]) for split in ids}


def expected_split(texts: list[str], cut: int, append_eot: bool) -> dict:
    """Character by character: a character lies where it is, a document begins with its first character or, empty, at
    its place, again in val where the cut is inside it, and ends with its last character or, empty, at its place."""
    ids, index, position = {"train": [], "val": []}, {"train": [], "val": []}, 0
    for n, text in enumerate(texts):
        places = ["train" if position + i < cut else "val" for i in range(len(text) or 1)]
        for split in dict.fromkeys(places):
            index[split].append((str(n), len(ids[split])))
            ids[split] += [ord(c) for c, place in zip(text, places, strict=False) if place == split]
        if append_eot:
            ids[places[-1]].append(256)
        position += len(text)
    return {split: (ids[split], index[split]) for split in ids}


def test_hash_puts_each_document_where_its_content_says(here, mixed, tmp_path):
    prepare(data(mixed, split="hash"), tmp_path / "d", progress=quiet, chunk_bytes=700)
    expected = {"train": [], "val": []}
    for text in documents(mixed):
        val = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.25 * 2**64
        expected["val" if val else "train"] += [*text.encode(), 256]
    assert {split: stream(tmp_path / "d", split).tolist() for split in expected} == expected


def test_hash_moves_no_document_when_others_are_added(here, tmp_path):
    corpus = tmp_path / "docs.jsonl"
    lines = [json.dumps({"text": f"document {i}"}) for i in range(200)]
    found = []
    for number, shown in enumerate((lines[:100], lines[::-1])):
        corpus.write_text("\n".join(shown))
        out = tmp_path / str(number)
        prepare(data(corpus, split="hash"), out, progress=quiet, chunk_bytes=300)
        found.append(
            [set(text_of(stream(out, split)).split("document ")) for split in ("train", "val")]
        )
    for before, after in zip(*found, strict=True):
        assert before <= after
    assert 25 < len(found[1][1]) < 80  # of 200, a quarter


def test_end_of_text_in_a_text_is_text(here, mixed, tmp_path):
    made = prepare(data(mixed), tmp_path / "d", progress=quiet)
    ids = np.concatenate([stream(tmp_path / "d", s) for s in ("train", "val")])
    assert (ids == 256).sum() == 27
    assert (
        text_of(ids).count("<|endoftext|>") == "".join(documents(mixed)).count("<|endoftext|>") > 0
    )
    assert sum(s.documents for s in made.splits.values()) == 28  # one is cut in two


def test_every_token_knows_its_document(here, mixed, tmp_path):
    prepare(data(mixed), tmp_path / "d", progress=quiet, chunk_bytes=600)
    train = stream(tmp_path / "d", "train")
    whole = documents_of(tmp_path / "d", "train", 0, len(train))
    assert whole[0] == ("mixed/a.txt", 0)
    assert [d for d, _ in whole][1:3] == ["mixed/b.txt", "mixed/c.jsonl@0"]
    for document, first in whole[2:14]:
        at = int(document.split("@")[1])
        text = json.loads((mixed / "c.jsonl").read_bytes()[at:].split(b"\n")[0])["text"].encode()
        assert bytes(train[first : first + len(text)].astype(np.uint8)) == text
    for offset in (0, 1, whole[5][1] - 1, whole[5][1], len(train) - 3):
        ends = [first for _, first in whole[1:]] + [len(train)]
        expected = [
            w for w, end in zip(whole, ends, strict=True) if w[1] < offset + 3 and end > offset
        ]
        assert documents_of(tmp_path / "d", "train", offset, 3) == expected


@pytest.mark.parametrize("group_rows", [1, 2, 3, 100])
def test_documents_are_found_among_empty_ones_and_across_row_groups(
    tmp_path, monkeypatch, group_rows
):
    monkeypatch.setattr(documents_module, "GROUP_ROWS", group_rows)
    lengths = [0, 3, 0, 0, 2, 1, 0, 4, 0]
    rows = [(sum(lengths[:i]), f"d{i}") for i in range(len(lengths))]
    documents_module.write_index(tmp_path, {"train": rows, "val": [(0, "v0"), (5, "v1")]})
    index = tmp_path / INDEX_FILE
    for offset in range(10):
        for length in range(1, 11 - offset):
            expected = [
                (f"d{i}", first)
                for i, (first, _) in enumerate(rows)
                if first < offset + length and first + lengths[i] > offset and lengths[i]
            ]
            assert documents_module.find_documents(index, "train", offset, length) == expected, (
                offset,
                length,
            )
    assert documents_module.find_documents(index, "val", 4, 2) == [("v0", 0), ("v1", 5)]


# ---- the same bytes, however ----
@pytest.mark.parametrize(
    ("split", "tokenizer", "append_eot"),
    [
        ("tail", "byte", True),
        ("tail", "char", False),
        ("hash", "byte", True),
        ("hash", "char", False),
    ],
)
def test_bytes_do_not_depend_on_chunks_or_on_the_order_in_which_they_end(
    here, mixed, tmp_path, split, tokenizer, append_eot
):
    settings = data(mixed, split=split, tokenizer=tokenizer, append_eot=append_eot)
    found = []
    for chunk in (137, 1000, 4096, 10**7):
        prepare(settings, tmp_path / str(chunk), progress=quiet, chunk_bytes=chunk, shard_rows=2)
        found.append(fingerprint(tmp_path / str(chunk)))
    assert len(found[0]) > 6  # several shards
    assert found[1:] == found[:1] * 3


def test_bytes_do_not_depend_on_ray_or_on_where_the_corpus_lies(
    ray_cluster, mixed, tmp_path, request
):
    prepare(data(mixed), tmp_path / "ray", progress=quiet, chunk_bytes=900, shard_rows=2)
    request.getfixturevalue("here")
    moved = tmp_path / "elsewhere" / "mixed"
    shutil.copytree(mixed, moved)
    prepare(data(moved), tmp_path / "here", progress=quiet, chunk_bytes=5000, shard_rows=2)
    assert fingerprint(tmp_path / "ray") == fingerprint(tmp_path / "here")
    assert "tmp" not in (tmp_path / "ray" / "manifest.json").read_text()


def test_one_large_text_in_parts_has_the_tokens_of_the_whole(here, gpt2_ranks, tmp_path):
    text = (
        Path(argparse_source()).read_text("utf-8")
        + "中文，没有空格。" * 300
        + "x" * 5000
        + "\r\n\r\n  end"
    )
    (tmp_path / "large.txt").write_bytes(text.encode())
    settings = data(tmp_path / "large.txt", tokenizer="gpt2", append_eot=False, val_fraction=0.1)
    prepare(settings, tmp_path / "d", progress=quiet, chunk_bytes=1009)
    cut, encode = int(0.9 * len(text)), load_tokenizer("gpt2").encode
    assert (stream(tmp_path / "d", "train") == encode(text[:cut])).all()
    assert (stream(tmp_path / "d", "val") == encode(text[cut:])).all()


def argparse_source() -> str:
    import argparse

    return argparse.__file__


# ---- interrupted ----
KILLED = """
import sys
from pathlib import Path
import ray
from orchestrator.config.experiment import Data
from orchestrator.data.prepare import prepare
ray.init(log_to_driver=False)
data = Data(corpus=sys.argv[1], tokenizer="byte", append_eot=True, val_fraction=0.25)
prepare(data, Path(sys.argv[2]), progress=lambda *_: None, chunk_bytes=100)
"""


def test_killed_while_tokenizing_it_is_no_dataset_and_goes_on(
    ray_head, mixed, tmp_path, here, monkeypatch
):
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(mixed), str(out)],
        env=ray_head.env,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob(".parts/*/*.json"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="prepare"):
        load_manifest(out)
    made = {file: file.stat().st_mtime_ns for file in out.glob(".parts/*/*.json")}
    kept = {}

    def note_parts(*args):
        kept.update({file: file.stat().st_mtime_ns for file in out.glob(".parts/*/*.json")})
        write_index(*args)

    monkeypatch.setattr(prepare_module, "write_index", note_parts)
    prepare(data(mixed), out, progress=quiet, chunk_bytes=100)
    assert sum(kept.get(file) == time_ns for file, time_ns in made.items()) >= 5
    prepare(data(mixed), tmp_path / "fresh", progress=quiet, chunk_bytes=100)
    assert fingerprint(out) == fingerprint(tmp_path / "fresh")


def test_a_part_that_is_torn_is_made_again(here, mixed, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_shard", full_disk)
        with pytest.raises(OSError, match="disk full"):
            prepare(data(mixed), tmp_path / "d", progress=quiet, chunk_bytes=500)
    [part, *_] = sorted((tmp_path / "d").glob(".parts/*/*.train.bin"))
    content = part.read_bytes()
    part.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    prepare(data(mixed), tmp_path / "d", progress=quiet, chunk_bytes=500)
    prepare(data(mixed), tmp_path / "fresh", progress=quiet)
    assert fingerprint(tmp_path / "d") == fingerprint(tmp_path / "fresh")
    assert not (tmp_path / "d" / ".parts").exists()


# ---- prepared already ----
def test_preparing_again_does_nothing(here, mixed, tmp_path, monkeypatch):
    first = prepare(data(mixed), tmp_path / "d", progress=quiet)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()}
    monkeypatch.setattr(
        prepare_module.RayTasks, "__enter__", lambda _: pytest.fail("Ray was started")
    )
    assert prepare(data(mixed), tmp_path / "d", progress=quiet) == first
    os.utime(mixed / "a.txt")  # newer than the dataset, and still the same
    assert prepare(data(mixed), tmp_path / "d", progress=quiet) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "d").iterdir()} == before


def test_a_download_is_prepared_from_the_cache_and_is_not_needed_again(here, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = (STORY * 30).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    cached = tmp_path / "cache" / "espalier" / f"{sha256[:16]}-input.txt"
    cached.parent.mkdir(parents=True)
    settings = Data(
        corpus=f"https://example.invalid/input.txt#sha256={sha256}", val_fraction=0.25, **BYTES
    )
    cached.write_bytes(content[:-1] + b"?")
    with pytest.raises(UserError, match="not what its SHA-256 says"):
        prepare(settings, tmp_path / "d", progress=quiet)
    cached.write_bytes(content)
    made = prepare(settings, tmp_path / "d", progress=quiet)
    assert made.sources == [{"name": "input.txt", "size": len(content), "sha256": sha256}]
    where = dataset_dir(settings, tmp_path)
    cached.unlink()
    assert prepare(settings, tmp_path / "d", progress=quiet) == made
    assert dataset_dir(settings, tmp_path) == where
    other = settings.replace(corpus=f"https://example.invalid/input.txt#sha256={'0' * 64}")
    with pytest.raises(UserError, match="has changed since then"):
        prepare(other, tmp_path / "d", progress=quiet)


def test_a_dataset_that_was_brought_without_its_corpus_is_used(here, mixed, tmp_path):
    first = prepare(data(mixed), tmp_path / "d", progress=quiet)
    shutil.rmtree(mixed)
    assert prepare(data(mixed), tmp_path / "d", progress=quiet) == first
    with pytest.raises(UserError, match="mixxed does not exist"):
        prepare(data(tmp_path / "mixxed"), tmp_path / "d", progress=quiet)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"val_fraction": 0.2}, "data.val_fraction is 0.25 there and 0.2 here"),
        ({"split": "hash"}, "data.split"),
        ({"append_eot": False}, "data.append_eot"),
        ({"tokenizer": "char", "append_eot": False}, "data.tokenizer is byte"),
    ],
)
def test_another_setting_in_the_same_folder_is_refused(here, mixed, tmp_path, change, says):
    prepare(data(mixed), tmp_path / "d", progress=quiet)
    before = fingerprint(tmp_path / "d")
    with pytest.raises(UserError, match=re.escape(says)):
        prepare(data(mixed, **change), tmp_path / "d", progress=quiet)
    assert fingerprint(tmp_path / "d") == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda f: (f / "a.txt").write_bytes(
                (f / "a.txt").read_bytes().replace(b"dark", b"DARK")
            ),
            "a.txt has changed",
        ),
        (
            lambda f: (f / "a.txt").write_bytes(b"short"),
            "a.txt is 4280 bytes there and 5 bytes here",
        ),
        (lambda f: (f / "e.txt").unlink(), "e.txt is .* bytes there and missing here"),
        (lambda f: (f / "f.txt").write_text("new"), "f.txt is missing there"),
    ],
)
def test_a_corpus_that_changed_is_refused(here, mixed, tmp_path, change, says):
    prepare(data(mixed), tmp_path / "d", progress=quiet)
    change(mixed)
    with pytest.raises(UserError, match=says):
        prepare(data(mixed), tmp_path / "d", progress=quiet)


def test_a_corpus_that_changes_meanwhile_is_no_dataset(here, mixed, tmp_path, monkeypatch):
    original = prepare_module.write_index
    monkeypatch.setattr(
        prepare_module,
        "write_index",
        lambda *a: (original(*a), (mixed / "a.txt").write_text("other")),
    )
    with pytest.raises(UserError, match="while it was prepared"):
        prepare(data(mixed), tmp_path / "d", progress=quiet)
    assert not (tmp_path / "d" / "manifest.json").exists()


# ---- where it lies, what it will be ----
def test_the_folder_follows_from_settings_and_corpus(mixed, tmp_path, monkeypatch):
    base = dataset_dir(data(mixed), tmp_path)
    assert base.parent == tmp_path / "data"
    assert dataset_dir(data(mixed), tmp_path) == base
    assert dataset_dir(data(mixed, split="hash"), tmp_path) != base
    (mixed / "a.txt").write_text("longer or shorter")
    assert dataset_dir(data(mixed), tmp_path) != base
    monkeypatch.chdir(tmp_path)
    assert dataset_dir(data(mixed, dir="mine"), tmp_path) == tmp_path / "mine"


@pytest.mark.parametrize(
    "fields",
    [{"append_eot": True}, {"append_eot": False}, {"tokenizer": "char", "append_eot": False}],
)
def test_an_exact_estimate_is_what_preparing_finds(here, mixed, tmp_path, fields):
    settings = data(mixed / "*.txt", **fields)
    guess = estimate_tokens(settings)
    made = prepare(settings, tmp_path / "d", progress=quiet)
    assert guess.exact
    assert guess.tokens == sum(s.tokens for s in made.splits.values())
    assert guess.n_vocab == made.tokenizer["n_vocab"]


def test_an_estimate_is_near_and_says_that_it_is_none(shakespeare, gpt2_ranks):
    guess = estimate_tokens(Data(corpus=str(shakespeare), tokenizer="gpt2"))
    assert not guess.exact
    assert guess.tokens == pytest.approx(338_025, rel=0.05)


def test_an_estimate_downloads_nothing(tmp_path, monkeypatch, mixed):
    import tiktoken.load
    import tiktoken.registry

    monkeypatch.setattr(
        tiktoken.load, "read_file", lambda path: pytest.fail(f"{path} would be downloaded")
    )
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert estimate_tokens(data(mixed, tokenizer="o200k_base")).n_vocab == 200_019
    unknown = estimate_tokens(Data(corpus=f"https://example.org/a.txt#sha256={'0' * 64}"))
    assert unknown == TokenEstimate(None, None, False, 50_257)
    assert not (tmp_path / "none").exists()


# ---- mistakes ----
def test_too_long_a_run_of_spaces_is_a_user_error(here, gpt2_ranks, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"some words, then " + b" " * 1_100_000 + b"and the end")
    with pytest.raises(UserError, match=r"t\.txt: a run of whitespace too long"):
        prepare(
            data(tmp_path / "t.txt", tokenizer="gpt2", val_fraction=0.000001),
            tmp_path / "d",
            progress=quiet,
        )
    assert not (tmp_path / "d" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("content", "fields", "says"),
    [
        (b"one document", {"split": "hash"}, "leaves .* without a token"),
        (b"", {}, "holds no text"),
        (b"\xff", {}, "not UTF-8"),
        (b"abc", {"tokenizer": "nope"}, "unknown"),
        (b"abc", {"tokenizer": "char"}, "no end-of-text"),
    ],
)
def test_what_cannot_become_a_dataset_leaves_none(here, tmp_path, content, fields, says):
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match=says):
        prepare(data(tmp_path / "t.txt", **fields), tmp_path / "d", progress=quiet)
    assert not list((tmp_path / "d").glob("[!.]*.parquet"))
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_an_error_in_a_task_reaches_the_user_through_ray(ray_cluster, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"fine so far \xff")
    with pytest.raises(UserError, match=r"t\.txt: byte 12"):
        prepare(data(tmp_path / "t.txt"), tmp_path / "d", progress=quiet)
