"""Arguments, `--help` and exit statuses of all commands."""

import argparse
import contextlib
import gc
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from model import models
from orchestrator.config.experiment import field_docs, load_experiment
from orchestrator.config.fields import Docs
from orchestrator.config.load import kind_of_model
from orchestrator.errors import (
    EXIT_AGAIN,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER,
    NOT_WRITABLE,
    HeldError,
    RayDiedError,
    UnreadableError,
    UserError,
)
from orchestrator.folders import MovedError
from orchestrator.runs import signals
from pipelines import streams

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
DTYPES = ("float32", "bfloat16", "float16")


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Call `main(argv)` and exit with its status.

    These errors are printed without a traceback: a user error or a full disk (status 2), a file
    that cannot be read at the moment, a run that another process writes to, or SIGTERM, SIGHUP or
    SIGQUIT (75), Ctrl-C (130), and a folder that was moved (1). See `orchestrator.errors`. If Ray
    has died, the command may start again.
    """
    streams.secure()
    signals.begin()
    try:
        status = main(sys.argv[1:])
    except UnreadableError as error:
        status = _print_error(f"error: {error}", EXIT_AGAIN)
    except UserError as error:
        status = _print_error(f"error: {error}", EXIT_USER)
    except HeldError as error:
        status = _print_error(f"{error}; run this command again when it has ended", EXIT_AGAIN)
    except KeyboardInterrupt:
        if signals.was_stopped():
            status = _print_error("terminated; run the same command again", EXIT_AGAIN)
        else:
            status = _print_error("interrupted", EXIT_INTERRUPTED)
    except MovedError as error:
        status = _print_error(f"error: {error}", EXIT_FAILED)
    except RayDiedError as error:
        from orchestrator.jobs import restart

        restart.end_or_start_again(error)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        what, advice = NOT_WRITABLE[error.errno]
        message = f"error: {what} ({error}). {advice} and run the same command again"
        status = _print_error(message, EXIT_USER)
    gc.freeze()  # else Python looks for garbage for another second before it exits
    sys.exit(status)


def _print_error(message: str, status: int) -> int:
    sys.stdout.flush()  # stdout and stderr may be one file, where the error should come last
    print(message, file=sys.stderr)
    return status


# ---- commands that take an experiment ----


def experiment_command(
    doc: str,
    run: Callable[[Any], int],
    *,
    dry_run: Callable[[Any], int],
    load: Callable[[Path, list[str]], Any] = load_experiment,
    docs: Callable[[str], Docs] = field_docs,
    default: Path = DEFAULT,
) -> NoReturn:
    """Run a command `[EXPERIMENT.yaml] [section.field=value …] [--dry-run]` and exit.

    Args:
        doc: Description for `--help`.
        run: Runs the command with the result of `load`; returns the exit status.
        dry_run: Prints estimates instead.
        load: Reads a file and applies overrides.
        docs: Describes the fields for `--help`, with those of one kind of model.
        default: The experiment file if none is given.
    """

    def main(argv: list[str]) -> int:
        if "-h" in argv or "--help" in argv:
            words = [word for word in argv if not word.startswith("-")]
            kind = models.DEFAULT
            with contextlib.suppress(UserError):  # a mistake in the other words
                kind = kind_of_model(*split_words(words, default))
            print(help_text(doc, docs(kind), default))
            return EXIT_DONE
        for argument in argv:
            if argument.startswith("-") and argument != "--dry-run":
                raise UserError(f"{argument}: no such option; --help lists all options")
        words = [argument for argument in argv if argument != "--dry-run"]
        experiment = load(*split_words(words, default))
        if "--dry-run" in argv:
            return dry_run(experiment)
        return run(experiment)

    run_command(main)


def split_words(words: Sequence[str], default: Path = DEFAULT) -> tuple[Path, list[str]]:
    """Separate the path of the experiment from the overrides.

    Raises:
        UserError: There is more than one path.
    """
    overrides = [word for word in words if "=" in word and not _is_path(word)]
    files = [word for word in words if word not in overrides]
    if len(files) > 1:
        raise UserError(
            f"'{files[1]}': give one experiment at a time; an override is section.field=value"
        )
    path = Path(files[0]) if files else default
    return path, overrides


def _is_path(word: str) -> bool:
    """Return whether a word with a `=` is a path: fields have no `/` in their names."""
    return "/" in word.partition("=")[0]


def help_text(doc: str, docs: Docs, default: Path = DEFAULT) -> str:
    """Return the description of a command and of every field: type, default and meaning."""
    lines = [
        f"usage: {Path(sys.argv[0]).name} [EXPERIMENT.yaml] [section.field=value …] [--dry-run]",
        "",
        doc.strip(),
        "",
        f"  EXPERIMENT.yaml      file with values of fields (default: configs/{default.name})",
        "  section.field=value  another value for one field",
        "  --dry-run            print estimates of size, time, memory and disk; write nothing",
        "",
        "fields (type; default):",
    ]
    for key, field in docs.items():
        lines.append(f"  {key}  ({field.type}; {field.shown_default})")
        lines += _indented(field.description, 6)
        for choice, text in field.choices.items():
            lines += _indented(f"{choice}: {text}", 8)
    return "\n".join(lines)


def _indented(text: str, width: int) -> list[str]:
    indent = " " * width
    return textwrap.wrap(
        text, 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


# ---- commands with other options ----


class Options(argparse.ArgumentParser):
    """An argparse parser whose errors are `UserError`: one line and status 2."""

    def __init__(self, doc: str, epilog: str | None = None) -> None:
        super().__init__(
            description=doc.strip(),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

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

    def add_best(self) -> None:
        """Add `--best`."""
        self.add_argument(
            "--best",
            action="store_true",
            help="use the checkpoint of the run with the lowest val loss, not the latest",
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
