"""Datasets that exist already, their folders, and estimates before a preparation."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator import hashes
from orchestrator.config.experiment import load_experiment
from orchestrator.config.sections import Data
from orchestrator.cost.estimate import dry_run
from orchestrator.data import corpus, documents, ray_tasks
from orchestrator.data.corpus import resolve
from orchestrator.data.dataset import FORMAT
from orchestrator.data.documents import read_pieces
from orchestrator.data.estimate import SAMPLE_BYTES, TokenEstimate, estimate_tokens, sample
from orchestrator.data.input.kinds import TEXT, Kind
from orchestrator.data.prepare import prepare, prepare_in
from orchestrator.data.prepared import dataset_dir, known_dir, settings_of, with_hashes
from orchestrator.data.tasks import plan_chunks
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.files import file_sha256
from tests.helpers.datasets import STORY, data, hashes_of, quiet

# ---- a dataset that exists ----


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"val_fraction": 0.2}, "data.val_fraction: before 0.25, now 0.2"),
        ({"split": "hash"}, "data.split"),
        ({"append_eot": False}, "data.append_eot"),
        ({"tokenizer": "char", "append_eot": False}, "data.tokenizer: before 'byte'"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(here, mixed, tmp_path, change, says):
    prepare(data(mixed), tmp_path / "d", progress=quiet)
    before = hashes_of(tmp_path / "d")
    with pytest.raises(UserError, match=re.escape(says)):
        prepare(data(mixed, **change), tmp_path / "d", progress=quiet)
    assert hashes_of(tmp_path / "d") == before


def replace_a_word(folder):
    file = folder / "a.txt"
    file.write_bytes(file.read_bytes().replace(b"dark", b"DARK"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replace_a_word, "a.txt has changed"),
        (
            lambda folder: (folder / "a.txt").write_bytes(b"short"),
            "size of a.txt: before 4280, now 5",
        ),
        (lambda folder: (folder / "b.txt").unlink(), "size of b.txt: before 0, now None"),
        (lambda folder: (folder / "f.txt").write_text("new"), "size of f.txt: before None"),
    ],
)
def test_changed_corpus_is_refused(here, mixed, tmp_path, change, says):
    prepare(data(mixed), tmp_path / "d", progress=quiet)
    change(mixed)
    with pytest.raises(UserError, match=says):
        prepare(data(mixed), tmp_path / "d", progress=quiet)


def test_files_in_another_order_are_refused(here, mixed, tmp_path):
    files = [str(mixed / "a.txt"), str(mixed / "e.txt")]
    prepare(data(files), tmp_path / "d", progress=quiet)
    with pytest.raises(UserError, match="another order"):
        prepare(data(files[::-1]), tmp_path / "d", progress=quiet)


def test_dataset_without_its_corpus_is_used(here, mixed, tmp_path):
    first = prepare(data(mixed), tmp_path / "d", progress=quiet)
    shutil.rmtree(mixed)
    assert prepare(data(mixed), tmp_path / "d", progress=quiet) == first
    with pytest.raises(UserError, match="mixxed does not exist"):
        prepare(data(tmp_path / "mixxed"), tmp_path / "d", progress=quiet)


def test_download_is_prepared_from_the_cache_and_not_needed_again(here, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = (STORY * 30).encode()
    sha256 = hashlib.sha256(content).hexdigest()
    cached = tmp_path / "cache" / "espalier" / f"{sha256[:16]}-input.txt"
    cached.parent.mkdir(parents=True)
    settings = data(f"https://example.invalid/input.txt#sha256={sha256}")
    cached.write_bytes(content[:-1] + b"?")
    with pytest.raises(UserError, match="has another SHA-256"):
        prepare(settings, tmp_path / "d", progress=quiet)
    cached.write_bytes(content)
    made = prepare(settings, tmp_path / "d", progress=quiet)
    assert made.sources == [{"name": "input.txt", "size": len(content), "sha256": sha256}]
    where = dataset_dir(settings, tmp_path)
    cached.unlink()
    assert prepare(settings, tmp_path / "d", progress=quiet) == made
    assert dataset_dir(settings, tmp_path) == where
    other = data(f"https://example.invalid/input.txt#sha256={'0' * 64}")
    with pytest.raises(UserError, match="has changed since then"):
        prepare(other, tmp_path / "d", progress=quiet)


def test_folder_depends_on_settings_and_corpus(mixed, tmp_path, monkeypatch):
    base = dataset_dir(data(mixed), tmp_path)
    assert base.parent == tmp_path / "data"
    assert dataset_dir(data(mixed), tmp_path) == base
    assert dataset_dir(data(mixed, split="hash"), tmp_path) != base
    (mixed / "a.txt").write_text("longer or shorter")
    assert dataset_dir(data(mixed), tmp_path) != base
    monkeypatch.chdir(tmp_path)
    assert dataset_dir(data(mixed, dir="mine"), tmp_path) == tmp_path / "mine"


def test_folder_of_known_settings_never_changes(tmp_path):
    """Another name would make all prepared datasets useless."""
    (tmp_path / "corpus.txt").write_text("some text")
    settings = data(tmp_path / "corpus.txt")
    assert dataset_dir(settings, tmp_path).name == "7b9f256f24018ff6"


def lower_case(mixed):
    file = mixed / "a.txt"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(file.read_bytes().swapcase())
    os.utime(file, ns=times)


def exchange(mixed):
    """Two files of equal size exchange their names; no file is written."""
    (mixed / "a.txt").rename(mixed / "x.txt")
    (mixed / "a2.txt").rename(mixed / "a.txt")
    (mixed / "x.txt").rename(mixed / "a2.txt")


def replace_by_an_older_file(mixed):
    """As `cp -p`, `rsync -t` and `tar` do."""
    other = mixed.parent / "other"
    other.write_bytes((mixed / "a.txt").read_bytes().swapcase())
    os.utime(other, (0, 0))
    other.replace(mixed / "a.txt")


@pytest.mark.parametrize("change", [lower_case, exchange, replace_by_an_older_file])
def test_other_text_of_the_same_names_and_sizes_has_another_dataset(here, mixed, tmp_path, change):
    (mixed / "a2.txt").write_bytes((mixed / "a.txt").read_bytes().upper())
    first = prepare_in(data(mixed), tmp_path, quiet)
    change(mixed)
    second = prepare_in(data(mixed), tmp_path, quiet)
    fresh = prepare(data(mixed), tmp_path / "fresh", progress=quiet)
    assert second.splits == fresh.splits != first.splits
    with pytest.raises(UserError, match="has changed since then"):
        prepare(data(mixed, dir=str(first.directory)), first.directory, progress=quiet)


def test_order_of_equal_names_is_part_of_the_dataset(here, tmp_path):
    for folder in "AB":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c").write_text(f"{folder} is one text of the two. " * 9)
    files = [str(tmp_path / "A" / "c"), str(tmp_path / "B" / "c")]
    first = prepare_in(data(files), tmp_path, quiet)
    second = prepare_in(data(files[::-1]), tmp_path, quiet)
    assert first.splits["train"].stream_sha256 != second.splits["train"].stream_sha256
    for other, says in ((files[::-1], "another order"), (files[1:], "2 files there and 1 here")):
        with pytest.raises(UserError, match=says):
            prepare(data(other), first.directory, progress=quiet)


@pytest.mark.parametrize("place", ["elsewhere/mixed", "renamed"])
def test_moved_corpus_has_the_same_dataset(here, mixed, tmp_path, place):
    first = prepare_in(data(mixed), tmp_path, quiet)
    moved = tmp_path / place
    shutil.copytree(mixed, moved)
    shutil.rmtree(mixed)
    assert prepare_in(data(moved), tmp_path, quiet) == first


def test_large_corpus_is_hashed_in_tasks(here, mixed, tmp_path, monkeypatch):
    expected = dataset_dir(data(mixed), tmp_path)
    hashes.forget()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ray_tasks, "SMALL_BYTES", 0)
    monkeypatch.setattr(ray_tasks, "MAX_CHUNK_BYTES", 1000)
    monkeypatch.setattr(hashes, "file_sha256", lambda _: pytest.fail("hashed in the driver"))
    assert prepare_in(data(mixed), tmp_path, quiet).directory == expected


def test_file_that_changes_after_it_was_hashed_is_not_prepared(here, mixed, tmp_path):
    sources = with_hashes(corpus.resolve(str(mixed)))
    lower_case(mixed)
    with pytest.raises(UserError, match="a.txt: was changed just now; run the same command again"):
        prepare_in(data(mixed), tmp_path, quiet, sources)


def test_dataset_named_by_sizes_is_found_if_it_has_the_same_content(here, mixed, tmp_path):
    sizes = [[f"mixed/{file.name}", file.stat().st_size] for file in sorted(mixed.iterdir())]
    content = json.dumps([FORMAT, settings_of(data(mixed)), sizes], sort_keys=True)
    before = tmp_path / "data" / hashlib.sha256(content.encode()).hexdigest()[:16]
    made = prepare(data(mixed), before, progress=quiet)
    assert prepare_in(data(mixed), tmp_path, quiet) == made
    lower_case(mixed)
    assert prepare_in(data(mixed), tmp_path, quiet).directory != before


def test_unchanged_file_is_hashed_once_and_a_changed_one_again(mixed, tmp_path, monkeypatch):
    read = []

    def note(path):
        read.append(Path(path).name)
        return file_sha256(path)

    monkeypatch.setattr(hashes, "file_sha256", note)
    assert known_dir(data(mixed), tmp_path) is None
    first = dataset_dir(data(mixed), tmp_path)
    assert sorted(read) == sorted(file.name for file in mixed.iterdir())
    read.clear()
    for is_new_process in (False, True):
        if is_new_process:
            hashes.forget()
        assert known_dir(data(mixed), tmp_path) == first
    assert not read
    lower_case(mixed)
    assert known_dir(data(mixed), tmp_path) is None
    assert dataset_dir(data(mixed), tmp_path) != first
    assert read == ["a.txt"]


def test_dataset_of_json_that_was_read_as_text_is_not_used(here, tmp_path, monkeypatch):
    (tmp_path / "d.json").write_text('{"text": "one of the records"}\n' * 40)
    settings = data(tmp_path / "d.json")
    with monkeypatch.context() as patch:  # as earlier versions read it
        patch.setattr(corpus, "is_by_content", lambda path, read: False)
        patch.setattr(documents, "check_readable", lambda path: Kind(TEXT))
        before = prepare_in(settings, tmp_path, quiet)
    after = prepare_in(settings, tmp_path, quiet)
    assert [split.documents for split in after.splits.values()] == [30, 10]
    assert after.directory != before.directory
    with pytest.raises(UserError, match=r"d\.json \(by content\) has changed"):
        prepare(settings, before.directory, progress=quiet)


@pytest.mark.parametrize("problem", ["link", "pointer"])
def test_dataset_is_not_used_if_its_corpus_is_here_and_cannot_be_read(
    here, mixed, tmp_path, problem
):
    settings = data(mixed, dir=str(tmp_path / "d"))
    prepare_in(settings, tmp_path, quiet)
    if problem == "link":
        (mixed / "f.txt").symlink_to("nowhere")
    else:
        (mixed / "f.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"f\.txt is a"):
        prepare_in(settings, tmp_path, quiet)


# ---- estimates ----


def test_dry_run_names_the_folder_only_if_the_corpus_was_hashed(here, mixed, tmp_path):
    words = ["data.tokenizer=byte", "model.block_size=16", f"data.corpus={mixed}"]
    experiment = load_experiment(None, [*words, f"storage={tmp_path}"])
    [_, tokens, _] = dry_run(experiment, timed=False)["data"]
    assert "(not hashed yet)" in tokens
    directory = dataset_dir(experiment.data, tmp_path)
    [_, tokens, _] = dry_run(experiment, timed=False)["data"]
    assert tokens.endswith(f"in {directory}")


def huge_rows(file):
    words = [f"row {i}: it was a dark and stormy night {i * 17} " * 30 for i in range(2000)]
    pq.write_table(pa.table({"id": range(2000), "text": words}), f"{file}.parquet")


def huge_line(file):
    line = json.dumps({"id": "x" * 500, "text": STORY * 5000})
    Path(f"{file}.jsonl").write_text(f"{line}\n" * 2)


def huge_word(file):
    Path(f"{file}.txt").write_text("ACGT" * 500_000)


@pytest.mark.parametrize("write", [huge_rows, huge_line, huge_word])
def test_estimate_is_near_if_pieces_are_larger_than_a_sample(gpt2_ranks, tmp_path, write):
    write(tmp_path / "c")
    settings = Data(corpus=str(next(tmp_path.iterdir())), tokenizer="gpt2")
    [spans] = plan_chunks(resolve(settings.corpus), 1 << 30, settings)
    tokens = sum(
        len(load_tokenizer("gpt2").encode(piece.text))
        for span in spans
        for piece in read_pieces(span)
    )
    assert estimate_tokens(settings).tokens == pytest.approx(tokens, rel=0.05)


def groups_of_rows(folder):
    table = pa.table({"text": ["so many words " * 700] * 40})
    pq.write_table(table, folder / "c.parquet", row_group_size=10, compression="none")


def long_lines(folder):
    (folder / "c.jsonl").write_text(f"{json.dumps({'text': 'so many words ' * 7000})}\n" * 4)


@pytest.mark.parametrize("write", [groups_of_rows, long_lines])
def test_sample_has_a_piece_of_each_part_of_a_corpus(tmp_path, write):
    """A part is a row group, or a line: each of four begins anywhere in another chunk."""
    write(tmp_path)
    settings = Data(corpus=str(next(tmp_path.iterdir())))
    sources = resolve(settings.corpus)
    chunks = plan_chunks(sources, sources[0].bytes // 4 - 1000, settings)
    pieces = list(sample(chunks))
    starts = {re.split("[@#]", piece.document)[1] for piece in pieces}
    size = 10 if write is groups_of_rows else sources[0].bytes // 4
    assert starts >= {str(i * size) for i in range(4)}
    assert all(len(piece.text) <= SAMPLE_BYTES for piece in pieces)


@pytest.mark.parametrize(
    "fields",
    [{"append_eot": True}, {"append_eot": False}, {"tokenizer": "char", "append_eot": False}],
)
def test_exact_estimate_equals_the_dataset(here, mixed, tmp_path, fields):
    settings = data(mixed / "*.txt", **fields)
    guess = estimate_tokens(settings)
    made = prepare(settings, tmp_path / "d", progress=quiet)
    assert guess.exact
    assert guess.tokens == sum(split.tokens for split in made.splits.values())
    assert guess.n_vocab == made.tokenizer["n_vocab"]


def test_estimate_of_a_byte_pair_encoding_is_near(shakespeare, gpt2_ranks):
    guess = estimate_tokens(Data(corpus=str(shakespeare), tokenizer="gpt2"))
    assert not guess.exact
    assert guess.tokens == pytest.approx(338_025, rel=0.05)


def test_estimate_downloads_nothing(tmp_path, monkeypatch, mixed):
    import tiktoken.load
    import tiktoken.registry

    def download(path):
        pytest.fail(f"{path} would be downloaded")

    monkeypatch.setattr(tiktoken.load, "read_file", download)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert estimate_tokens(data(mixed, tokenizer="o200k_base")).n_vocab == 200_019
    unknown = estimate_tokens(Data(corpus=f"https://example.org/a.txt#sha256={'0' * 64}"))
    assert unknown == TokenEstimate(None, None, False, 50_257)
    assert not (tmp_path / "none").exists()
