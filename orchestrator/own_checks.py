"""Checks of a user's own model before anything is trained: it is built and run.

What would otherwise show late, or never, is refused in one line with the file and the line in it:
shapes, a loss that sees later tokens, random numbers that torch does not know, parameters that no
group has. `own_optimizer` does the same for an optimizer.
"""

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model import models, optim
from model.optim import GROUPS, OptimizerSettings
from model.protocol import (
    Config,
    HasCache,
    HasFlops,
    HasInitWeights,
    HasParameterGroups,
    LanguageModel,
)
from orchestrator.errors import UserError
from orchestrator.own_code import error, failure, is_own, parts
from orchestrator.own_optimizer import refuse_other_parameters

MOST_PARAMETERS = 50_000_000  # of a model that is run here; of a larger one, only shapes are known
LONGEST = 2048  # tokens of a context that is run here


def check(
    model_kind: str,
    config: Config,
    optim_kind: str,
    settings: OptimizerSettings,
    activation_checkpointing: bool = False,
) -> None:
    """Check a model and an optimizer as far as they are a user's.

    Args:
        model_kind: Value of `model.kind`.
        config: Settings of the model.
        optim_kind: Value of `optim.kind`.
        settings: Settings of the optimizer.
        activation_checkpointing: Whether the model must have blocks.

    Raises:
        UserError: One line with the file and the line in it.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        if is_own(model_kind):
            model = _CheckedModel(model_kind, config).model
        else:
            model = models.empty_model(model_kind, config)
        try:
            optim.parameter_groups(optim_kind, model, settings)
            if activation_checkpointing:
                models.checkpoint_activations(model)
        except ValueError as problem:  # no groups for muon, or no blocks
            raise UserError(str(problem)) from None
        if is_own(optim_kind):
            try:
                optimizer = optim.build(optim_kind, model, settings)
            except Exception:
                if next(model.parameters()).is_meta:  # some optimizers need values
                    return
                raise
            refuse_other_parameters(optim_kind, model, optimizer)


class _CheckedModel:
    """A user's model that was built and run; see `check`."""

    def __init__(self, kind: str, config: Config) -> None:
        self.kind = kind
        self.name = parts(kind)["name"]
        with self._running("__init__"):
            self.model = models.empty_model(kind, config)  # also the estimates do this
            is_small = sum(p.numel() for p in self.model.parameters()) <= MOST_PARAMETERS
        if is_small:
            with self._running("init_weights"):
                self.model = _built(kind, config)
                again = _built(kind, config)
        self._check_parameters()
        self._check_groups()
        if is_small:
            pairs = zip(self.model.parameters(), again.parameters(), strict=True)
            if not all(torch.equal(one, other) for one, other in pairs):
                raise self._refusal(
                    "the first weights differ with the same seed of torch: use only torch's global "
                    "generator",
                    self._first_weights(),
                )
            self._check_restored(models.empty_model(kind, config, "cpu"))
            self._check_forward(config)

    def _first_weights(self) -> str:
        """Return the method that sets the first weights."""
        return "init_weights" if isinstance(self.model, HasInitWeights) else "__init__"

    def _check_restored(self, restored: LanguageModel) -> None:
        """Check that a model without values becomes the same by loading the state dict."""
        state = self.model.state_dict()
        try:
            restored.load_state_dict(state)
        except RuntimeError as problem:
            words = " ".join(str(problem).split())
            raise self._refusal(
                f"its weights do not fit a new one: {words[:300]}", self._first_weights()
            ) from None
        others = dict(restored.named_buffers())
        for name, buffer in self.model.named_buffers():
            if name not in state and not _same(buffer, others.get(name)):
                raise self._refusal(
                    f"the buffer {name} is not in the state dict, so a checkpoint does not have "
                    "it: compute it in __init__ from the config alone",
                    self._first_weights(),
                )

    def _refusal(self, problem: str, method: str) -> UserError:
        return error("model", self.kind, f"{self.name}: {problem}", self.name, method)

    @contextlib.contextmanager
    def _running(self, method: str) -> Iterator[None]:
        try:
            yield
        except (UserError, MemoryError):
            raise
        except (Exception, SystemExit) as problem:
            raise failure("model", self.kind, problem, self.name, method) from None

    def _check_parameters(self) -> None:
        found = dict(self.model.named_parameters())
        if not any(parameter.requires_grad for parameter in found.values()):
            raise self._refusal("has no parameter to train", "__init__")
        for name, parameter in found.items():
            if parameter.dtype != torch.float32:
                raise self._refusal(
                    f"parameter {name} is {parameter.dtype}, not torch.float32; train.dtype sets "
                    "the type of products",
                    "__init__",
                )
            if not parameter.is_contiguous():
                raise self._refusal(
                    f"parameter {name} is not contiguous; make it of tensor.contiguous()",
                    "__init__",
                )

    def _check_groups(self) -> None:
        if not isinstance(self.model, HasParameterGroups):
            return
        with self._running("parameter_groups"):
            groups = {group: list(names) for group, names in self.model.parameter_groups().items()}
        parameters = dict(self.model.named_parameters())
        counts = Counter(name for names in groups.values() for name in names)
        problems = [
            *(
                f"has the group {group!r}; the groups are {GROUPS}"
                for group in {*groups} - {*GROUPS}
            ),
            *(f"misses {name}" for name in parameters if name not in counts),
            *(f"has {name!r}, which is no parameter" for name in counts if name not in parameters),
            *(f"has {name} {count} times" for name, count in counts.items() if count > 1),
            *(
                f"has {name} in matrix, which has {parameters[name].dim()} dimensions and not 2"
                for name in groups.get("matrix", [])
                if name in parameters and parameters[name].dim() != 2
            ),
        ]
        if problems:
            raise self._refusal(f"parameter_groups {problems[0]}", "parameter_groups")

    def _check_forward(self, config: Config) -> None:
        length = min(config.block_size, 16)
        generator = torch.Generator().manual_seed(0)
        shape = (2, min(config.block_size, LONGEST) + 1)
        stream = torch.randint(config.vocab_size, shape, generator=generator)
        whole = stream[:1, :-1].contiguous(), stream[:1, 1:].contiguous()
        stream = stream[:, : length + 1]
        tokens, targets = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
        self._check_loss(tokens, targets)
        self.model.eval()
        with torch.no_grad():
            self._output((2, 1, config.vocab_size), tokens)
            self._check_reductions(tokens, targets)
            self._output((1,), *whole, reduction="window")
            self._check_causality(tokens, targets, config.vocab_size)
            # Weights that begin as zeros would hide what they multiply.
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
            self._check_causality(tokens, targets, config.vocab_size)
            if isinstance(self.model, HasCache) and length > 1:
                self._check_cache(tokens)
        if isinstance(self.model, HasFlops):
            with self._running("flops_per_token"):
                flops = self.model.flops_per_token(config.block_size)
            if not isinstance(flops, int) or flops <= 0:
                raise self._refusal(f"flops_per_token is {flops!r}, not an integer above 0", "")

    def _output(self, shape: tuple[int, ...], *inputs: Any, **how: Any) -> Tensor:
        """Return the result of `forward`, which must be finite and have this shape."""
        with self._running("forward"):
            found = self.model(*inputs, **how)
        words = f"forward(tokens{', targets' * (len(inputs) - 1)}"
        words += "".join(f", {name}={value!r}" for name, value in how.items() if name != "cache")
        if not isinstance(found, Tensor) or found.shape != shape:
            has = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise self._refusal(f"{words}) returns {has}, expected {shape}", "forward")
        if not found.isfinite().all():
            raise self._refusal(f"{words}) is not finite for the first weights", "forward")
        return found

    def _check_loss(self, tokens: Tensor, targets: Tensor) -> None:
        """Compute the loss twice as in training, and its gradient."""
        losses = []
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        for _ in range(2):
            torch.manual_seed(1)
            losses.append(self._output((), tokens, targets))
        for name, buffer in self.model.named_buffers():
            if name not in buffers or not torch.equal(buffer, buffers[name]):
                raise self._refusal(
                    f"a forward pass changes the buffer {name}, so the bits would depend on the "
                    "number of workers",
                    "forward",
                )
        if losses[0].dtype != torch.float32:
            raise self._refusal(f"the loss is {losses[0].dtype}, not torch.float32", "forward")
        if not torch.equal(*losses):
            raise self._refusal(
                "two losses of the same tokens differ: use no random numbers but torch's, and keep "
                "nothing from one call to the next",
                "forward",
            )
        if not losses[0].requires_grad:
            raise self._refusal("the loss has no gradient", "forward")
        with self._running("forward"):
            losses[0].backward()

    def _check_reductions(self, tokens: Tensor, targets: Tensor) -> None:
        """Compare the three reductions, with targets that are left out."""
        some = targets.clone()
        some[0, ::2] = -1
        count = (some >= 0).sum()
        windows = self._output((2,), tokens, some, reduction="window")
        total = self._output((), tokens, some, reduction="sum")
        mean = self._output((), tokens, some)
        for name, found in (("window", windows.sum()), ("mean", mean * count)):
            if not torch.allclose(found.double(), total.double(), rtol=1e-3):
                raise self._refusal(
                    f"reduction={name!r} gives {found:.6g} nats for {count} targets, "
                    f"reduction='sum' {total:.6g}; targets of -1 do not count",
                    "forward",
                )

    def _check_causality(self, tokens: Tensor, targets: Tensor, vocab_size: int) -> None:
        """Check that the losses of the first half do not depend on the tokens of the second."""
        half = tokens.size(1) // 2
        if half == 0 or vocab_size == 1:
            return
        first = targets.clone()
        first[:, half:] = -1
        others = tokens.clone()
        others[:, half:] = (others[:, half:] + 1) % vocab_size
        with self._running("forward"):
            before, after = (
                self.model(inputs, first, reduction="window").sum() for inputs in (tokens, others)
            )
        if before.isfinite() and not torch.allclose(before, after, rtol=1e-5):
            raise self._refusal(
                f"the loss of a position depends on later tokens ({before:.6g} becomes {after:.6g} "
                f"if the tokens from position {half} on change)",
                "forward",
            )

    def _check_cache(self, tokens: Tensor) -> None:
        assert isinstance(self.model, HasCache)
        with self._running("new_cache"):
            cache = self.model.new_cache(tokens.size(1))
            logits = self.model(tokens)
            self.model(tokens[:, :-1], cache=cache)
            found = self.model(tokens[:, -1:], cache=cache)
        if not torch.allclose(found.float(), logits.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
            raise self._refusal("the logits with a cache are others than without", "new_cache")


def _built(kind: str, config: Config) -> LanguageModel:
    torch.manual_seed(0)
    return models.new_model(kind, config, 0)


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(one, other)
