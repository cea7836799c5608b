"""First weights of a user's model: those of the constructor, or of its `init_weights(seed)`."""

from pathlib import Path

import pytest
import torch

from model.models import MODELS, empty_model
from orchestrator.config.experiment import load_experiment
from orchestrator.train.init_from import initial_model

CONV = (Path(__file__).parent / "conv.py").read_text()
METHOD = """    def init_weights(self, seed):
        GatedConv.seeds = [*getattr(GatedConv, "seeds", ()), seed]
        generator = {generator}
        for parameter in self.parameters():
            parameter.normal_(std=0.1, generator=generator)

"""
GLOBAL = METHOD.format(generator="None")
OWN = METHOD.format(generator="torch.Generator().manual_seed(seed)")
DRAWS_MORE = "        super().__init__()\n        torch.rand(3)\n        self.config"


def first_weights(folder, text: str, seed: int) -> dict[str, torch.Tensor]:
    (folder / "conv.py").write_text(text)
    words = [f"model.kind={folder}/conv.py:GatedConv", "model.width=8", f"train.seed={seed}"]
    return dict(initial_model(load_experiment(None, words), 65).named_parameters())


def with_method(method: str) -> str:
    return CONV.replace("    def parameter_groups", f"{method}    def parameter_groups")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["", GLOBAL, OWN])
def test_first_weights_follow_from_the_seed_alone(method, tmp_path):
    text = with_method(method)
    found = first_weights(tmp_path, text, 7)
    torch.rand(5)
    assert equal(found, first_weights(tmp_path, text, 7))
    assert not equal(found, first_weights(tmp_path, text, 8))


def test_without_the_method_they_are_those_of_the_constructor(tmp_path):
    found = first_weights(tmp_path, CONV, 7)
    kind = load_experiment(None, [f"model.kind={tmp_path}/conv.py:GatedConv"]).model.kind
    torch.manual_seed(7)
    model = MODELS[kind].build(MODELS[kind].config(vocab_size=128, width=8, block_size=256))
    assert equal(found, dict(model.named_parameters()))


@pytest.mark.parametrize("method", [GLOBAL, OWN])
def test_with_the_method_draws_of_the_constructor_do_not_count(method, tmp_path):
    found = first_weights(tmp_path, with_method(method), 7)
    text = with_method(method).replace(
        "        super().__init__()\n        self.config", DRAWS_MORE, 1
    )
    assert DRAWS_MORE in text
    assert equal(found, first_weights(tmp_path, text, 7))


def test_the_method_is_called_once_and_not_for_a_model_without_values(tmp_path):
    (tmp_path / "conv.py").write_text(with_method(GLOBAL))
    words = [f"model.kind={tmp_path}/conv.py:GatedConv", "model.width=8", "train.seed=5"]
    experiment = load_experiment(None, words)
    shape = (experiment.model.kind, experiment.model_config_for(65))
    cls = type(empty_model(*shape, "cpu"))
    cls.seeds = []
    empty_model(*shape, "cpu")
    assert cls.seeds == []
    initial_model(experiment, 65)
    assert cls.seeds == [5]
