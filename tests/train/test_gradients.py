"""The gradient is correct, and has the same bits for any number of ranks (real processes)."""

import itertools
import math
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.distributed as dist

from model.gpt import GPT
from model.gpt_config import GPTConfig
from orchestrator.train.gradients import Gradients
from orchestrator.train.ranks.exchange import Exchange, TorchGroup
from orchestrator.train.ranks.slots import vectors

M, B, T = 8, 2, 16
CONFIG = GPTConfig(block_size=T, vocab_size=61, n_layer=2, n_head=2, n_embd=32, bias=True)
DTYPES = ("float32", "bfloat16")

# One process imports torch; a fork of it is a rank.
RANKS = f"""
import os, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch.distributed as dist
import test_gradients

def rank_of(nodes, rank, folder):
    if len(nodes) > 1:
        store = dist.FileStore(f"{{folder}}/{{nodes}}", len(nodes))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=len(nodes))
    test_gradients.work(rank, nodes, f"{{folder}}/{{nodes}}-{{rank}}.pt")
    if len(nodes) > 1:
        dist.barrier()

for nodes in test_gradients.NODES:
    children = []
    for rank in range(len(nodes)):
        child = os.fork()
        if not child:
            rank_of(nodes, rank, sys.argv[1])
            os._exit(0)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(f"a rank of {{nodes}} failed")
"""
# A letter for the node of each rank. The ranks of "ABBA" are not numbered node by node.
NODES = ("A", "AA", "AAA", "AAAA", "AABB", "ABBA", "AAABBB", "AAAABBBB")


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


class Counted(TorchGroup):
    """Real collectives that count what this rank sends, by rank; an all-gather as a ring."""

    sent: Counter[int] = Counter()

    def all_to_all(self, out, sent, from_each, to_each):
        self.sent.update(dict(zip(self._members(), to_each, strict=True)))
        super().all_to_all(out, sent, from_each, to_each)

    def all_gather(self, out, mine):
        members = self._members()
        following = members[(members.index(dist.get_rank()) + 1) % len(members)]
        self.sent[following] += (len(members) - 1) * mine.numel()
        super().all_gather(out, mine)

    def _members(self):
        [members] = [ranks for ranks in self.partition if dist.get_rank() in ranks]
        return members


def reduced(
    slots: int, dtype: str, rank: int = 0, nodes: str = "A", max_norm: float = 0.5
) -> list[dict]:
    """Losses, gradient, norm and clipped gradient of two steps, made in the same buffers."""
    model, results = new_model(), []
    gradients = Gradients(list(model.parameters()), M, Exchange(slots, rank, nodes, Counted))
    Counted.sent.clear()
    for step in range(2):
        fill(model, gradients, dtype, step)
        losses = gradients.reduce().clone()
        before = flat(model)
        norm = gradients.norm().clone()
        gradients.clip(max_norm)
        results.append({"losses": losses, "gradient": before, "norm": norm, "clipped": flat(model)})
    Counted.sent[rank] = 0
    results[0]["sent"] = torch.tensor([Counted.sent[r] for r in range(len(nodes))])
    results[0]["size"] = gradients.size
    return results


def flat(model: GPT) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()])


def work(rank: int, nodes: str, out: str) -> None:
    torch.set_num_threads(1)
    cases = [(slots, dtype) for slots in (4, 8) for dtype in DTYPES if len(nodes) <= slots]
    torch.save(
        {f"{slots}-{dtype}": reduced(slots, dtype, rank, nodes) for slots, dtype in cases}, out
    )


@pytest.fixture(scope="module")
def by_nodes(tmp_path_factory) -> dict[str, list[dict]]:
    """By nodes of the ranks: the results of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", RANKS, str(folder)], env=environment, timeout=120, check=True
    )
    return {
        nodes: [
            torch.load(folder / f"{nodes}-{rank}.pt", weights_only=True)
            for rank in range(len(nodes))
        ]
        for nodes in NODES
    }


@pytest.mark.parametrize("nodes", NODES[1:])
def test_gradient_losses_and_norm_have_the_same_bits_for_any_number_of_ranks(by_nodes, nodes):
    for rank, cases in enumerate(by_nodes[nodes]):
        assert len(cases) == (4 if len(nodes) <= 4 else 2)
        for case, step in itertools.product(cases, range(2)):
            expected = by_nodes["A"][0][case][step]
            got = cases[case][step]
            for name in ("losses", "gradient", "norm", "clipped"):
                value = expected[name]
                assert torch.equal(got[name].view(torch.int32), value.view(torch.int32)), (
                    rank,
                    case,
                    step,
                    name,
                )


def test_real_processes_of_two_nodes_send_half_of_a_ring_between_them(by_nodes):
    cases = [rank["8-float32"][0] for rank in by_nodes["AAAABBBB"]]
    size = 2 * cases[0]["size"]  # of two steps
    sent = torch.stack([case["sent"] for case in cases])  # [rank, other]
    assert sent[:4, 4:].sum() == sent[4:, :4].sum() == 2 * size * 1 / 2
    assert sent[:4, :4].sum(dim=1).tolist() == [2 * size * 3 / 4] * 4
    flat = torch.stack([rank["8-float32"][0]["sent"] for rank in by_nodes["AAAA"]])
    assert flat.sum(dim=1).tolist() == [2 * size * 3 / 4] * 4


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
def test_norm_and_clip_are_those_of_torch(max_norm):
    # The norm is made of pieces of fixed size, so its last bits are others.
    model, reference = new_model(), new_model()
    gradients = Gradients(list(model.parameters()), M, Exchange(4))
    fill(model, gradients, "float32", 0)
    gradients.reduce()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        theirs.grad = ours.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm)
    assert gradients.norm().item() == pytest.approx(expected.item(), rel=1e-6)
    gradients.clip(max_norm)
    assert torch.allclose(flat(model), flat(reference), rtol=1e-6, atol=0)


def test_adding_left_to_right_gives_other_bits(by_nodes):
    # If it gave the same bits, equal bits for all world sizes would not prove a fixed order.
    model = new_model()
    for m in range(M):
        model(*micro_batch(0, m)).backward()
    naive = flat(model) / M
    ours = by_nodes["A"][0]["8-float32"][0]["gradient"]
    assert torch.allclose(naive, ours, atol=1e-7, rtol=1e-4)
    assert not torch.equal(naive, ours)
    # Another S gives other bits, so S is part of the fingerprint.
    assert not torch.equal(reduced(2, "float32")[0]["gradient"], ours)
    assert not torch.equal(by_nodes["A"][0]["8-bfloat16"][0]["gradient"], ours)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(
    ("slots", "world"),
    [(s, w) for s in (1, 2, 4, 8, 16, 32, 64) for w in (1, 2, 3, 4, 7, 12) if w <= s],
)
def test_slots_are_added_as_a_balanced_tree_in_few_buffers(slots, world, pairs):
    weight = torch.nn.Parameter(torch.zeros(3))
    draws = (
        torch.rand(slots, 3, generator=torch.Generator().manual_seed(1))
        * 10.0 ** torch.arange(-3, 0)
    ).float()
    sums = {}
    for rank in range(world):
        gradients, buffers = alone([weight], slots, slots, rank, world, pairs), set()
        for (m,) in gradients.my_slots():
            gradients.begin_slot()
            (weight * draws[m]).sum().backward()
            gradients.end_slot()
            buffers |= {
                b.flat.data_ptr() for b in (*gradients.free, *gradients.stack, gradients.current)
            }
        assert len(buffers) == vectors(gradients.exchange.mine, pairs)
        assert world > 1 or len(buffers) == max(1, math.log2(slots) + (not pairs))
        for partial in gradients.stack:
            sums[partial.first, partial.slots] = partial.flat[:3]

    def expected(first: int, size: int) -> torch.Tensor:
        if size == 1:
            return draws[first]
        return expected(first, size // 2) + expected(first + size // 2, size // 2)

    assert sum(size for _, size in sums) == slots
    for subtree, found in sums.items():
        assert torch.equal(found, expected(*subtree))


def alone(
    params, micro_batches: int, slots: int, rank: int, world: int, pairs: bool = True
) -> Gradients:
    """Return the gradients of one rank, which has no connection to others."""
    exchange = Exchange(slots, rank, world * "A", new_group=lambda partition: None)
    return Gradients(params, micro_batches, exchange, pairs=pairs)


@pytest.mark.parametrize(
    ("micro_batches", "slots", "world"),
    [(8, 4, 1), (8, 4, 2), (8, 4, 4), (8, 4, 3), (40, 8, 8), (40, 8, 5), (1, 1, 1), (12, 4, 2)],
)
def test_each_micro_batch_is_in_one_slot_in_order(micro_batches, slots, world):
    weight = torch.nn.Parameter(torch.zeros(1))
    mine = [alone([weight], micro_batches, slots, rank, world).my_slots() for rank in range(world)]
    assert [m for worker in mine for slot in worker for m in slot] == list(range(micro_batches))
    assert {len(slot) for worker in mine for slot in worker} == {micro_batches // slots}
    assert max(len(worker) for worker in mine) == math.ceil(slots / world)


@pytest.mark.parametrize(("micro_batches", "slots", "world"), [(6, 3, 1), (6, 4, 1), (8, 2, 4)])
def test_slots_that_are_not_canonical_are_an_assertion_error(micro_batches, slots, world):
    with pytest.raises(AssertionError):
        alone([torch.nn.Parameter(torch.zeros(1))], micro_batches, slots, 0, world)


def test_missing_slot_is_an_assertion_error():
    gradients = Gradients([torch.nn.Parameter(torch.zeros(1))], 2, Exchange(2))
    gradients.begin_slot()
    gradients.end_slot()
    with pytest.raises(AssertionError):
        gradients.reduce()


def test_loss_that_is_not_finite_does_not_change_the_other_losses():
    weight = torch.nn.Parameter(torch.ones(1))
    gradients = Gradients([weight], 4, Exchange(4))
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
