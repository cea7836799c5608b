#!/usr/bin/env python3
"""Generate text with a trained GPT: continue a prompt with a checkpoint of a run.

Sample number i has the seed `--seed` + i - 1, so more samples do not change the first ones.

  pipelines/sample.py quickstart --prompt 'def ' --max-new-tokens 300
  pipelines/sample.py runs/quickstart/checkpoints/step-00001000 --temperature 0
"""

from pipelines import starting

starting.end_on_ctrl_c(__name__)

from argparse import Namespace
from pathlib import Path

from pipelines.common import parse_first, require_model, run_command
from pipelines.options import Options


def options() -> Options:
    """Return the parser of the command's arguments."""
    parser = Options(__doc__)
    parser.add_argument(
        "model",
        metavar="RUN_OR_CHECKPOINT",
        help="name or folder of a run (its latest valid checkpoint is used), folder of a "
        "checkpoint, either as s3://… in a mirror, Hugging Face folder of a GPT-2, or gpt2, "
        "gpt2-medium …",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt",
        metavar="TEXT",
        help="text to continue (default: the end-of-text token if the run was trained with "
        "data.append_eot, else a line break)",
    )
    prompt.add_argument(
        "--prompt-file", metavar="FILE", type=Path, help="UTF-8 file with the text to continue"
    )
    parser.add_number("--max-new-tokens", "N", 1, 200, "tokens to generate")
    parser.add_number("--num-samples", "N", 1, 1, "number of continuations")
    parser.add_number(
        "--temperature",
        "X",
        0.0,
        0.8,
        "below 1: draw probable tokens more often; above 1: less often; 0: always take the most "
        "probable token",
    )
    parser.add_number("--top-k", "K", 1, 200, "draw only from the K most probable tokens")
    parser.add_number("--seed", "N", 0, 1337, "seed of the first sample")
    parser.add_best()
    parser.add_ema()
    parser.add_device()
    parser.add_dtype("float32 on a CPU, else that of the run")
    return parser


def check(args: Namespace) -> None:
    """Raise UserError if the argument `model` is no model."""
    from orchestrator.train import find

    if not find.is_gpt2(args.model):
        require_model(args)


parse_first(__name__, options().parse_args, check)

import torch

from model.generate import generate
from orchestrator.errors import EXIT_DONE, UserError
from orchestrator.train.find import find_checkpoint, is_gpt2
from orchestrator.train.numerics import autocast
from orchestrator.train.trained import Trained, find_device, open_checkpoint, open_gpt2


def main(argv: list[str]) -> int:
    """Print the samples."""
    args = options().parse_args(argv)
    trained = open_model(args)
    prompt = prompt_ids(trained, args)
    print(title(trained, args))
    for i in range(args.num_samples):
        drawn = draw(trained, prompt, args, args.seed + i)
        print(f"\n──── sample {i + 1} of {args.num_samples} (seed {args.seed + i}) ────")
        print(trained.tokenizer.decode(drawn[0].tolist()), flush=True)
    return EXIT_DONE


def draw(trained: Trained, prompt: torch.Tensor, args: Namespace, seed: int) -> torch.Tensor:
    """Continue the prompt: (1, T) -> (1, T + N)."""
    try:
        with autocast(trained.experiment, trained.device):
            return generate(
                trained.model,
                prompt,
                args.max_new_tokens,
                temperature=args.temperature,
                top_k=args.top_k,
                seed=seed,
                n_vocab=trained.tokenizer.n_vocab,
            )
    except ValueError as error:  # the model diverged
        raise UserError(f"{trained.checkpoint or args.model}: {error}") from None


def open_model(args: Namespace) -> Trained:
    """Load the model that RUN_OR_CHECKPOINT names."""
    device = find_device(args.device)
    dtype = args.dtype
    if dtype is None and device == "cpu":
        dtype = "float32"
    if is_gpt2(args.model) and not (args.best or args.ema):
        return open_gpt2(args.model, device, dtype or "bfloat16")
    overrides = [f"train.dtype={dtype}"] if dtype else []
    path = find_checkpoint(args.model, best=args.best)
    return open_checkpoint(path, device, overrides, ema=args.ema)


def title(trained: Trained, args: Namespace) -> str:
    """Return a line that names the checkpoint and the settings."""
    step = f", step {trained.manifest['step']:,}" if trained.manifest else ""
    if trained.is_ema:
        step += ", averaged weights"
    method = f"temperature {args.temperature}, top-k {args.top_k}"
    if args.temperature == 0:
        method = "always the most probable token"
    return f"{trained.checkpoint or args.model}{step}: {args.max_new_tokens} new tokens, {method}"


def prompt_ids(trained: Trained, args: Namespace) -> torch.Tensor:
    """Return the prompt as (1, T) int64 on the device of the model."""
    text = args.prompt
    if args.prompt_file:
        text = _read_prompt(args.prompt_file)
    if text is None:
        ids = default_prompt(trained)
    else:
        _check_prompt(text)
        ids = [int(i) for i in trained.tokenizer.encode(text)]
    return torch.tensor(ids, dtype=torch.int64, device=trained.device)[None]  # (1, T)


def _read_prompt(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file: {file} cannot be read as UTF-8 text ({error})") from None


def _check_prompt(text: str) -> None:
    if text == "":
        raise UserError("--prompt: is empty; leave it out to start a new text")
    # Python decodes bytes of an argument that are not UTF-8 to surrogates.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError("--prompt: is not UTF-8; use a UTF-8 file and --prompt-file")


def default_prompt(trained: Trained) -> list[int]:
    """Return the end-of-text token if the model was trained with it, else a line break.

    If the vocabulary has no line break, return its first id.
    """
    eot_id = trained.tokenizer.eot_id
    if trained.experiment.data.append_eot and eot_id is not None:
        return [eot_id]
    try:
        return [int(i) for i in trained.tokenizer.encode("\n")]
    except ValueError:
        return [0]


if __name__ == "__main__":
    run_command(main)
