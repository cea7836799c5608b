"""Activations that are computed again: the same bits in less memory."""

import pytest
import torch

from model import models
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.errors import UserError
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from tests.helpers.curves import final_outcome
from tests.train.test_kinds import EVERY_PART, FILES, KINDS, SMALL

AGAIN = "train.activation_checkpointing=true"
WORDS = {
    "gpt2": ["model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.dropout=0.1"],
    "gpt2 in bfloat16": [*KINDS["gpt2 and muon"], "train.dtype=bfloat16"],
    EVERY_PART: [*KINDS[EVERY_PART], "train.batch_schedule={0: 16, 2: 32}"],
}
SHORT = ["train.max_steps=4", "train.eval_interval=null", "train.log_interval=1"]


def experiment(name: str, *words: str) -> Experiment:
    return load_experiment(None, [*SMALL, *WORDS[name], *SHORT, *words])


@pytest.mark.parametrize("name", WORDS)
def test_run_has_the_same_bits(name, tiny_dataset, folder, tmp_path):
    outcomes = []
    for words in ([], [AGAIN]):
        run = type(folder)(tmp_path / str(len(words)))
        run.path.mkdir()
        assert train(experiment(name, *words), run, tiny_dataset, Worker(cpus=1)) == 4
        outcomes.append(final_outcome(run))
    assert outcomes[0] == outcomes[1]


def kept_bytes(model: torch.nn.Module) -> int:
    """Return the size of what the forward pass keeps for the backward pass."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    tokens = torch.zeros(8, 32, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, tokens)
    return kept


@pytest.mark.parametrize("name", ["gpt2", EVERY_PART])
def test_forward_pass_keeps_less(name):
    model = experiment(name, "model.n_layer=8").new_model(16)
    before = kept_bytes(model)
    models.checkpoint_activations(model)
    models.checkpoint_activations(model)  # as an estimate does, which builds two states
    assert kept_bytes(model) < before / 4


def test_model_without_blocks_is_refused_in_one_line(tmp_path):
    kind = f"model.kind={FILES}/conv.py:GatedConv"
    assert load_experiment(None, [kind, AGAIN]).train.activation_checkpointing
    text = (FILES / "conv.py").read_text("utf-8").replace("self.blocks", "self.layers")
    (tmp_path / "conv.py").write_text(text, "utf-8")
    kind = f"model.kind={tmp_path}/conv.py:GatedConv"
    with pytest.raises(UserError, match=r"^train.activation_checkpointing needs .* false$"):
        load_experiment(None, [kind, AGAIN])
