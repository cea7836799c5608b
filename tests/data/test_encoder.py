"""gigatoken gives tiktoken's ids, in bounded memory; where it does not, tiktoken encodes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.data import encoder, prepare
from orchestrator.data.encoder import GigatokenTokenizer, fast_tokenizer, is_possible
from orchestrator.data.estimate import estimate_tokens
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from tests.helpers.datasets import data, hashes_of, quiet

pytest.importorskip("gigatoken")
REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fast(gpt2_ranks) -> GigatokenTokenizer:
    found = fast_tokenizer(load_tokenizer("gpt2"))
    assert isinstance(found, GigatokenTokenizer)
    return found


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(" \n\r\t'a1é.", max_size=50))
@example("a<|endoftext|>b", "")
def test_ids_are_those_of_tiktoken(fast, text, spaces):
    exact = load_tokenizer("gpt2")
    found = fast.encode(text + spaces + text)
    assert found.dtype == exact.dtype
    assert np.array_equal(found, exact.encode(text + spaces + text))


@pytest.mark.parametrize("split", ["tail", "hash"])
def test_dataset_does_not_depend_on_the_encoder(here, gpt2_ranks, mixed, tmp_path, capsys, split):
    for name in ("tiktoken", "gigatoken"):
        settings = data(mixed, tokenizer="gpt2", split=split, encoder=name)
        prepare.prepare(settings, tmp_path / name, progress=quiet, chunk_bytes=900)
    assert hashes_of(tmp_path / "tiktoken") == hashes_of(tmp_path / "gigatoken")
    assert encoder._fast_tokenizer.cache_info().currsize == 0  # no memory is kept for a run
    assert "gigatoken" not in capsys.readouterr().err


class Other(GigatokenTokenizer):
    """Another id for one word."""

    def encode(self, text: str) -> np.ndarray:
        return super().encode(text.replace("stormy", "story"))


class Panics(GigatokenTokenizer):
    def encode(self, text: str) -> np.ndarray:
        raise BaseException("panicked")


@pytest.mark.parametrize("kind", [Other, Panics])
def test_tiktoken_encodes_if_gigatoken_differs(
    here, gpt2_ranks, mixed, tmp_path, monkeypatch, capsys, kind
):
    settings = data(mixed, tokenizer="gpt2", encoder="gigatoken")
    prepare.prepare(settings.replace(encoder="tiktoken"), tmp_path / "exact", progress=quiet)
    monkeypatch.setattr(encoder, "GigatokenTokenizer", kind)
    encoder.forget()
    prepare.prepare(settings, tmp_path / "d", progress=quiet)
    assert hashes_of(tmp_path / "d") == hashes_of(tmp_path / "exact")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("data.encoder: gigatoken is not used: ")


def test_small_corpus_is_encoded_without_gigatoken(here, gpt2_ranks, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "fast_tokenizer", lambda *_: pytest.fail("gigatoken was loaded"))
    prepare.prepare(data(mixed, tokenizer="gpt2"), tmp_path / "d", progress=quiet)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tokenizer": "gpt2"}, "is not installed"),
        ({"tokenizer": "byte"}, "has no 'byte'"),
        ({"tokenizer": "p50k_base"}, "has no 'p50k_base'"),
    ],
)
def test_gigatoken_that_cannot_be_used_is_refused_if_asked_for(
    here, mixed, tmp_path, monkeypatch, fields, says
):
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda _: None)
    settings = data(mixed, encoder="gigatoken", **fields)
    for command in (lambda: prepare.prepare(settings, tmp_path / "d"), estimate_tokens):
        with pytest.raises(UserError, match=f"^data.encoder: .*{says}"):
            command(settings) if command is estimate_tokens else command()
    assert not (tmp_path / "d").exists()
    assert not is_possible("auto", settings.tokenizer)


MEMORY = """
import sys
import numpy as np
import psutil
from orchestrator.data.encoder import RENEW_BYTES, fast_tokenizer
from orchestrator.data.tokenizer import load_tokenizer

fast = fast_tokenizer(load_tokenizer("gpt2"))
random = np.random.default_rng(0)
peaks = []
for _ in range(int(sys.argv[1])):  # rounds of RENEW_BYTES
    for _ in range(8):
        text = random.integers(97, 123, RENEW_BYTES // 8, np.uint8)
        text[::7] = 32
        fast.encode(text.tobytes().decode())
    peaks.append(psutil.Process().memory_info().rss)
print(peaks)
assert max(peaks) < 1.3 * peaks[0] < 1e9
"""


@pytest.mark.slow
def test_memory_is_bounded_for_random_words(gpt2_ranks):
    subprocess.run([sys.executable, "-c", MEMORY, "8"], cwd=REPO, check=True, timeout=900)
