"""Options of the commands that do not take an experiment."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from orchestrator.errors import UserError

TRUST = "--trust-code"
TRUST_HELP = "run a model or optimizer of others, which you have not run yet"
DTYPES = ("float32", "bfloat16", "float16")


class Options(argparse.ArgumentParser):
    """An argparse parser whose errors are `UserError`: one line and status 2."""

    def __init__(self, doc: str, epilog: str | None = None) -> None:
        super().__init__(
            description=doc.strip(),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(TRUST, action="store_true", help=TRUST_HELP)

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; --help lists all options")

    def add_number(self, name: str, metavar: str, least: float, default: Any, text: str) -> None:
        """Add an option for a number of at least `least`; an integer if `least` is an integer.

        `--help` shows the default unless it is None.
        """
        if default is not None:
            text = f"{text} (default: {default:g})"
        self.add_argument(name, metavar=metavar, type=at_least(least), default=default, help=text)

    def add_model(self) -> None:
        """Add the argument `model`: a run or a checkpoint."""
        self.add_argument(
            "model",
            metavar="RUN_OR_CHECKPOINT",
            help="name or folder of a run (its latest valid checkpoint is used), or of a "
            "checkpoint; also s3://… in a mirror",
        )

    def add_best(self) -> None:
        """Add `--best`."""
        self.add_argument(
            "--best",
            action="store_true",
            help="use the checkpoint of the run with the lowest val loss, not the latest",
        )

    def add_ema(self) -> None:
        """Add `--ema`."""
        self.add_argument(
            "--ema",
            action="store_true",
            help="use the moving average of the weights (train.ema), not the weights",
        )

    def add_device(self) -> None:
        """Add `--device`."""
        self.add_argument(
            "--device",
            default="auto",
            help="cpu, cuda:1 … or auto, the first GPU if there is one (default: auto)",
        )

    def add_dtype(self, default: str) -> None:
        """Add `--dtype`; `default` describes its default."""
        self.add_argument(
            "--dtype", choices=DTYPES, help=f"type of matrix products (default: {default})"
        )


def at_least(least: float) -> Callable[[str], float]:
    """Return a `type=` for argparse: a finite number of at least `least`.

    The number must be an integer if `least` is an integer.
    """
    is_int = isinstance(least, int)
    kind = "a whole number" if is_int else "a number"
    limit = 2**53 if is_int else math.inf

    def parse(text: str) -> float:
        try:
            value = int(text) if is_int else float(text)
        except ValueError:
            value = math.nan
        if not least <= value < limit:
            raise argparse.ArgumentTypeError(f"'{text}' is not {kind} of at least {least}")
        return value

    return parse
