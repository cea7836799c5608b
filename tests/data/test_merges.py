"""A tokenizer that is trained on a corpus: on train alone, the same everywhere, exact."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from orchestrator.data import prepare as prepare_module
from orchestrator.data import ray_tasks
from orchestrator.data.estimate import estimate_tokens
from orchestrator.data.prepare import prepare
from orchestrator.data.tokenizer import kind_of, load_tokenizer
from orchestrator.data.tokenizers import merges
from orchestrator.data.tokenizers.merges import count_words, learn_merges, windows
from orchestrator.data.tokenizers.pairs import train
from orchestrator.errors import UserError
from tests.helpers.datasets import STORY, data, hashes_of, quiet

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def merged_by_force(words: dict[str, int], size: int) -> list[bytes]:
    """Count all pairs anew before each merge."""
    split = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < 256 + size:
        counts: Counter[tuple[int, int]] = Counter()
        for word, parts in split.items():
            for left, right in itertools.pairwise(parts):
                counts[tokens.index(left), tokens.index(right)] += words[word]
        pairs = sorted((-n, pair) for pair, n in counts.items() if n >= 2)
        if not pairs:
            break
        left, right = (tokens[i] for i in pairs[0][1])
        if left + right not in tokens:
            tokens.append(left + right)
        for word, parts in split.items():
            found = []
            for part in parts:
                # A part that was just merged is longer than `left`.
                if found and found[-1] == left and part == right:
                    found[-1] = left + right
                else:
                    found.append(part)
            split[word] = found
    return tokens[256:]


@given(st.dictionaries(st.text("aab é", min_size=1, max_size=9), st.integers(1, 4), max_size=9))
def test_merges_are_those_of_counting_all_pairs_again(words):
    found = learn_merges(words, 20, lambda _: None)
    assert found == merged_by_force(words, 20)
    assert found == learn_merges(dict(reversed(words.items())), 20, lambda _: None)


def test_merges_of_a_text_are_known(shakespeare):
    """They are the same on every machine and with every version of Python."""
    shares = []
    words = count_words([shakespeare.read_text("utf-8")])
    found = train("bpe:512", words, shares.append)
    assert found.tokens[256:262] == [b" t", b"he", b" a", b"ou", b" s", b" m"]
    digest = hashlib.sha256(b"\0".join(found.tokens)).hexdigest()
    assert digest.startswith("a10a4621e97c0bf2")
    assert shares == sorted(shares)
    assert shares[-1] == 1


LEARN = """
from orchestrator.data.tokenizers import merges
words = merges.count_words(["der die das und Ähre 中文 12 " * 3 + "aabb abab baba"])
print(merges.learn_merges(words, 40, lambda _: None))
"""


def test_merges_do_not_depend_on_the_order_of_hashes():
    found = {
        subprocess.run(
            [sys.executable, "-c", LEARN],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


@given(TEXTS)
def test_text_of_any_kind_reads_back_and_words_are_encoded_alone(text):
    trained = train("bpe:280", count_words([STORY * 9]))
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.byte_lengths[ids].sum() == len(text.encode())
    alone = [trained.encode(word) for word in merges._WORD.findall(text)]
    assert np.array_equal(ids, np.concatenate([trained.encode(""), *alone]))


def test_pattern_is_that_of_gpt2(monkeypatch):
    """Where a text may be cut was proved for it."""
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
    assert openai_public.gpt2()["pat_str"] == merges.PATTERN


def test_long_words_are_left_out():
    words = count_words(["a" * 1_000_000 + " b b", "c" * merges.LONGEST])
    assert words == {" b": 2, "c" * merges.LONGEST: 1}


# ---- in a dataset ----


def trained_on(folder, settings, **options) -> list[bytes]:
    prepare(settings, folder, progress=quiet, **options)
    return load_tokenizer(settings.tokenizer, folder).tokens


@pytest.mark.parametrize("split", ["tail", "hash"])
@pytest.mark.parametrize("sample", [merges.SAMPLE, 1600])
def test_merges_and_tokens_do_not_depend_on_chunks_or_threads(
    here, mixed, tmp_path, monkeypatch, split, sample
):
    monkeypatch.setattr(merges, "SAMPLE", sample)
    monkeypatch.setattr(merges, "WINDOW", 100)
    settings = data(mixed, split=split, tokenizer="bpe:290")
    found = []
    for size in (137, 1000, 10**7):
        trained_on(tmp_path / str(size), settings, chunk_bytes=size, shard_rows=2)
        found.append(hashes_of(tmp_path / str(size)))
    assert found[1:] == found[:1] * 2
    stored = json.loads((tmp_path / "137" / "tokenizer.json").read_text("utf-8"))
    assert stored["regex"] == version("regex")
    facts = load_tokenizer("bpe:290", tmp_path / "137").facts()
    assert facts["n_vocab"] == 290
    characters = facts["trained_characters"]
    assert characters <= 1600 if sample == 1600 else characters > 3000


def test_threads_train_the_same(mixed, tmp_path, monkeypatch):
    settings = data(mixed, tokenizer="bpe:290")
    one = trained_on(tmp_path / "one", settings)
    monkeypatch.setattr(prepare_module, "MIN_CHUNK_BYTES", 300)
    monkeypatch.setattr(ray_tasks, "available_cpus", lambda: 4)
    assert trained_on(tmp_path / "many", settings) == one


@pytest.mark.parametrize("split", ["tail", "hash"])
def test_val_does_not_change_merges(here, tmp_path, split):
    """Of both corpora, only the text that is val differs."""
    texts = {name: f"{name} {name}s or {name} " * 40 for name in ("sun", "moon", "rain", "snow")}
    found = []
    for number, val in enumerate(("zebra", "quick")):
        folder = tmp_path / f"c{number}"
        folder.mkdir()
        for name, text in texts.items():
            (folder / f"{name}.txt").write_text(text)
        fields = {"split": split, "tokenizer": "bpe:270", "val_fraction": 0.25}
        if split == "tail":
            # The last quarter of the characters.
            (folder / "z.txt").write_text(f"{val} " * (sum(map(len, texts.values())) // 18))
        else:
            hidden = next(
                text
                for text in (f"{val} {i} {val} {val} " for i in range(99))
                if int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.25 * 2**64
            )
            (folder / "z.txt").write_text(hidden)
        tokens = trained_on(tmp_path / f"d{number}", data(folder, **fields))
        assert not any(val[:2].encode() in token for token in tokens)
        found.append(tokens)
    assert found[0] == found[1]


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 9), st.integers(1, 9))
def test_sample_does_not_depend_on_where_texts_end(lengths, sample, window):
    text = "".join(chr(i) for i in range(0x100, 0x100 + sum(lengths)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merges, "SAMPLE", sample * window)
        patch.setattr(merges, "WINDOW", window)
        [*whole] = windows(0, len(text), len(text))
        found = ""
        first = 0
        for length in lengths:
            part = text[first : first + length]
            found += "".join(part[window] for window in windows(first, length, len(text)))
            first += length
    assert found == "".join(text[window] for window in whole)
    assert min(len(text), window) <= len(found) <= sample * window


def test_saved_tokenizer_is_the_same_without_its_corpus(tmp_path):
    saved = train("bpe:280", count_words([STORY * 9]))
    saved.save(tmp_path)
    loaded = load_tokenizer("bpe:280", tmp_path)
    assert loaded.stored() == saved.stored()
    assert loaded.encode(STORY).tolist() == saved.encode(STORY).tolist()
    assert (loaded.n_vocab, loaded.eot_id, loaded.byte_lengths[279]) == (280, 279, 0)
    assert 279 not in loaded.encode(STORY)  # it has the text of the end-of-text token


@pytest.mark.parametrize("merged", [5, "ab", ["ab", 5], ["中"], [""], ["ab", "ab"], [[]], None])
def test_damaged_merges_are_refused_in_one_line(tmp_path, merged):
    saved = train("bpe:280", count_words([STORY * 9]))
    stored = saved.stored() | {"merged": merged}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored), "utf-8")
    with pytest.raises(UserError, match="damaged|made with another") as caught:
        load_tokenizer("bpe:280", tmp_path)
    assert "\n" not in str(caught.value)


def test_estimate_trains_on_a_sample(mixed, here, tmp_path):
    settings = data(mixed, tokenizer="bpe:290")
    guess = estimate_tokens(settings)
    made = prepare(settings, tmp_path / "d", progress=quiet)
    tokens = sum(split.tokens for split in made.splits.values())
    assert guess.n_vocab == 290
    assert guess.tokens == pytest.approx(tokens, rel=0.2)
    # The whole corpus may have text for more tokens than a sample.
    assert estimate_tokens(settings.replace(tokenizer="bpe:5000")).n_vocab == 5000


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bpe:256", "from 257 .* to 262144"),
        ("bpe:262145", "from 257"),
        ("bpe:99999999999999999999", "from 257"),
        ("bpe:-1024", "from 257"),
        ("bpe:1e3", "from 257"),
        ("bpe:01024", "from 257"),
        ("bpe:", "from 257"),
        ("bpe:١٠٢٤", "from 257"),
        ("bpe", "did you mean .*bpe:1024"),
    ],
)
def test_size_that_cannot_be_is_refused(name, says):
    with pytest.raises(UserError, match=says):
        kind_of(name)


def test_corpus_that_is_too_small_is_refused_with_the_largest_size(here, mixed, tmp_path):
    with pytest.raises(UserError, match="too little text for 'bpe:5000'.*use bpe:") as caught:
        prepare(data(mixed, tokenizer="bpe:5000"), tmp_path / "d", progress=quiet)
    assert not (tmp_path / "d" / "manifest.json").exists()
    size = str(caught.value).split("use bpe:")[1].split()[0]
    prepare(data(mixed, tokenizer=f"bpe:{size}"), tmp_path / "d", progress=quiet)
