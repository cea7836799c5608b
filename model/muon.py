"""Muon for matrices and AdamW for all other parameters, in one optimizer.

Muon replaces the momentum of a matrix, U S V^T, by about U V^T: all directions get a step of equal
size. Sources: https://kellerjordan.github.io/posts/muon/; `torch.optim.Muon`, which computes in
bfloat16 on every device, while this one keeps the float32 of the gradients.

Shapes: N matrices of R rows and C columns; R <= C in Newton-Schulz iterations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from model.optim import allow_without_compiler

# One iteration maps each singular value s to a s + b s^3 + c s^5; (a, b, c) of each iteration.
Coefficients = Sequence[tuple[float, float, float]]
NEWTON_SCHULZ: Coefficients = ((3.4445, -4.7750, 2.0315),) * 5  # as in torch.optim.Muon
POLAR_EXPRESS: Coefficients = (  # arXiv:2505.16932
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# From this ratio of columns to rows on, iterations on x x^T alone need fewer operations. Rounding
# errors grow with each of them, so x x^T is computed again after a few.
GRAM_RATIO = 2
GRAM_STEPS = 3
BATCH_NUMEL = 1 << 25  # numbers that are orthogonalised at a time: 128 MiB


class MuonAdamW(Optimizer):
    """One optimizer for all groups of a model.

    A group with `"muon": True` has only matrices. Its keys: lr, momentum, weight_decay, cautious
    (decay only where it has the direction of the update, arXiv:2510.12402) and coefficients. The
    keys of another group: lr, betas, eps, weight_decay. Weight decay is decoupled: a step
    multiplies the weights by 1 - lr * weight_decay.

    A process may update some of the parameters; the result depends on no other process.

    Args:
        groups: Parameter groups in torch's format.
        lr: Learning rate of groups that have none of their own.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float = 0.02) -> None:
        allow_without_compiler()
        defaults = {
            "lr": lr,
            "weight_decay": 0.0,
            "muon": False,
            "momentum": 0.95,
            "cautious": False,
            "coefficients": NEWTON_SCHULZ,
            "betas": (0.8, 0.95),
            "eps": 1e-10,
        }
        super().__init__(groups, defaults)
        for group in self.param_groups:
            for param in group["params"]:
                if group["muon"] and param.dim() != 2:
                    raise ValueError(f"Muon needs matrices, got a tensor of {tuple(param.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            if group["muon"]:
                for batch in batches(params):
                    self._muon(batch, group)
            else:
                self._adamw(params, group)
        return loss

    def _muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters whose parts have one shape when the longer side is horizontal."""
        momentum = group["momentum"]
        updates = []
        for param in params:
            state = self.state[param]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(param)
            grad = _gradient(param)
            buffer = state["momentum_buffer"].lerp_(grad, 1 - momentum)
            for part in grad.lerp(buffer, momentum).chunk(_row_parts(param)):
                updates.append(part.mT if _is_tall(part) else part)
        stacked = orthogonalize(torch.stack(updates), group["coefficients"])
        done = iter(stacked.unbind())
        decay = group["lr"] * group["weight_decay"]
        for param in params:
            for part in param.chunk(_row_parts(param)):
                update = next(done).mT if _is_tall(part) else next(done)
                if decay and group["cautious"]:
                    part.sub_(part * (update * part >= 0), alpha=decay)
                elif decay:
                    part.mul_(1 - decay)
                rows, columns = part.shape
                part.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), device=param.device)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
        names = ("exp_avg", "exp_avg_sq", "step")
        averages, squares, steps = ([self.state[param][name] for param in params] for name in names)
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            params,
            [_gradient(param) for param in params],
            averages,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def batches(params: Iterable[Tensor]) -> list[list[Tensor]]:
    """Divide parameters into lists of at most `BATCH_NUMEL` numbers, whose matrices have one shape.

    A larger parameter is alone. A matrix may be transposed. A parameter may have an attribute
    `slot`. Other slots have other lists, because another process may update them, and bits may
    depend on the whole list.
    """
    found: dict[tuple[Any, ...], list[list[Tensor]]] = {}
    sizes: dict[tuple[Any, ...], int] = {}  # numbers in the last list
    for param in params:
        rows, columns = param.shape
        sides = sorted((rows // _row_parts(param), columns))
        key = (getattr(param, "slot", 0), *sides, param.dtype, param.device)
        lists = found.setdefault(key, [])
        sizes[key] = sizes.get(key, 0) + param.numel()
        if not lists or sizes[key] > BATCH_NUMEL:
            lists.append([])
            sizes[key] = param.numel()
        lists[-1].append(param)
    return [batch for lists in found.values() for batch in lists]


def orthogonalize(matrices: Tensor, coefficients: Coefficients = NEWTON_SCHULZ) -> Tensor:
    """Replace the singular values of each matrix by values of about 1: (N, R, C), R <= C."""
    x = matrices / torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    if x.size(2) >= GRAM_RATIO * x.size(1):
        for done in range(0, len(coefficients), GRAM_STEPS):
            x = _gram_product(x @ x.mT, coefficients[done : done + GRAM_STEPS]) @ x
        return x
    for a, b, c in coefficients:
        gram = x @ x.mT  # (N, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _gram_product(gram: Tensor, coefficients: Coefficients) -> Tensor:
    """Return the matrix by which the iterations multiply x, where gram = x x^T: (N, R, R)."""
    first, *others = coefficients
    product = factor = _factor(gram, first)
    for one in others:
        gram = factor @ gram @ factor
        factor = _factor(gram, one)
        product = factor @ product
    return product


def _factor(gram: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """Return a + b gram + c gram^2 for each matrix."""
    a, b, c = coefficients
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=1, dim2=2).add_(a)
    return factor


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _row_parts(param: Tensor) -> int:
    """Return in how many matrices of equal size the rows of a parameter are divided."""
    return getattr(param, "row_parts", 1)


def _is_tall(matrix: Tensor) -> bool:
    return matrix.size(0) > matrix.size(1)
