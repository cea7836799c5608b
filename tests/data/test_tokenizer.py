"""Tokenizers equal their references, count bytes exactly, and are not mistaken for others."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.tokenizer import TOKENIZERS, load_tokenizer
from orchestrator.data.tokenizers import pairs
from orchestrator.data.tokenizers.plain import CharacterTokenizer
from orchestrator.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
TRAP = "a<|endoftext|>b <|fim_prefix|>\r\n\ttwo  spaces 中文 e\u0301 😀"


@given(TEXTS)
def test_bytes_are_utf8_and_read_back(text):
    byte = load_tokenizer("byte")
    ids = byte.encode(text)
    assert ids.astype(np.uint8).tobytes() == text.encode()
    assert byte.decode(ids) == text
    assert byte.byte_lengths[ids].sum() == len(text.encode())


def test_byte_has_an_end_of_text():
    byte = load_tokenizer("byte")
    assert (byte.n_vocab, byte.eot_id, byte.byte_lengths[256], byte.dtype) == (
        257,
        256,
        0,
        np.uint16,
    )
    assert byte.eot_id not in byte.encode(TRAP)


def test_characters_equal_nanogpt(shakespeare):
    text = shakespeare.read_text("utf-8")
    chars = sorted(set(text))  # nanoGPT, data/shakespeare_char/prepare.py
    stoi = {c: i for i, c in enumerate(chars)}
    char = CharacterTokenizer(text)
    assert char.n_vocab == 65
    assert char.encode(text[:5000]).tolist() == [stoi[c] for c in text[:5000]]


@given(TEXTS.filter(bool))
def test_characters_read_back(text):
    char = CharacterTokenizer(text)
    assert char.decode(char.encode(text)) == text
    assert char.byte_lengths[char.encode(text)].sum() == len(text.encode())
    assert char.n_vocab == len(set(text))


def test_unknown_character_is_named():
    with pytest.raises(UserError, match="'x'"):
        CharacterTokenizer("abc").encode("abxc")


@pytest.mark.parametrize("text", [TRAP, "", " ", "Hello world", "\n\n\n  x"])
def test_gpt2_equals_tiktoken(gpt2_ranks, text):
    import tiktoken

    ours, theirs = load_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    assert ours.encode(text).tolist() == theirs.encode_ordinary(text)
    assert ours.decode(ours.encode(text)) == text
    assert ours.byte_lengths[ours.encode(text)].sum() == len(text.encode())
    assert (ours.n_vocab, ours.eot_id, ours.byte_lengths[50256]) == (50257, 50256, 0)


def test_invalid_ids_decode_to_replacement_characters(gpt2_ranks):
    half = load_tokenizer("gpt2").encode("😀")[:1]
    assert load_tokenizer("gpt2").decode(half) == "\ufffd"
    assert load_tokenizer("byte").decode([104, 105, 300]) == "hi\ufffd"


def test_vocabulary_sizes_equal_tiktoken(monkeypatch):
    from tiktoken_ext import openai_public

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: {b"a": 0})
    monkeypatch.setattr(
        openai_public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {b"a": 0}
    )
    for name, build in openai_public.ENCODING_CONSTRUCTORS.items():
        parts = build()
        assert TOKENIZERS[name].n_vocab == parts.get(
            "explicit_n_vocab", max(parts["special_tokens"].values()) + 1
        ), name


@pytest.mark.parametrize(
    "make", [lambda: load_tokenizer("byte"), lambda: CharacterTokenizer("hello\n")]
)
def test_saved_tokenizer_loads_as_itself(tmp_path, make):
    saved = make()
    saved.save(tmp_path)
    loaded = load_tokenizer(saved.name, tmp_path)
    assert loaded.stored() == saved.stored()
    assert loaded.encode("hello").tolist() == saved.encode("hello").tolist()


def test_another_tokenizer_than_the_stored_one_is_refused(tmp_path):
    CharacterTokenizer("abc").save(tmp_path)
    with pytest.raises(UserError, match="'char', not 'byte'"):
        load_tokenizer("byte", tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**stored, "characters": "abd"}), "utf-8")
    with pytest.raises(UserError, match="made with another 'char'"):
        load_tokenizer("char", tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gtp2", "did you mean gpt2"),
        ("bytes", "did you mean byte"),
        ("char", "prepared corpus"),
        ("zzzzz", "use one of byte, char, gpt2"),
    ],
)
def test_unknown_name_is_explained(name, says, tmp_path):
    with pytest.raises(UserError, match=says):
        load_tokenizer(name, tmp_path)


def test_missing_ranks_explain_the_cache(monkeypatch, tmp_path):
    import tiktoken.load
    import tiktoken.registry

    def unreachable(_path):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tiktoken.load, "read_file", unreachable)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    pairs._encoding.cache_clear()
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        load_tokenizer("p50k_base")
