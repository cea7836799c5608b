"""Datasets that exist already, their folders, and estimates before a preparation."""

import hashlib
import re
import shutil

import pytest

from orchestrator.config.sections import Data
from orchestrator.data.estimate import TokenEstimate, estimate_tokens
from orchestrator.data.prepare import prepare
from orchestrator.data.prepared import dataset_dir
from orchestrator.errors import UserError
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
            "size of mixed/a.txt: before 4280, now 5",
        ),
        (lambda folder: (folder / "e.txt").unlink(), "size of mixed/e.txt: before 749, now None"),
        (lambda folder: (folder / "f.txt").write_text("new"), "size of mixed/f.txt: before None"),
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
    assert dataset_dir(settings, tmp_path).name == "0f1c122fdbfa1646"


# ---- estimates ----


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
