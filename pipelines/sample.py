#!/usr/bin/env python3
"""Let a trained GPT write: the latest checkpoint of a run (or the best, or any) continues a prompt.

Sample number i is drawn with seed + i - 1, so asking for more of them changes none.

  pipelines/sample.py quickstart --prompt 'def ' --max-new-tokens 300
  pipelines/sample.py runs/quickstart/checkpoints/step-00001000 --temperature 0
"""

from pathlib import Path

import torch

from model.generate import generate
from orchestrator.errors import UserError
from orchestrator.train.numerics import autocast
from orchestrator.train.trained import (
    Trained,
    find_checkpoint,
    find_device,
    is_gpt2,
    open_checkpoint,
    open_gpt2,
)
from pipelines.common import Options, at_least, guarded


def options() -> Options:
    parser = Options(__doc__)
    parser.add_argument(
        "model",
        metavar="RUN_OR_CHECKPOINT",
        help=(
            "a run's name or folder, a checkpoint's folder, a Hugging Face folder of a GPT-2, or gpt2, gpt2-medium …"
        ),
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        metavar="TEXT",
        help=("text to go on from (default: a new line, or what begins a document)"),
    )
    prompt.add_argument(
        "--prompt-file",
        metavar="FILE",
        type=Path,
        help="the same from a UTF-8 file, every byte of it",
    )
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=at_least(1), default=200, help="tokens to write (200)"
    )
    parser.add_argument(
        "--num-samples", metavar="N", type=at_least(1), default=1, help="continuations (1)"
    )
    parser.add_argument(
        "--temperature",
        metavar="X",
        type=at_least(0.0),
        default=0.8,
        help=(
            "below 1 bolder in what is likely, above 1 more even, 0 always the likeliest token (0.8)"
        ),
    )
    parser.add_argument(
        "--top-k",
        metavar="K",
        type=at_least(1),
        default=200,
        help=("draw among the K likeliest tokens (200)"),
    )
    parser.add_argument(
        "--seed", metavar="N", type=at_least(0), default=1337, help="of the first sample (1337)"
    )
    parser.add_argument(
        "--best", action="store_true", help="of a run: the checkpoint with the lowest val loss"
    )
    parser.add_argument(
        "--device", default="auto", help="auto (the first GPU if there is one), cpu, cuda:1 …"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help=("of matrix products (default: the run's on a GPU, float32 on a CPU)"),
    )
    return parser


def main(argv: list[str]) -> int:
    args = options().parse_args(argv)
    trained = open_model(args)
    prompt, products = prompt_ids(trained, args), autocast(trained.experiment, trained.device)
    print(title(trained, args))
    for i in range(args.num_samples):
        with products:
            drawn = generate(
                trained.model,
                prompt,
                args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                seed=args.seed + i,
                n_vocab=trained.tokenizer.n_vocab,
            )
        print(f"\n──── sample {i + 1} of {args.num_samples} (seed {args.seed + i}) ────")
        print(trained.tokenizer.decode(drawn[0].tolist()), flush=True)
    return 0


def open_model(args) -> Trained:
    """What RUN_OR_CHECKPOINT means, on its device."""
    device = find_device(args.device)
    dtype = args.dtype or ("float32" if device == "cpu" else None)
    if is_gpt2(args.model) and not args.best:
        return open_gpt2(args.model, device, dtype or "bfloat16")
    found = find_checkpoint(args.model, best=args.best)
    return open_checkpoint(found, device, [f"train.dtype={dtype}"] if dtype else [])


def title(trained: Trained, args) -> str:
    """Who writes, and how."""
    step = f", step {trained.manifest['step']:,}" if trained.manifest else ""
    how = (
        f"temperature {args.temperature}, top-k {args.top_k}"
        if args.temperature
        else "the likeliest each time"
    )
    return f"{trained.checkpoint or args.model}{step}: {args.max_new_tokens} new tokens, {how}"


def prompt_ids(trained: Trained, args) -> torch.Tensor:
    """The prompt as (1, T) int64 on the model's device."""
    text, tokenizer = args.prompt, trained.tokenizer
    if args.prompt_file:
        try:
            text = args.prompt_file.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompt-file: {args.prompt_file} cannot be read as UTF-8 text ({error})"
            ) from None
    if text == "":
        raise UserError("--prompt: it is empty; leave it out to begin anew")
    if text is not None and not text.isprintable() and any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError("--prompt: it is not UTF-8; give bytes like these in a file that is")
    ids = opening(trained) if text is None else [int(i) for i in tokenizer.encode(text)]
    return torch.tensor(ids, dtype=torch.int64, device=trained.device)[None]  # (1, T)


def opening(trained: Trained) -> list[int]:
    """What a text begins after: the end of the document before it where the model knows one, else a new line."""
    if trained.experiment.data.append_eot:
        return [trained.tokenizer.eot_id]
    try:
        return [int(i) for i in trained.tokenizer.encode("\n")]
    except ValueError:  # a corpus of characters without lines
        return [0]


if __name__ == "__main__":
    guarded(main)
