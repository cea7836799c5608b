"""State of a run: saved and restored, it continues with the same bits."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from model import models
from model.gpt import GPT
from model.optim import OPTIMIZERS
from orchestrator.checkpoint import store
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.data.dataset import Manifest, Split, data_identity
from orchestrator.train import state
from orchestrator.train.numerics import Worker, fingerprint
from tests.helpers import checkpoints

WORDS = [
    "model.block_size=8",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=16",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "schedule.max_lr=0.01",
]
VOCAB = 31


def experiment(dtype: str) -> Experiment:
    return load_experiment(None, [*WORDS, f"train.dtype={dtype}"])


def dataset(folder: Path, stream: str = "s", name: str = "byte") -> Manifest:
    (folder / "tokenizer.json").write_text('{"kind": "byte"}')
    splits = {split: Split(100, 1, 100, f"{stream}-{split}", ()) for split in ("train", "val")}
    return Manifest(folder, {"name": name, "n_vocab": VOCAB}, splits, digest="digest")


def built(e: Experiment, seed: int) -> state.TrainState:
    torch.manual_seed(seed)
    return state.build(e, GPT(e.model_config_for(VOCAB)), Worker())


def advance(s: state.TrainState, steps: int) -> None:
    """Make updates whose data depends on the step."""
    for _ in range(steps):
        for slot in s.gradients.my_slots():
            s.gradients.begin_slot()
            for m in slot:
                tokens = torch.randint(
                    VOCAB, (2, 9), generator=torch.Generator().manual_seed(100 * s.step + m)
                )
                loss = s.forward(tokens[:, :-1], tokens[:, 1:])
                s.gradients.record_loss(m, loss)
                s.scaler.scale(loss).backward()
            s.gradients.end_slot()
        losses = s.gradients.reduce().tolist()
        s.scaler.step(s.optimizer)
        s.scaler.update()
        s.step += 1
        s.meter.add(losses)


def save(
    s: state.TrainState, e: Experiment, folder: Path, worker: Worker, metrics: dict[str, float]
) -> Path:
    return checkpoints.save(
        folder, s.step, *state.snapshot(s, e, dataset(folder.parent), worker, metrics)
    )


def everything(s: state.TrainState) -> dict[str, torch.Tensor]:
    tensors = dict(s.model.state_dict())
    for name, parameter in s.model.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in s.optimizer.state[parameter].items()}
    return {key: value.clone() for key, value in tensors.items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k].view(torch.int32), b[k].view(torch.int32))
        for k in a
    )


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_whole_state_of_every_optimizer_is_stored(tmp_path, kind):
    """An optimizer that keeps more than tensors per parameter needs new code in `state`."""
    e = load_experiment(None, [*WORDS, f"optim.kind={kind}", "optim.momentum_warmup_steps=9"])
    s = built(e, 1)
    advance(s, 3)
    fresh = state.restore(
        e, store.Content(save(s, e, tmp_path / "checkpoints", Worker(), {})), Worker()
    )
    saved = s.optimizer.state_dict()
    restored = fresh.optimizer.state_dict()
    assert restored["param_groups"] == saved["param_groups"]
    assert restored["state"].keys() == saved["state"].keys()
    for parameter, kept in saved["state"].items():
        assert restored["state"][parameter].keys() == kept.keys()
        for name, value in kept.items():
            assert torch.equal(restored["state"][parameter][name], value)
    advance(s, 2)
    advance(fresh, 2)
    assert same_bits(everything(fresh), everything(s))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_restored_state_equals_the_saved_one_and_continues_with_the_same_bits(tmp_path, dtype):
    e = experiment(dtype)
    s = built(e, 1)
    advance(s, 3)
    s.best_val_loss = 0.1 + 0.2
    path = save(s, e, tmp_path / "checkpoints", Worker(attempt=4), {"val/loss": 0.3})
    fresh = state.restore(e, store.Content(path), Worker())
    assert fresh.step == s.step == 3
    assert fresh.best_val_loss == s.best_val_loss
    assert fresh.meter.losses == s.meter.losses
    assert len(fresh.meter.losses) == 12
    assert fresh.scaler.state_dict() == s.scaler.state_dict()
    assert bool(fresh.scaler.state_dict()) == (dtype == "float16")
    assert same_bits(everything(fresh), everything(s))
    # Each parameter has a weight, two moments and a count.
    assert len(everything(s)) == 4 * len(list(s.model.parameters()))
    advance(s, 2)
    advance(fresh, 2)
    assert same_bits(everything(fresh), everything(s))
    assert fresh.meter.losses == s.meter.losses


def test_loss_scale_is_restored(tmp_path):
    e = experiment("float16")
    s = built(e, 1)
    advance(s, 1)
    moved = {**s.scaler.state_dict(), "scale": 1024.0, "_growth_tracker": 17}
    s.scaler.load_state_dict(moved)
    fresh = state.restore(e, store.Content(save(s, e, tmp_path / "c", Worker(), {})), Worker())
    assert fresh.scaler.state_dict() == moved
    assert fresh.scaler.get_scale() == 1024.0


def test_checkpoint_has_experiment_tokenizer_and_fingerprints(tmp_path):
    e, worker = experiment("float32"), Worker(attempt=4)
    s = built(e, 1)
    advance(s, 1)
    path = save(s, e, tmp_path / "c", worker, {"val/loss": 2.5})
    manifest = store.verify(path)
    assert (manifest["step"], manifest["generation"], manifest["metrics"]) == (
        1,
        4,
        {"val/loss": 2.5},
    )
    assert manifest["fingerprints"] == {
        "data": data_identity(dataset(tmp_path)),
        "numerics": fingerprint(e, worker),
    }
    assert set(manifest["parts"]) == {
        "experiment.yaml",
        "model.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "tokenizer.json",
    }
    assert (path / "experiment.yaml").read_text("utf-8") == e.to_yaml()
    assert (path / "tokenizer.json").read_text("utf-8") == '{"kind": "byte"}'
    assert json.loads((path / "state.json").read_text("utf-8"))["step"] == 1


def test_loaded_model_equals_the_saved_one(tmp_path):
    e = experiment("float32")
    s = built(e, 1)
    path = save(s, e, tmp_path / "c", Worker(), {})
    model = state.load_model(store.Content(path))
    assert not model.training
    assert model.config == s.model.config
    assert same_bits(dict(model.state_dict()), dict(s.model.state_dict()))


def test_tied_weights_and_buffers_that_are_not_stored_survive_a_restore(tmp_path, monkeypatch):
    class Tied(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.second = torch.nn.Embedding(*self.transformer.wte.weight.shape)
            self.second.weight = self.transformer.wte.weight
            self.register_buffer("scale", torch.full((1,), 1.5), persistent=False)

        def forward(self, tokens, *arguments, **others):
            return super().forward(tokens, *arguments, **others) + self.second(tokens).sum() * 1e-3

    tied = dataclasses.replace(models.MODELS["gpt2"], build=Tied)
    monkeypatch.setitem(models.MODELS, "gpt2", tied)
    e = experiment("float32")
    torch.manual_seed(1)
    s = state.build(e, Tied(e.model_config_for(VOCAB)), Worker())
    advance(s, 2)
    path = save(s, e, tmp_path / "c", Worker(), {})
    drawn = torch.get_rng_state()
    fresh = state.restore(e, store.Content(path), Worker())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert fresh.model.second.weight is fresh.model.transformer.wte.weight
    assert fresh.model.scale.item() == 1.5
    advance(s, 2)
    advance(fresh, 2)
    assert same_bits(everything(fresh), everything(s))


def test_data_identity_depends_on_tokens_and_tokenizer_only(tmp_path):
    (tmp_path / "b").mkdir()
    here = data_identity(dataset(tmp_path))
    assert data_identity(dataset(tmp_path / "b")) == here
    assert data_identity(dataset(tmp_path, stream="t")) != here
    assert data_identity(dataset(tmp_path, name="char")) != here
