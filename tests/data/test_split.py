"""Which tokens are train and which are val, and which document each token comes from."""

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from orchestrator.config.sections import Data
from orchestrator.data import index as index_module
from orchestrator.data import split as split_module
from orchestrator.data import tasks
from orchestrator.data.corpus import CorpusFile
from orchestrator.data.dataset import INDEX_FILE
from orchestrator.data.index import documents_of, find_documents, write_index
from orchestrator.data.parts import Parts
from orchestrator.data.prepare import prepare
from orchestrator.data.tokenizer import load_tokenizer
from tests.helpers.datasets import data, ids_of, mixed_documents, quiet

EOT = 256


@pytest.mark.parametrize("append_eot", [True, False])
@pytest.mark.parametrize("val_fraction", [0.1, 0.25, 0.5, 0.97])
def test_tail_splits_characters_and_encodes_each_side_alone(
    here, mixed, tmp_path, append_eot, val_fraction
):
    settings = data(mixed, append_eot=append_eot, val_fraction=val_fraction)
    made = prepare(settings, tmp_path / "d", progress=quiet, chunk_bytes=501)
    texts = mixed_documents(mixed)
    whole = "".join(texts)
    cut = len(whole) - round(len(whole) * val_fraction + 0.4999)  # floor((1 - f) n)
    expected: dict[str, list[int]] = {"train": [], "val": []}
    position = 0
    for text in texts:
        before = text[: max(0, cut - position)]
        expected["train"] += list(before.encode())
        expected["val"] += list(text[len(before) :].encode())
        position += len(text)
        if append_eot:  # follows the last character of its document
            ends_in_train = position <= cut and (text or position < cut)
            expected["train" if ends_in_train else "val"].append(EOT)
    for split, ids in expected.items():
        assert ids_of(tmp_path / "d", split).tolist() == ids
        assert made.splits[split].bytes == len(ids) - ids.count(EOT)


@pytest.mark.parametrize(("val_fraction", "train"), [(0.9, 1), (0.7, 3), (0.1, 9), (0.25, 7)])
def test_fraction_of_val_is_exact(val_fraction, train):
    assert (
        split_module.tail_cut(10, val_fraction) == train
    )  # (1 - 0.9) * 10 is less than 1 as a float


def test_cut_between_two_documents_and_cut_inside_of_one(here, tmp_path):
    for name, text in (("a", "x" * 60), ("b", "y" * 20), ("c", "z" * 20)):
        (tmp_path / f"corpus_{name}.txt").write_text(text)
    for fraction, counts in ((0.2, (2, 1)), (0.3, (2, 2))):
        settings = data(tmp_path / "corpus_*.txt", val_fraction=fraction)
        made = prepare(settings, tmp_path / str(fraction), progress=quiet, chunk_bytes=20)
        assert tuple(split.documents for split in made.splits.values()) == counts
    train = ids_of(tmp_path / "0.2", "train").tolist()
    assert train == [*b"x" * 60, EOT, *b"y" * 20, EOT]
    val = ids_of(tmp_path / "0.3", "val").tolist()
    assert val == [*b"y" * 10, EOT, *b"z" * 20, EOT]


@pytest.mark.parametrize("append_eot", [True, False])
def test_every_cut_of_every_chunking_puts_characters_and_ends_where_they_belong(
    tmp_path, append_eot
):
    """All cuts of a corpus of empty documents, documents with a safe cut and without one."""
    texts = ["", "ab", "c d", "", "", "efghi", ""]
    for i, text in enumerate(texts):
        (tmp_path / str(i)).write_text(text)
    load_tokenizer("byte").save(tmp_path)
    for chunk_bytes in (1, 2, 3, 100):
        for cut in range(11):
            found = run_tasks(tmp_path, texts, chunk_bytes, cut, append_eot)
            assert found == expected_split(texts, cut, append_eot), (chunk_bytes, cut)


def run_tasks(folder: Path, texts: list[str], chunk_bytes: int, cut: int, append_eot: bool):
    """Survey and tokenize a corpus: {split: (ids, [(document, first token)])}."""
    folder_of_parts = folder / f"{chunk_bytes}-{cut}"
    folder_of_parts.mkdir()
    sources = [CorpusFile(str(i), folder / str(i), len(text)) for i, text in enumerate(texts)]
    chunks = tasks.plan_chunks(sources, chunk_bytes, Data())
    jobs = [
        {**job, "spans": [asdict(span) for span in job["spans"]]}
        for job in tasks.tokenize_jobs(chunks, {}, Data())
    ]
    tokenize = functools.partial(
        tasks.tokenize,
        val_fraction=0.5,
        tokenizer=("byte", ""),
        fast=False,
        append_eot=append_eot,
        dataset=str(folder),
        folder=str(folder_of_parts),
    )
    facts = [tokenize(**job) for job in jobs]
    again = tasks.cut_tail(jobs, facts, cut)
    assert 1 <= len(again) < 4 + len(texts)
    for i, job in again.items():
        facts[i] = tokenize(**job)
    parts = Parts(folder_of_parts, facts)
    found = {}
    for split in ("train", "val"):
        index = [(document, first) for first, document in parts.documents(split)]
        slices = parts.shard_jobs(split, folder, 1, np.dtype("<u2"))
        ids = []
        for path, first, count in [part for job in slices for part in job["slices"]]:
            ids += np.fromfile(path, "<u2")[first : first + count].tolist()
        found[split] = (ids, index)
    return found


def expected_split(texts: list[str], cut: int, append_eot: bool):
    """Do the same as `run_tasks`, character by character.

    A document begins at its first character, and again in val if the cut is inside of it. Its
    end-of-text id follows its last character.
    """
    ids: dict[str, list[int]] = {"train": [], "val": []}
    index: dict[str, list] = {"train": [], "val": []}
    position = 0
    for n, text in enumerate(texts):
        places = ["train" if position + i < cut else "val" for i in range(len(text) or 1)]
        for split in dict.fromkeys(places):
            index[split].append((str(n), len(ids[split])))
            ids[split] += [ord(c) for c, place in zip(text, places, strict=False) if place == split]
        if append_eot:
            ids[places[-1]].append(EOT)
        position += len(text)
    return {split: (ids[split], index[split]) for split in ids}


def test_hash_splits_documents_by_their_content(here, mixed, tmp_path):
    prepare(data(mixed, split="hash"), tmp_path / "d", progress=quiet, chunk_bytes=700)
    expected: dict[str, list[int]] = {"train": [], "val": []}
    for text in mixed_documents(mixed):
        val = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.25 * 2**64
        expected["val" if val else "train"] += [*text.encode(), EOT]
    assert {split: ids_of(tmp_path / "d", split).tolist() for split in expected} == expected


def test_hash_moves_no_document_when_others_are_added(here, tmp_path):
    corpus = tmp_path / "docs.jsonl"
    lines = [json.dumps({"text": f"document {i}"}) for i in range(200)]
    found = []
    for number, shown in enumerate((lines[:100], lines[::-1])):
        corpus.write_text("\n".join(shown))
        out = tmp_path / str(number)
        prepare(data(corpus, split="hash"), out, progress=quiet, chunk_bytes=300)
        splits = [bytes(i for i in ids_of(out, split) if i < EOT) for split in ("train", "val")]
        found.append([set(split.split(b"document ")) for split in splits])
    for before, after in zip(*found, strict=True):
        assert before <= after
    assert 25 < len(found[1][1]) < 80  # of 200, about a quarter


def test_text_that_looks_like_end_of_text_is_ordinary_text(here, mixed, tmp_path):
    made = prepare(data(mixed), tmp_path / "d", progress=quiet)
    ids = np.concatenate([ids_of(tmp_path / "d", split) for split in ("train", "val")])
    assert (ids == EOT).sum() == 27
    marks = "".join(mixed_documents(mixed)).count("<|endoftext|>")
    assert bytes(ids[ids < EOT].astype(np.uint8)).count(b"<|endoftext|>") == marks > 0
    assert sum(split.documents for split in made.splits.values()) == 28  # one is cut in two


def test_document_of_every_token_is_found(here, mixed, tmp_path):
    prepare(data(mixed), tmp_path / "d", progress=quiet, chunk_bytes=600)
    train = ids_of(tmp_path / "d", "train")
    whole = documents_of(tmp_path / "d", "train", 0, len(train))
    assert [document for document, _ in whole][:3] == [
        "mixed/a.txt",
        "mixed/b.txt",
        "mixed/c.jsonl@0",
    ]
    lines = (mixed / "c.jsonl").read_bytes()
    for document, first in whole[2:14]:
        at = int(document.split("@")[1])
        text = json.loads(lines[at:].split(b"\n")[0])["text"].encode()
        assert bytes(train[first : first + len(text)].astype(np.uint8)) == text
    for offset in (0, 1, whole[5][1] - 1, whole[5][1], len(train) - 3):
        ends = [first for _, first in whole[1:]] + [len(train)]
        expected = [
            entry
            for entry, end in zip(whole, ends, strict=True)
            if entry[1] < offset + 3 and end > offset
        ]
        assert documents_of(tmp_path / "d", "train", offset, 3) == expected


@pytest.mark.parametrize("group_rows", [1, 2, 3, 100])
def test_documents_are_found_among_empty_ones_and_across_row_groups(
    tmp_path, monkeypatch, group_rows
):
    monkeypatch.setattr(index_module, "GROUP_ROWS", group_rows)
    lengths = [0, 3, 0, 0, 2, 1, 0, 4, 0]
    rows = [(sum(lengths[:i]), f"d{i}") for i in range(len(lengths))]
    write_index(tmp_path, {"train": rows, "val": [(0, "v0"), (5, "v1")]})
    index = tmp_path / INDEX_FILE
    for offset in range(10):
        for length in range(1, 11 - offset):
            expected = [
                (document, first)
                for (first, document), size in zip(rows, lengths, strict=True)
                if first < offset + length and first + size > offset and size > 0
            ]
            assert find_documents(index, "train", offset, length) == expected, (offset, length)
    assert find_documents(index, "val", 4, 2) == [("v0", 0), ("v1", 5)]
