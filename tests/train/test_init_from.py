"""First weights: the same model as the source; unusable sources are refused, no code runs."""

import json
import os
import pickle
import urllib.error
import urllib.request
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.gpt import GPT
from model.gpt_config import GPTConfig
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.errors import UserError
from orchestrator.train import init_from
from orchestrator.train.find import checkpoint_of
from orchestrator.train.init_from import initial_model
from tests.helpers.checkpoints import save
from tests.helpers.facts import FACTS

N_VOCAB = 61
SHAPE = [
    "model.block_size=16",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=8",
    "model.bias=true",
    "model.pad_vocab_to=1",
]
OURS = GPTConfig(16, N_VOCAB, 2, 2, 8, bias=True)
TOKENS = torch.arange(12).view(2, 6)


def wanting(source, *words: str) -> Experiment:
    return load_experiment(None, [*SHAPE, f"train.init_from={json.dumps(str(source))}", *words])


def some_gpt(config: GPTConfig = OURS) -> GPT:
    torch.manual_seed(3)
    return GPT(config).eval()


def our_checkpoint(directory, model: GPT, step: int = 5):
    texts = {"model.json": json.dumps(asdict(model.config))}
    return save(directory / "checkpoints", step, {"model": dict(model.state_dict())}, texts, FACTS)


def nanogpt_file(path, model: GPT, prefix: str = "_orig_mod.", best=0.0, **more):
    state = {prefix + k: v for k, v in model.state_dict().items()}
    state[prefix + "lm_head.weight"] = state[prefix + "transformer.wte.weight"]
    c = model.config
    arguments = {
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_embd": c.n_embd,
        "block_size": c.block_size,
        "bias": c.bias,
        "vocab_size": c.vocab_size,
        "dropout": 0.0,
    }
    torch.save({"model": state, "model_args": {**arguments, **more}, "best_val_loss": best}, path)
    return path


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """(folder, model) of a random tiny GPT2LMHeadModel, as transformers itself saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=N_VOCAB, n_positions=16, n_embd=8, n_layer=2, n_head=2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder, safe_serialization=True)
    return folder, model


def logits(model: GPT, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().logits(tokens)


def refusal(experiment: Experiment, n_vocab: int = N_VOCAB) -> str:
    with pytest.raises(UserError) as caught:
        initial_model(experiment, n_vocab)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- sources ----
def test_new_weights_depend_on_the_seed_only():
    first, again = (initial_model(wanting("scratch"), N_VOCAB).state_dict() for _ in range(2))
    other = initial_model(wanting("scratch", "train.seed=2"), N_VOCAB).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_checkpoint_and_run_give_their_weights_bit_for_bit(tmp_path):
    old, new = some_gpt(), GPT(OURS)
    our_checkpoint(tmp_path, old, 5)
    path = our_checkpoint(tmp_path, new, 6)
    for source in (path, tmp_path):
        got = initial_model(wanting(source), N_VOCAB).state_dict()
        assert all(torch.equal(got[k], v) for k, v in new.state_dict().items())
    assert checkpoint_of(tmp_path) == checkpoint_of(path) == path


def test_damaged_checkpoint_is_refused_and_a_run_gives_the_one_before(tmp_path):
    old = some_gpt()
    before, last = our_checkpoint(tmp_path, old, 5), our_checkpoint(tmp_path, GPT(OURS), 6)
    with open(last / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert "SHA-256" in refusal(wanting(last))
    assert checkpoint_of(tmp_path) == before
    assert torch.equal(logits(initial_model(wanting(tmp_path), N_VOCAB)), logits(old))


def test_hugging_face_folder_gives_its_logits(hugging_face):
    folder, theirs = hugging_face
    model = initial_model(wanting(folder, "model.activation=gelu_tanh"), N_VOCAB)
    with torch.no_grad():
        assert torch.allclose(logits(model), theirs(TOKENS).logits, atol=1e-5)


def test_hugging_face_folder_of_several_files_gives_its_logits(hugging_face, tmp_path):
    _, theirs = hugging_face
    theirs.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="2KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and not (tmp_path / "model.safetensors").exists()
    experiment = wanting(tmp_path, "model.activation=gelu_tanh")
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    assert torch.allclose(logits(initial_model(experiment, N_VOCAB)), expected, atol=1e-5)
    shards[0].unlink()
    assert f"{tmp_path} has no {shards[0].name}; copy it there" in refusal(experiment)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "../x.safetensors"}}))
    assert "'../x.safetensors' is not the name of a file" in refusal(experiment)
    index.write_text("{}")
    assert str(tmp_path) in refusal(experiment)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.transformer."])
def test_prefixes_of_compile_and_of_several_gpus_are_dropped(hugging_face, tmp_path, prefix):
    folder, theirs = hugging_face
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    states = {prefix + k.removeprefix("transformer."): v for k, v in theirs.state_dict().items()}
    states = {k: v.clone() for k, v in states.items() if not k.endswith("lm_head.weight")}
    save_file(states, tmp_path / "model.safetensors")
    model = initial_model(wanting(tmp_path, "model.activation=gelu_tanh"), N_VOCAB)
    with torch.no_grad():
        assert torch.allclose(logits(model), theirs(TOKENS).logits, atol=1e-5)


@pytest.mark.parametrize("best", [np.float64(1.5), np.float32(1.5), np.int64(2), np.bool_(True)])
def test_nanogpt_file_may_have_numbers_of_numpy(tmp_path, best):
    theirs = some_gpt()
    model = initial_model(wanting(nanogpt_file(tmp_path / "ckpt.pt", theirs, best=best)), N_VOCAB)
    assert torch.equal(logits(model), logits(theirs))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpt_file_gives_its_logits(tmp_path, prefix):
    theirs = some_gpt()
    model = initial_model(wanting(nanogpt_file(tmp_path / "ckpt.pt", theirs, prefix)), N_VOCAB)
    assert torch.equal(logits(model), logits(theirs))


# ---- shapes ----
def test_longer_context_is_cropped(tmp_path):
    theirs = some_gpt()
    model = initial_model(wanting(our_checkpoint(tmp_path, theirs), "model.block_size=6"), N_VOCAB)
    assert model.config.block_size == 6
    assert torch.equal(logits(model), logits(theirs))


def test_vocabulary_rows_are_padded(tmp_path):
    theirs = some_gpt()
    model = initial_model(
        wanting(our_checkpoint(tmp_path, theirs), "model.pad_vocab_to=64"), N_VOCAB
    )
    assert model.config.vocab_size == 64
    assert torch.allclose(logits(model)[..., :N_VOCAB], logits(theirs), atol=1e-6)


def test_dropout_is_that_of_the_experiment(tmp_path):
    path = our_checkpoint(tmp_path, some_gpt())
    assert initial_model(wanting(path, "model.dropout=0.25"), N_VOCAB).config.dropout == 0.25


def test_all_differences_of_shape_are_listed_at_once(tmp_path):
    message = refusal(
        wanting(
            our_checkpoint(tmp_path, some_gpt()),
            "model.block_size=32",
            "model.n_layer=3",
            "model.n_head=4",
            "model.n_embd=16",
            "model.bias=false",
            "model.activation=gelu_tanh",
        )
    )
    for words in (
        "block_size: before 16, now 32",
        "n_layer: before 2, now 3",
        "n_head: before 2, now 4",
        "n_embd: before 8, now 16",
        "bias: before True, now False",
        "activation: before 'gelu', now 'gelu_tanh'",
    ):
        assert words in message
    assert "vocab_size" not in message


def test_tensors_of_another_shape_than_stated_are_refused(tmp_path):
    path = nanogpt_file(
        tmp_path / "ckpt.pt", some_gpt(GPTConfig(16, N_VOCAB, 2, 2, 4, bias=True)), n_embd=8
    )
    assert "tensors" in refusal(wanting(path))


# ---- refusals ----
def test_missing_or_unusable_sources_are_refused_in_one_line(tmp_path, hugging_face):
    folder, _ = hugging_face
    assert "does not exist" in refusal(wanting(tmp_path / "absent"))
    assert "is not the folder of a model" in refusal(wanting(tmp_path))
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text((folder / "config.json").read_text())
    assert "model.safetensors" in refusal(wanting(half))
    (half / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    assert str(half) in refusal(wanting(half))
    for content in ("[]", "{", json.dumps({"model_type": "llama"}), json.dumps({"n_layer": "two"})):
        (half / "config.json").write_text(content)
        assert str(half) in refusal(wanting(half))


def test_other_files_than_nanogpt_checkpoints_are_refused_in_one_line(tmp_path):
    file = tmp_path / "ckpt.pt"
    good = nanogpt_file(tmp_path / "good.pt", some_gpt()).read_bytes()
    for content in (b"", b"text", good[: len(good) // 2]):
        file.write_bytes(content)
        assert str(file) in refusal(wanting(file))
    for stored in (
        [1],
        {},
        {"model": {}},
        {"model_args": {}},
        {"model": {}, "model_args": {}},
        {"model": [], "model_args": 3},
        {"model": {"a": torch.ones(1)}, "model_args": {"n_layer": 2}},
    ):
        torch.save(stored, file)
        assert str(file) in refusal(wanting(file))
    assert "unknown" in refusal(wanting(nanogpt_file(file, some_gpt(), unknown=3)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: weight.to(torch.int8), "c_fc.weight is int8; save the weights as float32"),
        (lambda weight: weight * torch.nan, "c_fc.weight has values that are not finite"),
        (lambda weight: weight / 0, "c_fc.weight has values that are not finite"),
    ],
    ids=["int8", "NaN", "infinite"],
)
def test_weights_that_are_no_finite_numbers_are_refused(tmp_path, change, said):
    model = some_gpt()
    file = nanogpt_file(tmp_path / "ckpt.pt", model)
    stored = torch.load(file)
    name = "_orig_mod.transformer.h.1.mlp.c_fc.weight"
    stored["model"][name] = change(stored["model"][name])
    torch.save(stored, file)
    assert said in refusal(wanting(file))


class Canary:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_malicious_pickle_is_refused_and_not_executed(tmp_path):
    file, canary = tmp_path / "ckpt.pt", tmp_path / "canary"
    for write in (
        lambda value: torch.save(value, file),
        lambda value: file.write_bytes(pickle.dumps(value)),
    ):
        write({"model": {"a": Canary(canary)}, "model_args": {}})
        assert "weights_only" in refusal(wanting(file))
        assert not canary.exists()
    pickle.loads(file.read_bytes())  # without weights_only, the code runs
    assert canary.exists()


# ---- downloads ----
@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no route"),
        TimeoutError("slow"),
        urllib.error.HTTPError("https://x", 503, "busy", {}, None),
    ],
)
def test_without_network_the_message_says_where_to_put_the_files(tmp_path, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", fails)
    monkeypatch.setattr(urllib.request, "urlretrieve", fails)
    message = refusal(wanting("gpt2-medium"))
    for words in (
        "gpt2-medium",
        "huggingface.co",
        str(tmp_path / "espalier" / "gpt2-medium"),
        "model.safetensors",
    ):
        assert words in message
    assert list((tmp_path / "espalier" / "gpt2-medium").iterdir()) == []


def test_cached_weights_need_no_network(tmp_path, monkeypatch, hugging_face):
    folder, theirs = hugging_face
    cache = tmp_path / "espalier" / "gpt2"
    cache.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (cache / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(init_from, "HUB", "http://127.0.0.1:9/{name}/{file}")
    model = initial_model(wanting("gpt2", "model.activation=gelu_tanh"), N_VOCAB)
    with torch.no_grad():
        assert torch.allclose(logits(model), theirs(TOKENS).logits, atol=1e-5)


def test_unexpected_tensor_names_are_in_the_message(tmp_path, hugging_face):
    (tmp_path / "config.json").write_text((hugging_face[0] / "config.json").read_text())
    save_file({"strange": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "strange" in refusal(wanting(tmp_path, "model.activation=gelu_tanh"))
