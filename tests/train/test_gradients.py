"""The gradient is correct, and has the same bits for any number of ranks (real processes)."""

import math
import os
import subprocess
import sys

import pytest
import torch

from model.gpt import GPT
from model.gpt_config import GPTConfig
from orchestrator.train.gradients import Gradients

M, B, T = 8, 2, 16
CONFIG = GPTConfig(block_size=T, vocab_size=61, n_layer=2, n_head=2, n_embd=32, bias=True)
DTYPES = ("float32", "bfloat16")

# One process imports torch; a fork of it is a rank.
RANKS = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch.distributed as dist
import test_gradients

def rank_of(world, rank, folder):
    if world > 1:
        store = dist.FileStore(f"{{folder}}/{{world}}", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    test_gradients.work(rank, world, f"{{folder}}/{{world}}-{{rank}}.pt")
    if world > 1:
        dist.barrier()

children = []
for world, rank in ((1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)):
    child = os.fork()
    if not child:
        rank_of(world, rank, sys.argv[1])
        os._exit(0)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


def new_model() -> GPT:
    torch.manual_seed(5)
    return GPT(CONFIG)


def micro_batch(step: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + m)
    tokens = torch.randint(CONFIG.vocab_size, (B, T + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def fill(model: GPT, gradients: Gradients, dtype: str, step: int) -> None:
    for slot in gradients.my_slots():
        gradients.begin_slot()
        for m in slot:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(*micro_batch(step, m))
            gradients.record_loss(m, loss)
            loss.backward()
        gradients.end_slot()


def reduced(
    slots: int, dtype: str, rank: int = 0, world: int = 1, max_norm: float = 0.5
) -> list[dict]:
    """Losses, gradient, norm and clipped gradient of two steps, made in the same buffers."""
    model, results = new_model(), []
    gradients = Gradients(list(model.parameters()), M, slots, rank, world)
    for step in range(2):
        fill(model, gradients, dtype, step)
        losses = gradients.reduce().clone()
        before = flat(model)
        norm = gradients.norm().clone()
        gradients.clip(max_norm)
        results.append({"losses": losses, "gradient": before, "norm": norm, "clipped": flat(model)})
    return results


def flat(model: GPT) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def work(rank: int, world: int, out: str) -> None:
    torch.set_num_threads(1)
    cases = [(slots, dtype) for slots in (4, 8) for dtype in DTYPES]
    torch.save(
        {f"{slots}-{dtype}": reduced(slots, dtype, rank, world) for slots, dtype in cases}, out
    )


@pytest.fixture(scope="module")
def by_world(tmp_path_factory) -> dict[int, list[dict]]:
    """By world size: the results of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", RANKS, str(folder)], env=environment, timeout=120, check=True
    )
    return {
        w: [torch.load(folder / f"{w}-{r}.pt", weights_only=True) for r in range(w)]
        for w in (1, 2, 4)
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [4, 8])
@pytest.mark.parametrize("world", [2, 4])
def test_gradient_losses_and_norm_have_the_same_bits_for_any_number_of_ranks(
    by_world, world, slots, dtype
):
    golden = by_world[1][0][f"{slots}-{dtype}"]
    for rank in range(world):
        for step, expected in enumerate(golden):
            got = by_world[world][rank][f"{slots}-{dtype}"][step]
            for name, value in expected.items():
                assert torch.equal(got[name].view(torch.int32), value.view(torch.int32)), (
                    rank,
                    step,
                    name,
                )


def full_batch(step: int) -> tuple[torch.Tensor, torch.Tensor, GPT]:
    """The reference: losses and gradient of one forward pass over all sequences."""
    model = new_model()
    inputs, targets = (
        torch.cat(parts) for parts in zip(*(micro_batch(step, m) for m in range(M)), strict=True)
    )
    windows = model(inputs, targets, reduction="window")  # (M * B,)
    losses = windows.view(M, -1).mean(dim=1).float() / inputs.size(1)
    losses.mean().backward()
    return losses.detach(), flat(model), model


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
def test_reduced_gradient_is_the_full_batch_gradient(slots):
    for step, got in enumerate(reduced(slots, "float32")):
        losses, gradient, model = full_batch(step)
        assert torch.allclose(got["losses"], losses, atol=1e-6, rtol=0)
        assert torch.allclose(got["gradient"], gradient, atol=1e-7, rtol=1e-4)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm.item() > 0.5  # so that something was clipped
        assert math.isclose(got["norm"].item(), norm.item(), rel_tol=1e-5)
        assert torch.allclose(got["clipped"], flat(model), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6])
def test_norm_and_clip_have_the_same_bits_as_those_of_torch(max_norm):
    model, reference = new_model(), new_model()
    gradients = Gradients(list(model.parameters()), M, 4)
    fill(model, gradients, "float32", 0)
    gradients.reduce()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    assert torch.equal(gradients.norm(), expected)
    gradients.clip(max_norm)
    assert torch.equal(flat(model), flat(reference))


def test_adding_left_to_right_gives_other_bits(by_world):
    # If it gave the same bits, equal bits for all world sizes would not prove a fixed order.
    model = new_model()
    for m in range(M):
        model(*micro_batch(0, m)).backward()
    naive = flat(model) / M
    ours = by_world[1][0]["8-float32"][0]["gradient"]
    assert torch.allclose(naive, ours, atol=1e-7, rtol=1e-4)
    assert not torch.equal(naive, ours)
    # Another S gives other bits, so S is part of the fingerprint.
    assert not torch.equal(reduced(2, "float32")[0]["gradient"], ours)
    assert not torch.equal(by_world[1][0]["8-bfloat16"][0]["gradient"], ours)


@pytest.mark.parametrize(
    ("slots", "world"), [(s, w) for s in (1, 2, 4, 8, 16, 32, 64) for w in (1, 2, 4) if w <= s]
)
def test_slots_are_added_as_a_balanced_tree_in_few_buffers(slots, world):
    weight = torch.nn.Parameter(torch.zeros(3))
    draws = (
        torch.rand(slots, 3, generator=torch.Generator().manual_seed(1))
        * 10.0 ** torch.arange(-3, 0)
    ).float()
    per_worker = []
    for rank in range(world):
        gradients, buffers = Gradients([weight], slots, slots, rank, world), set()
        for (m,) in gradients.my_slots():
            gradients.begin_slot()
            (weight * draws[m]).sum().backward()
            gradients.end_slot()
            buffers |= {
                b.flat.data_ptr() for b in (*gradients.free, *gradients.stack, gradients.current)
            }
        assert len(buffers) <= math.log2(slots / world) + 2
        total = gradients.stack[0].flat[:3].clone()
        per_worker.append(total)
    rows = list(draws)
    while len(rows) > world:
        rows = [a + b for a, b in zip(rows[::2], rows[1::2], strict=True)]
    assert torch.equal(torch.stack(per_worker), torch.stack(rows))


@pytest.mark.parametrize(
    ("micro_batches", "slots", "world"),
    [(8, 4, 1), (8, 4, 2), (8, 4, 4), (40, 8, 8), (1, 1, 1), (12, 4, 2)],
)
def test_each_micro_batch_is_in_one_slot_in_order(micro_batches, slots, world):
    weight = torch.nn.Parameter(torch.zeros(1))
    mine = [
        Gradients([weight], micro_batches, slots, rank, world).my_slots() for rank in range(world)
    ]
    assert [m for worker in mine for slot in worker for m in slot] == list(range(micro_batches))
    assert {len(slot) for worker in mine for slot in worker} == {micro_batches // slots}
    assert {len(worker) for worker in mine} == {slots // world}


@pytest.mark.parametrize(
    ("micro_batches", "slots", "world"), [(6, 3, 1), (6, 4, 1), (8, 4, 3), (8, 2, 4)]
)
def test_slots_that_are_not_canonical_are_an_assertion_error(micro_batches, slots, world):
    with pytest.raises(AssertionError):
        Gradients([torch.nn.Parameter(torch.zeros(1))], micro_batches, slots, 0, world)


def test_missing_slot_is_an_assertion_error():
    gradients = Gradients([torch.nn.Parameter(torch.zeros(1))], 2, 2)
    gradients.begin_slot()
    gradients.end_slot()
    with pytest.raises(AssertionError):
        gradients.reduce()


def test_loss_that_is_not_finite_does_not_change_the_other_losses():
    weight = torch.nn.Parameter(torch.ones(1))
    gradients = Gradients([weight], 4, 4)
    for (m,) in gradients.my_slots():
        gradients.begin_slot()
        loss = (weight * (float("nan") if m == 2 else m + 1)).sum()
        gradients.record_loss(m, loss)
        loss.backward()
        gradients.end_slot()
    losses = gradients.reduce()
    assert losses.isnan().tolist() == [False, False, True, False]
    assert losses[[0, 1, 3]].tolist() == [1, 2, 4]
    assert not math.isfinite(gradients.norm())
