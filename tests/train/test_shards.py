"""A sharded run has the bits of a run on one worker, and each rank the memory of its shard."""

import copy

import pytest
import torch
from torch import nn

from model import optim
from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train.gradients import Gradients
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.train.ranks import regions
from orchestrator.train.ranks.exchange import Exchange
from orchestrator.train.ranks.layout import Layout, deal_matrices
from orchestrator.train.ranks.regions import ALIGNMENT
from orchestrator.train.ranks.slots import adds_pairs, rounds_of
from tests.helpers import train_rank
from tests.helpers.allocated import Allocated
from tests.helpers.checkpoints import rewrite_manifest
from tests.helpers.curves import final_outcome
from tests.helpers.groups import ZerosFromOthers
from tests.train.test_kinds import FILES

# The parameters have more than 20 pieces, and norms and biases between the matrices.
WORDS = [
    "name=small",
    "data.tokenizer=char",
    "model.block_size=16",
    "model.n_layer=2",
    "model.n_head=2",
    "model.n_embd=128",
    "model.bias=true",
    "train.micro_batch_size=1",
    "train.global_batch_size=8",
    "train.log_interval=1",
    "train.eval_interval=null",
    "schedule.kind=constant",
    "schedule.warmup_steps=2",
    "schedule.max_lr=1e-2",
    "optim.max_grad_norm=0.5",
    "optim.weight_decay=0.1",
]


def on_workers(folder: RunFolder, data_dir, nodes: str, *words: str) -> None:
    processes = train_rank.start(
        folder, data_dir, [*WORDS, *words], len(nodes), nodes, bucket=1 << 16
    )
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * len(nodes)


# Muon on 3 and 4 workers is in test_kinds.py.
@pytest.mark.parametrize("kind", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_run_on_shards_of_any_number_equals_the_run_on_one_worker(
    kind, tiny_dataset, folder, tmp_path
):
    words = [f"optim.kind={kind}", "train.global_batch_size=32", "train.reduction_slots=32"]
    whole = RunFolder(tmp_path / "whole")
    whole.path.mkdir()
    experiment = load_experiment(None, [*WORDS, *words, "train.max_steps=7"])
    assert [rounds_of(experiment, ranks) for ranks in (3, 4, 8)] == [1, 2, 1]
    assert train(experiment, whole, tiny_dataset, Worker(cpus=1)) == 7
    on_workers(folder, tiny_dataset, "AAAABBBB", *words, "train.max_steps=3")
    on_workers(folder, tiny_dataset, "AAA", *words, "train.max_steps=4")
    on_workers(folder, tiny_dataset, "AABB", *words, "train.max_steps=6")
    words += ["train.max_steps=7", "train.shard_optimizer=false"]
    on_workers(folder, tiny_dataset, "AABB", *words)
    assert final_outcome(folder) == final_outcome(whole)
    assert "drift" not in {event["kind"] for event in events.read(folder)}


def model_of(width: int, layers: int = 2) -> nn.Module:
    words = [*WORDS, f"model.n_embd={width}", f"model.n_layer={layers}"]
    return load_experiment(None, words).new_model(65)


def sharded(kind: str, model: nn.Module, rank: int, world: int, group: ZerosFromOthers) -> tuple:
    optimizer = optim.build(kind, model, load_experiment(None, WORDS).optimizer_settings())
    exchange = Exchange(8, rank, world * "A", new_group=lambda partition: group)
    params = list(model.parameters())
    return optimizer, Gradients(params, 8, exchange, deal_matrices(optimizer, 8), optimizer)


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_number_is_in_the_segments_of_one_rank(kind, world, monkeypatch):
    model = model_of(96)
    before = [param.clone() for param in model.parameters()]
    counts = {name: torch.zeros(param.numel()) for name, param in model.named_parameters()}
    sizes = set()
    monkeypatch.setattr(regions, "LEAST_BUCKET", 1 << 16)
    for rank in range(world):
        ranks_model = copy.deepcopy(model)
        optimizer, gradients = sharded(kind, ranks_model, rank, world, ZerosFromOthers())
        shard = gradients.shard
        sizes.add(tuple(stop - start for start, stop in shard.own))
        given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, param in ranks_model.named_parameters():
            for segment in shard.segments[param]:
                end = segment.first + segment.weights.numel()
                counts[name][segment.first : end] += 1
                assert segment.first % ALIGNMENT == 0
                assert id(segment.weights) in given
                assert torch.equal(
                    segment.weights.view(-1), param.detach().view(-1)[segment.first : end]
                )
                assert segment.weights.data_ptr() == param.data_ptr() + 4 * segment.first
        for param, value in zip(ranks_model.parameters(), before, strict=True):
            assert torch.equal(param, value)
            assert param.data_ptr() % 64 == 0
    assert all(bool((count == 1).all()) for count in counts.values())
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("nodes", "most"),
    [
        ("AA", 1.001),
        ("AAA", 1.02),
        ("AAAA", 1.04),
        ("AABB", 1.04),
        ("A" * 8, 1.16),
        ("A" * 8 + "B" * 8, 1.16),
        ("A" * 32, 1.39),
        ("A" * 64, 1.54),
    ],
)
def test_matrices_of_gpt2_in_64_slots_lengthen_the_vector_as_documented(nodes, most):
    experiment = load_experiment("configs/gpt2-124m.yaml", ["optim.kind=muon"])
    with torch.device("meta"):
        model = experiment.new_model(50257)
    optimizer = optim.build("muon", model, experiment.optimizer_settings())
    exchange = Exchange(64, 0, nodes, rounds=rounds_of(experiment, len(nodes)))
    params = list(model.parameters())
    layout = Layout(params, exchange, 1, deal_matrices(optimizer, 64), sharded=True)
    assert 1 <= layout.size / sum(param.numel() for param in params) <= most


@pytest.mark.parametrize("slots", [1, 4, 64])
def test_order_of_equal_slots_does_not_change_which_matrices_share_one(slots):
    sizes = [12, 4, 16, 16] * 9 + [5, 7]
    loads = [0] * slots
    together: list[list[int]] = [[] for _ in loads]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        slot = loads.index(min(loads))  # the first one
        loads[slot] += sizes[place]
        together[slot].append(place)
    found: dict[int, list[int]] = {}
    for place, slot in enumerate(regions.slots_of_matrices(sizes, slots)):
        found.setdefault(slot, []).append(place)
    assert sorted(found.values()) == sorted(sorted(places) for places in together if places)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("border", [ALIGNMENT, 3 * ALIGNMENT, 256 * ALIGNMENT])
def test_adamw_updates_parts_of_a_parameter_as_the_whole(border, threads):
    # The numbers after the last whole vector have other bits: with a border of 3, this test fails.
    settings = load_experiment(None, WORDS).optimizer_settings()
    generator = torch.Generator().manual_seed(1)
    whole = nn.Parameter(torch.randn(70_001, generator=generator))
    parts = [nn.Parameter(part.clone()) for part in whole.detach().split([border, 70_001 - border])]
    groups = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    torch.set_num_threads(threads)
    first = optim.adamw([{"params": [whole], **groups}], settings)
    second = optim.adamw([{"params": parts, **groups}], settings)
    for _ in range(3):
        whole.grad = torch.randn(70_001, generator=generator)
        for part, grad in zip(parts, whole.grad.split([border, 70_001 - border]), strict=True):
            part.grad = grad.clone()
        first.step()
        second.step()
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_rank_of_eight_has_an_eighth_of_the_moments(kind):
    model = model_of(256, layers=12)
    count = sum(param.numel() for param in model.parameters())
    optimizer, gradients = sharded(kind, model, 0, 8, ZerosFromOthers())
    gradients.begin_slot()
    gradients.end_slot()
    gradients.reduce()
    optimizer.step()
    gradients.shard.gather_weights()
    moments = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    assert {param.untyped_storage().data_ptr() for param in model.parameters()} == {
        gradients.shard.weights.untyped_storage().data_ptr()
    }
    assert moments <= 2 * count / 8 * 1.1


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_sharded_step_takes_no_numbers_from_python(kind):
    # On a GPU, to copy them takes a wait of the CPU.
    optimizer, gradients = sharded(kind, model_of(96), 0, 4, ZerosFromOthers())
    with Allocated() as allocated:
        for _ in range(2):
            gradients.begin_slot()
            gradients.end_slot()
        gradients.reduce()
        gradients.norm()
    assert "lift_fresh" not in allocated.operations
    assert "index_put_" in allocated.operations


@pytest.mark.parametrize(
    ("kind", "pairs"), [("gpt2", True), ("modern", True), (f"{FILES}/conv.py:GatedConv", False)]
)
def test_slots_of_a_model_of_the_user_are_not_added_by_autograd(kind, pairs):
    # Its backward pass may add twice to a gradient, as that of a reentrant checkpoint does.
    assert adds_pairs(load_experiment(None, [f"model.kind={kind}"])) == pairs


@pytest.mark.parametrize(
    "words",
    [["train.dtype=float16"], ["optim.kind=tests/own/lion.py:lion"]],
)
def test_shards_of_what_cannot_be_sharded_are_refused(words):
    with pytest.raises(UserError, match="train.shard_optimizer: true .* set .*=auto"):
        load_experiment(None, [*words, "train.shard_optimizer=true"])
    load_experiment(None, words)


def test_checkpoint_of_the_first_numerics_is_refused_by_name(tiny_dataset, folder):
    words = [*WORDS, "train.max_steps=4", "train.checkpoint_interval=2"]
    folder.path.mkdir(exist_ok=True)
    train(load_experiment(None, words), folder, tiny_dataset, Worker(cpus=1))
    path = folder.checkpoint(4)
    manifest = store.read_manifest(path)
    del manifest["fingerprints"]["numerics"]["numerics"]
    manifest["fingerprints"]["proof"] = "0"
    rewrite_manifest(path, manifest)
    longer = load_experiment(None, [*words, "train.max_steps=6"])
    with pytest.raises(UserError, match="numerics: before None, now 3"):
        train(longer, folder, tiny_dataset, Worker(cpus=1))
