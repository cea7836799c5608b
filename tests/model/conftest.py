"""Fixtures for tests of the model: one thread, and a small random model."""

import pytest
import torch

from model.gpt import GPT
from model.gpt_config import GPTConfig
from tests.helpers.threads import one_thread  # noqa: F401 - used by all tests here


@pytest.fixture
def small_gpt():
    """Return a function that builds small models in eval mode; no tensor is all zeros or ones."""

    def make(**overrides) -> GPT:
        torch.manual_seed(1)
        shape = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 4, "n_embd": 32}
        model = GPT(GPTConfig(**{**shape, **overrides}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
        return model.eval()

    return make
