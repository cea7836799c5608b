"""A plain loop of another hand gives the same losses, gradient norms and weights.

Tests that compare the product with itself (resumed with whole, two workers with one) cannot see a
mistake that both have. The loop below shares no code with the product: it is written from the
stated rules for the order of samples, dropout, the sum of gradients, clipping and the schedule, on
torch's modules and optimizer. Its arithmetic is the same, operation by operation, so float32 and
bfloat16 must give the same bits.

`transformers` computes the same model with other kernels, and that test uses AdamW without its
fused kernel. So it differs by rounding: 2e-7 of the loss was measured, and 9e-6 in the weights,
because AdamW divides by the root of the second moment, which is small for some weights. The
tolerances are ten times that.
"""

import contextlib
import hashlib
import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from orchestrator.config.experiment import load_experiment
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train

STEPS, WARMUP, PEAK, FLOOR = 12, 3, 1e-2, 0.2
BETAS, DECAY, MAX_NORM, SEED = (0.85, 0.97), 0.3, 0.4, 7
T, B, M, LAYERS, HEADS, WIDTH, DROPOUT = 16, 2, 4, 2, 2, 16, 0.1
EVAL_TOKENS = 200
WORDS = [
    "name=small",
    "data.tokenizer=char",
    f"model.n_layer={LAYERS}",
    f"model.n_head={HEADS}",
    f"model.n_embd={WIDTH}",
    f"model.block_size={T}",
    f"model.dropout={DROPOUT}",
    "model.bias=true",
    "model.pad_vocab_to=1",
    f"optim.beta1={BETAS[0]}",
    f"optim.beta2={BETAS[1]}",
    f"optim.weight_decay={DECAY}",
    f"optim.max_grad_norm={MAX_NORM}",
    "schedule.kind=cosine",
    f"schedule.max_lr={PEAK}",
    f"schedule.min_lr_ratio={FLOOR}",
    f"schedule.warmup_steps={WARMUP}",
    f"train.seed={SEED}",
    f"train.micro_batch_size={B}",
    f"train.global_batch_size={B * M}",
    f"train.max_steps={STEPS}",
    "train.log_interval=1",
    f"train.eval_interval={STEPS}",
    f"train.eval_tokens={EVAL_TOKENS}",
]


# ---- the model ----


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(WIDTH, 3 * WIDTH), "c_proj": nn.Linear(WIDTH, WIDTH)}
        )
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)}
        )

    def forward(self, x: Tensor) -> Tensor:
        rate = DROPOUT if self.training else 0.0
        q, k, v = self.attn["c_attn"](self.ln_1(x)).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v)]
        y = F.scaled_dot_product_attention(*heads, dropout_p=rate, is_causal=True)
        y = self.attn["c_proj"](y.transpose(1, 2).flatten(-2))
        x = x + F.dropout(y, rate)
        y = self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))
        return x + F.dropout(y, rate)


class PlainGPT(nn.Module):
    """GPT-2 with a tied head. Weights are drawn after torch's modules have drawn theirs."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, WIDTH)
        self.wpe = nn.Embedding(T, WIDTH)
        self.h = nn.ModuleList(PlainBlock() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * LAYERS))
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.size(1)]
        x = F.dropout(x, DROPOUT if self.training else 0.0)
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)

    def weights(self) -> dict[str, Tensor]:
        return {f"transformer.{name}": p.detach() for name, p in self.named_parameters()}


class HuggingFaceGPT(nn.Module):
    """GPT-2 of transformers with the weights of a `PlainGPT`."""

    def __init__(self, plain: PlainGPT) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            vocab_size=plain.wte.num_embeddings,
            n_positions=T,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            activation_function="gelu",
            resid_pdrop=DROPOUT,
            embd_pdrop=DROPOUT,
            attn_pdrop=DROPOUT,
        )
        self.model = transformers.GPT2LMHeadModel(config)
        self.model.load_state_dict(
            {name: _transposed(name, value) for name, value in plain.weights().items()},
            strict=False,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    def weights(self) -> dict[str, Tensor]:
        own = self.model.named_parameters()
        return {name: _transposed(name, value.detach()) for name, value in own}


def _transposed(name: str, weight: Tensor) -> Tensor:
    """Convert between nn.Linear and the Conv1D of transformers."""
    return weight.T.contiguous() if ".c_" in name and weight.dim() == 2 else weight


# ---- the rules ----


def read_tokens(directory: Path, split: str) -> list[int]:
    """Return the ids of a split that is one shard, with what pads its last row."""
    [file] = directory.glob(f"{split}-*.parquet")
    column = pq.read_table(file)["tokens"]
    return [id_ for row in column for id_ in memoryview(row.as_py()).cast("H")]


def blake64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def window_start(position: int, n_tokens: int) -> int:
    """Return the first token of the window at a position: a Feistel permutation of an epoch."""
    windows = (n_tokens - T) // T
    epoch, number = divmod(position, windows)
    key = blake64(repr((SEED, epoch, "order")))
    half = max(1, ((windows - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = number >> half, number & mask
        for r in range(4):
            mixed = right ^ blake64(repr((key, r, "round")))
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ ((mixed ^ mixed >> 31) & mask)
        number = left << half | right
        if number < windows:
            return number * T + blake64(repr((SEED, epoch, "phase"))) % T


def rate(step: int) -> float:
    if step < WARMUP:
        return PEAK * (step + 1) / (WARMUP + 1)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
    return PEAK * FLOOR + cosine * (PEAK - PEAK * FLOOR)


def tree_sum(terms: list[Tensor]) -> Tensor:
    while len(terms) > 1:
        terms = [left + right for left, right in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


# ---- the loop ----


def plain_loop(model: nn.Module, directory: Path, dtype: str, slots: int, *, fused: bool) -> dict:
    """Train for twelve steps. Return losses, norms, rates, weights and the final val loss."""
    tokens = torch.tensor(read_tokens(directory, "train"))
    n_tokens = token_count(directory, "train")
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() >= 2]
    vectors = [p for p in parameters if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=BETAS,
        fused=fused,
    )
    lower = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else None
    model.train()
    lines = []
    for step in range(STEPS):
        losses = []
        gradients = []
        for m in range(M):
            first = B * (M * step + m)
            starts = [window_start(position, n_tokens) for position in range(first, first + B)]
            batch = torch.stack([tokens[start : start + T + 1] for start in starts])
            torch.manual_seed(blake64(f"{SEED}/{step}/{m}") >> 1)
            with lower or contextlib.nullcontext():
                logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            losses.append(loss.item())
            gradients.append(torch.autograd.grad(loss, parameters))
        for parameter, parts in zip(parameters, zip(*gradients, strict=True), strict=True):
            size = M // slots
            groups = [parts[i * size : (i + 1) * size] for i in range(slots)]
            sums = [sum(group[1:], start=group[0]) for group in groups]
            parameter.grad = tree_sum(sums) / M
        norm = clip(parameters)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        lines.append((math.fsum(losses) / M, norm.item(), rate(step)))
    val = torch.tensor(read_tokens(directory, "val"))[:EVAL_TOKENS]
    with lower or contextlib.nullcontext():
        return {"lines": lines, "val": val_loss(model.eval(), val), "weights": model.weights()}


def clip(parameters: list[nn.Parameter]) -> Tensor:
    """Scale the gradient as `clip_grad_norm_` does; the norm is that of the norms of pieces."""
    padded = [F.pad(p.grad.flatten(), (0, -p.numel() % 128)) for p in parameters]
    pieces = torch.cat(padded).split(16384)
    norms = [torch.linalg.vector_norm(F.pad(piece, (0, 16384 - len(piece)))) for piece in pieces]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for parameter in parameters:
        parameter.grad *= torch.clamp(MAX_NORM / (norm + 1e-6), max=1.0)
    return norm


@torch.no_grad()
def val_loss(model: nn.Module, tokens: Tensor) -> float:
    """Return the mean loss of all tokens but the first, in windows that do not overlap."""
    total = 0.0
    for start in range(0, len(tokens) - 1, T):
        window = tokens[start : start + T + 1]
        logits = model(window[None, :-1]).float()
        total += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
    return total / (len(tokens) - 1)


def token_count(directory: Path, split: str) -> int:
    return json.loads((directory / "manifest.json").read_text())["splits"][split]["tokens"]


# ---- the tests ----


def new_plain(data_dir: Path) -> PlainGPT:
    torch.manual_seed(SEED)
    return PlainGPT(max(read_tokens(data_dir, "train")) + 1)


def ours(folder: RunFolder, data_dir: Path, dtype: str, slots: int) -> dict:
    words = [*WORDS, f"train.dtype={dtype}", f"train.reduction_slots={slots}"]
    train(load_experiment(None, words), folder, data_dir)
    lines = journal.read(folder)
    keys = ("train/loss", "optim/grad_norm", "optim/lr")
    return {
        "lines": [tuple(line[key] for key in keys) for line in lines[1:]],
        "tokens": [line["train/tokens"] for line in lines[1:]],
        "val": lines[-1]["val/loss"],
        "bits_per_byte": lines[-1]["val/bits_per_byte"],
        "weights": load_file(folder.path / "checkpoints/step-00000012/model.safetensors"),
    }


@pytest.mark.parametrize(("dtype", "slots"), [("float32", 1), ("float32", 4), ("bfloat16", 2)])
def test_twelve_steps_have_the_bits_of_a_plain_loop(folder, tiny_dataset, dtype, slots):
    expected = plain_loop(new_plain(tiny_dataset), tiny_dataset, dtype, slots, fused=True)
    got = ours(folder, tiny_dataset, dtype, slots)
    assert got["lines"] == expected["lines"]
    assert all(norm > MAX_NORM for _, norm, _ in got["lines"][:3]), "nothing was clipped"
    assert got["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert torch.equal(got["weights"][name], weight), name
    assert got["tokens"] == [M * B * T * (step + 1) for step in range(STEPS)]
    # Windows of the evaluation come in batches: other shapes, other rounding.
    assert got["val"] == pytest.approx(expected["val"], rel=1e-3 if dtype == "bfloat16" else 1e-6)
    # The corpus is ASCII: a token is a byte.
    assert got["bits_per_byte"] == pytest.approx(got["val"] / math.log(2), rel=1e-12)


def test_twelve_steps_are_those_of_transformers(folder, tiny_dataset):
    model = HuggingFaceGPT(new_plain(tiny_dataset))
    expected = plain_loop(model, tiny_dataset, "float32", 1, fused=False)
    got = ours(folder, tiny_dataset, "float32", 1)
    for line, other in zip(got["lines"], expected["lines"], strict=True):
        assert line == pytest.approx(other, rel=2e-6)
    assert got["val"] == pytest.approx(expected["val"], rel=2e-6)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, atol=1e-4, rtol=0)
