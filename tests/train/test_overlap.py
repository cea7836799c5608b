"""Gradients exchanged during the last backward pass are those that are exchanged after it."""

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from model import optim
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.train.gradients import Gradients
from orchestrator.train.ranks import regions
from orchestrator.train.ranks.exchange import Exchange
from orchestrator.train.ranks.slots import is_overlapped
from tests.helpers.groups import ZerosFromOthers
from tests.train.test_kinds import FILES

LAYERS = 4
WIDTH = 256  # of a square matrix: a bucket for two ranks
SLOTS = 4


class Layers(nn.Module):
    """Layers in an order of their own; some may stay unused."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        for place in self.order:
            x = torch.tanh(self.layers[place](x))
        return x.square().mean()


class Recorded(ZerosFromOthers):
    """Keeps what was sent."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.has_sent = threading.Event()

    def all_to_all(
        self, out: Tensor, sent: Tensor, from_each: list[int], to_each: list[int]
    ) -> None:
        self.sent.append(sent.clone())
        super().all_to_all(out, sent, from_each, to_each)
        self.has_sent.set()


class Lost(ZerosFromOthers):
    """A group whose other rank is gone."""

    def all_to_all(
        self, out: Tensor, sent: Tensor, from_each: list[int], to_each: list[int]
    ) -> None:
        raise RuntimeError("connection closed by peer")


@pytest.fixture(autouse=True)
def one_matrix_in_a_bucket(monkeypatch):
    monkeypatch.setattr(regions, "LEAST_BUCKET", WIDTH**2)
    monkeypatch.setattr(regions, "LEAST_OVERLAPPING_BUCKET", WIDTH**2)


def of(model: nn.Module, group: ZerosFromOthers, overlaps: bool = True) -> Gradients:
    settings = load_experiment(None, []).optimizer_settings()
    optimizer = optim.adamw([{"params": list(model.parameters())}], settings)
    exchange = Exchange(SLOTS, 0, "AB", new_group=lambda partition: group)
    return Gradients(
        list(model.parameters()), SLOTS, exchange, sharded_by=optimizer, overlaps=overlaps
    )


def add_slots(model: nn.Module, gradients: Gradients) -> None:
    for slot in gradients.my_slots():
        gradients.begin_slot()
        for micro_batch in slot:
            torch.manual_seed(micro_batch)
            gradients.begin_backward(micro_batch)
            loss = model(torch.randn(8, WIDTH).to(gradients.device))
            gradients.record_loss(micro_batch, loss)
            loss.backward()
        gradients.end_slot()


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 0], []])
def test_messages_gradients_losses_and_norm_are_those_of_an_exchange_afterwards(order, device):
    # Also where the loss does not depend on a layer, or depends on it twice.
    found = []
    for overlaps in (True, False):
        model = Layers(order).to(device)
        group = Recorded()
        gradients = of(model, group, overlaps)
        assert len(gradients.layout.regions) == LAYERS + 1
        for _ in range(2):
            if order:
                add_slots(model, gradients)
            else:
                for slot in gradients.my_slots():
                    gradients.begin_slot()
                    gradients.begin_backward(slot[-1])
                    gradients.end_slot()
            losses = gradients.reduce()
        shard = gradients.shard
        found.append([*group.sent, losses, gradients.norm(), *shard.gradients.values()])
        assert len(group.sent) == 2 * LAYERS
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_exchange_begins_before_the_backward_pass_ends():
    model = Layers([0, 1, 2, 3])
    group = Recorded()
    gradients = of(model, group)
    in_time = []

    def wait(grad: Tensor) -> None:
        if gradients.overlap.has_begun:
            in_time.append(group.has_sent.wait(60))

    model.layers[0].weight.register_hook(wait)
    add_slots(model, gradients)
    gradients.reduce()
    assert in_time == [True]


def test_only_the_last_backward_pass_starts_an_exchange():
    model = Layers([0, 1, 2, 3])
    group = Recorded()
    gradients = of(model, group)
    first, last = gradients.my_slots()
    gradients.begin_slot()
    gradients.begin_backward(first[-1])
    model(torch.ones(8, WIDTH)).backward()
    assert not gradients.overlap.has_begun
    gradients.end_slot()
    gradients.begin_slot()
    gradients.begin_backward(last[-1])
    assert gradients.overlap.has_begun
    assert not group.sent
    model(torch.ones(8, WIDTH)).backward()
    gradients.end_slot()
    gradients.reduce()
    assert len(group.sent) == LAYERS


def test_error_of_the_exchange_is_raised_where_the_step_needs_its_result():
    model = Layers([0, 1, 2, 3])
    gradients = of(model, Lost())
    add_slots(model, gradients)
    with pytest.raises(RuntimeError, match="closed by peer"):
        gradients.reduce()


def test_model_that_is_no_longer_used_is_freed():
    model = Layers([0, 1, 2, 3])
    gradients = of(model, Recorded())
    add_slots(model, gradients)
    gradients.reduce()
    weight = weakref.ref(model.layers[0].weight)
    del model, gradients
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize(
    ("nodes", "device", "words", "expected"),
    [
        ("AB", "cpu", [], True),
        ("AABB", "cpu", ["model.kind=modern"], True),
        ("AA", "cpu", [], False),
        ("AB", "cuda:0", [], False),
        ("AB", "cpu", ["train.compile=true"], True),
        ("AB", "cpu", [f"model.kind={FILES}/conv.py:GatedConv"], False),
        ("AB", "cpu", ["train.overlap_exchange=false"], False),
        ("AA", "cuda:0", ["train.overlap_exchange=true", "train.compile=true"], True),
    ],
)
def test_exchange_overlaps_where_it_is_wanted(nodes, device, words, expected):
    assert is_overlapped(load_experiment(None, words), len(set(nodes)), device) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["train.dtype=float16"],
        ["train.shard_optimizer=false"],
        ["optim.kind=tests/own/lion.py:lion"],
        [f"model.kind={FILES}/conv.py:GatedConv"],
    ],
)
def test_overlap_of_what_cannot_overlap_is_refused(words):
    with pytest.raises(UserError, match="train.overlap_exchange: true .* set .*=auto"):
        load_experiment(None, [*words, "train.overlap_exchange=true"])
    load_experiment(None, words)
