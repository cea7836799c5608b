"""Tables of models, optimizers and schedules: every entry works, and reading them is cheap."""

import subprocess
import sys

import pytest
import torch

from model.models import MODELS, empty_model, kind_of, new_config, new_model, stored_config
from model.optim import OPTIMIZERS, OptimizerSettings, build
from model.schedule import DECAY_SHAPES, SCHEDULES

SETTINGS = OptimizerSettings(max_lr=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.1)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_lowers_loss_and_keeps_the_stated_moments(kind, small_gpt):
    model = small_gpt()
    optimizer = build(kind, model, SETTINGS)
    tokens = torch.arange(32).view(2, 16)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(tokens, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter].values()
            moments = [value for value in state if value.shape == parameter.shape]
            assert len(moments) == OPTIMIZERS[kind].moments[group["group"]]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_resumed_from_its_state_takes_the_same_steps(kind, small_gpt):
    tokens = torch.arange(32).view(2, 16)

    def train(model, optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(tokens, tokens).backward()
            optimizer.step()

    whole = small_gpt()
    train(whole, build(kind, whole, SETTINGS), 4)
    first = small_gpt()
    optimizer = build(kind, first, SETTINGS)
    train(first, optimizer, 2)
    resumed = small_gpt()
    resumed.load_state_dict(first.state_dict())
    restored = build(kind, resumed, SETTINGS)
    restored.load_state_dict(optimizer.state_dict())
    train(resumed, restored, 2)
    for ours, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_model_returns_logits_and_loss(kind):
    fields = {"block_size": 8, "vocab_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 8}
    config = new_config({"kind": kind, **fields})
    tokens = torch.arange(16).view(2, 8)
    model = new_model(kind, config, seed=0)
    assert model(tokens).shape == (2, 1, 32)
    assert model(tokens, tokens).shape == ()
    assert model(tokens, tokens, reduction="window").shape == (2,)


@pytest.mark.parametrize("kind", MODELS)
def test_empty_model_has_the_parameters_of_a_real_one_and_no_values(kind):
    config = new_config({"kind": kind, "n_layer": 2, "n_head": 6, "n_embd": 24, "vocab_size": 32})
    real = new_model(kind, config, seed=0)
    empty = empty_model(kind, config)
    assert [(n, p.shape) for n, p in empty.named_parameters()] == [
        (n, p.shape) for n, p in real.named_parameters()
    ]
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(real.state_dict(), assign=True)
    for loaded, expected in zip(empty.parameters(), real.parameters(), strict=True):
        assert torch.equal(loaded, expected)


def test_empty_model_does_not_import_the_compiler():
    code = (
        "import sys\n"
        "from model.models import MODELS, empty_model\n"
        "for kind, model in MODELS.items(): empty_model(kind, model.config())\n"
        "assert 'torch._dynamo' not in sys.modules, 'the compiler was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("kind", MODELS)
def test_stored_shape_gives_the_same_kind_of_model(kind):
    config = MODELS[kind].config()
    stored = stored_config(kind, config)
    assert (kind_of(stored), new_config(stored)) == (kind, config)


@pytest.mark.parametrize("table", [MODELS, OPTIMIZERS, SCHEDULES, DECAY_SHAPES])
def test_every_entry_has_one_line_of_help(table):
    for entry in table.values():
        assert entry.help.strip()
        assert "\n" not in entry.help


def test_configuration_does_not_import_torch():
    code = (
        "import sys\n"
        "from orchestrator.config.experiment import Experiment\n"
        "Experiment().lr_schedule()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
