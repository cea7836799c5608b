"""gigatoken gives tiktoken's ids, in bounded memory; where it does not, tiktoken encodes."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.data import prepare
from orchestrator.data.estimate import estimate_tokens
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.data.tokenizers import encoder
from orchestrator.data.tokenizers.base import Tokenizer
from orchestrator.data.tokenizers.encoder import GigatokenTokenizer, fast_tokenizer
from orchestrator.data.tokenizers.merges import count_words
from orchestrator.data.tokenizers.pairs import train
from orchestrator.errors import UserError
from tests.helpers.datasets import STORY, data, hashes_of, quiet

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gigatoken(gpt2_ranks) -> None:
    pytest.importorskip("gigatoken")


@pytest.fixture(scope="module", params=["gpt2", "bpe:300"])
def exact(request, gigatoken) -> Tokenizer:
    if request.param == "gpt2":
        return load_tokenizer("gpt2")
    return train(request.param, count_words([STORY * 9]))


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(" \n\r\t'a1é.", max_size=50))
@example("a<|endoftext|>b", "")
def test_ids_are_those_of_tiktoken(exact, text, spaces):
    fast = fast_tokenizer(exact)
    assert isinstance(fast, GigatokenTokenizer)
    found = fast.encode(text + spaces + text)
    assert found.dtype == exact.dtype
    assert np.array_equal(found, exact.encode(text + spaces + text))


@pytest.mark.parametrize("split", ["tail", "hash"])
def test_dataset_does_not_depend_on_the_encoder(here, gigatoken, mixed, tmp_path, capsys, split):
    for name in ("tiktoken", "gigatoken"):
        settings = data(mixed, tokenizer="gpt2", split=split, encoder=name)
        prepare.prepare(settings, tmp_path / name, progress=quiet, chunk_bytes=900)
    assert hashes_of(tmp_path / "tiktoken") == hashes_of(tmp_path / "gigatoken")
    assert encoder._fast_tokenizer.cache_info().currsize == 0  # no memory is kept for a run
    assert "gigatoken" not in capsys.readouterr().err


class Other(GigatokenTokenizer):
    """Another id for one word."""

    def ids(self, text: str) -> np.ndarray:
        return super().ids(text.replace("stormy", "story"))


class Panics(GigatokenTokenizer):
    def ids(self, text: str) -> np.ndarray:
        raise BaseException("panicked")


@pytest.mark.parametrize("kind", [Other, Panics])
def test_tiktoken_encodes_if_gigatoken_differs(
    here, gigatoken, mixed, tmp_path, monkeypatch, capsys, kind
):
    settings = data(mixed, tokenizer="gpt2", encoder="gigatoken")
    prepare.prepare(settings.replace(encoder="tiktoken"), tmp_path / "exact", progress=quiet)
    monkeypatch.setattr(encoder, "GigatokenTokenizer", kind)
    encoder.forget()
    prepare.prepare(settings, tmp_path / "d", progress=quiet)
    assert hashes_of(tmp_path / "d") == hashes_of(tmp_path / "exact")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("data.encoder: gigatoken is not used: ")


@pytest.mark.parametrize(
    "error", [RuntimeError("Already borrowed"), MemoryError("no room"), BaseException("panicked")]
)
def test_tiktoken_encodes_from_where_gigatoken_fails(
    here, gigatoken, mixed, tmp_path, monkeypatch, capsys, error
):
    class Fails(GigatokenTokenizer):
        def ids(self, text: str) -> np.ndarray:
            if "line 7" in text:
                raise error
            return super().ids(text)

    settings = data(mixed, tokenizer="gpt2", encoder="gigatoken")
    prepare.prepare(settings, tmp_path / "exact", progress=quiet)
    assert f"\nencoder: gigatoken {version('gigatoken')}\n" in capsys.readouterr().out
    monkeypatch.setattr(encoder, "GigatokenTokenizer", Fails)
    monkeypatch.setattr(prepare, "sample", lambda _: [])
    prepare.prepare(settings, tmp_path / "d", progress=quiet)
    assert hashes_of(tmp_path / "d") == hashes_of(tmp_path / "exact")
    assert capsys.readouterr().err == f"data.encoder: gigatoken is not used: {error}\n"


def test_parts_of_another_encoder_are_not_used(here, gigatoken, mixed, tmp_path, monkeypatch):
    """gigatoken may have been found wrong since they were written."""
    monkeypatch.setattr(prepare, "write_index", lambda *_: pytest.fail("stopped"))
    folders = set()
    for name in ("tiktoken", "gigatoken", "gigatoken"):
        settings = data(mixed, tokenizer="gpt2", encoder=name)
        with pytest.raises(pytest.fail.Exception):
            prepare.prepare(settings, tmp_path / "d", progress=quiet)
        folders |= {sidecar.parent for sidecar in tmp_path.glob("d/.parts/*/00000000.json")}
    assert len(folders) == 2


def test_small_corpus_is_encoded_without_gigatoken(here, gpt2_ranks, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "fast_tokenizer", lambda *_: pytest.fail("gigatoken was loaded"))
    prepare.prepare(data(mixed, tokenizer="gpt2"), tmp_path / "d", progress=quiet)


def test_larger_corpus_without_gigatoken_says_how_it_is_faster(
    here, gpt2_ranks, mixed, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(encoder, "LEAST_BYTES", 1)
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda _: None)
    for name, tokenizer in ((1, "gpt2"), (2, "byte")):
        prepare.prepare(data(mixed, tokenizer=tokenizer), tmp_path / f"{name}", progress=quiet)
    lines = [li for li in capsys.readouterr().out.splitlines() if li.startswith("encoder: ")]
    assert lines == ["encoder: tiktoken; for a faster one, `pip install 'espalier[fast]'`"]


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


MEMORY = """
import sys
import numpy as np
import psutil
from orchestrator.data.tokenizers.encoder import RENEW_BYTES, fast_tokenizer
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
def test_memory_is_bounded_for_random_words(gigatoken):
    # 2 GiB in all.
    subprocess.run([sys.executable, "-c", MEMORY, "64"], cwd=REPO, check=True, timeout=1800)
