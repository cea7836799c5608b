"""The loss in chunks equals the loss of all logits, and never holds all of them."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import loss as loss_module
from model.loss import chunked_cross_entropy

BATCH, STEPS, WIDTH, VOCAB = 3, 7, 16, 53


class Largest(TorchDispatchMode):
    """Remembers the size of the largest new tensor of each type."""

    def __init__(self) -> None:
        super().__init__()
        self.numel: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel[result.dtype] = max(self.numel.get(result.dtype, 0), result.numel())
        return result


def inputs(dtype: torch.dtype = torch.float64, bias: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    shapes: list[tuple[int, ...]] = [(BATCH, STEPS, WIDTH), (VOCAB, WIDTH), (VOCAB,)]
    made: list[Tensor | None] = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]
    return made if bias else [*made[:2], None]


def some_targets() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(VOCAB, (BATCH, STEPS), generator=generator)
    targets[0, 2:] = -1
    return targets


def full(hidden, weight, bias, targets, reduction="mean", cap=None) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    each = "none" if reduction == "window" else reduction
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=each)
    return loss.view(targets.shape).double().sum(1) if reduction == "window" else loss


def gradients(loss: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    (3 * loss).backward()  # 3: the backward pass scales what the forward pass has computed
    return [tensor.grad for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("chunk", [1, 5, 7, 21, 100])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_loss_and_gradients_equal_those_of_all_logits(chunk, cap, reduction, dtype, tolerance):
    ours, theirs = inputs(dtype), inputs(dtype)
    loss = chunked_cross_entropy(*ours, some_targets(), reduction, chunk=chunk, cap=cap)
    expected = full(*theirs, some_targets(), reduction, cap)
    assert (loss.shape, loss.dtype) == ((), dtype)
    torch.testing.assert_close(loss, expected, atol=tolerance, rtol=tolerance)
    for mine, other in zip(gradients(loss, ours), gradients(expected, theirs), strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_sums_of_windows_equal_those_of_all_logits(cap):
    found = chunked_cross_entropy(*inputs(), some_targets(), "window", chunk=4, cap=cap)
    assert (found.shape, found.dtype, found.requires_grad) == ((BATCH,), torch.float64, False)
    expected = full(*inputs(), some_targets(), "window", cap)
    torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=0)


@pytest.mark.parametrize("cap", [None, 5.0])
def test_loss_without_gradients_has_the_same_bits(cap):
    tensors = inputs(torch.float32, bias=False)
    loss = chunked_cross_entropy(*tensors, some_targets(), "mean", chunk=4, cap=cap)
    with torch.no_grad():
        again = chunked_cross_entropy(*tensors, some_targets(), "mean", chunk=4, cap=cap)
    assert torch.equal(again, loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_float32_loss_and_gradients_near_those_of_all_logits(dtype):
    ours, theirs, exact = (inputs(torch.float32) for _ in range(3))
    with torch.autocast("cpu", dtype):
        loss = chunked_cross_entropy(*ours, some_targets(), "mean", chunk=4)
        expected = full(*theirs, some_targets())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    truth = gradients(full(*exact, some_targets()), exact)
    found = zip(gradients(loss, ours), gradients(expected, theirs), truth, strict=True)
    for mine, other, true in found:
        assert mine.dtype == torch.float32
        # As near to the gradients in float32 as those of all logits, which are rounded as well.
        assert (mine - true).norm() < 1.2 * (other - true).norm() + 1e-3 * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_tensor_is_a_chunk_of_logits(dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "BLOCK_NUMEL", 3 * 1000)
    hidden = torch.randn(2, 256, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    targets = torch.zeros(2, 256, dtype=torch.long)
    with Largest() as largest, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        chunked_cross_entropy(hidden, weight, None, targets, "mean", chunk=16).backward()
    assert largest.numel[dtype] == 16 * 1000
    if dtype == torch.bfloat16:  # only a part of a chunk, or the weights, are in float32
        assert largest.numel[torch.float32] == weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_stay_in_the_cache_change_no_bit_of_the_loss(dtype, monkeypatch):
    found = []
    for rows in (1, 3, 100):
        monkeypatch.setattr(loss_module, "BLOCK_NUMEL", rows * VOCAB)
        tensors = inputs(torch.float32)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = chunked_cross_entropy(*tensors, some_targets(), "mean", chunk=10, cap=5.0)
        found.append((loss, gradients(loss, tensors)))
    expected, (hidden, *others) = found[-1]
    for loss, (of_hidden, *of_others) in found[:-1]:
        assert torch.equal(loss, expected)
        assert torch.equal(of_hidden, hidden)
        for one, other in zip(of_others, others, strict=True):
            torch.testing.assert_close(one, other)


def test_second_backward_pass_is_an_error():
    loss = chunked_cross_entropy(*inputs(), some_targets(), "mean", chunk=4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
