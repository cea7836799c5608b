"""What every command shares: its arguments, its help, and how it ends (see `orchestrator.errors` for the statuses)."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.config.experiment import field_docs, load_experiment
from orchestrator.config.fields import Docs
from orchestrator.errors import (
    EXIT_AGAIN,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER,
    NO_ROOM,
    HeldError,
    UserError,
)
from orchestrator.runs.signals import Terminated

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def guarded(main: Callable[[list[str]], int]) -> None:
    """Run `main(argv)` and exit: a user's mistake is one line (or one per mistake) and status 2, as is a full disk; a
    run that somebody else writes to or SIGTERM 75, Ctrl-C 130."""
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_USER
    except HeldError as error:
        print(f"{error}; run this again when it has ended", file=sys.stderr)
        status = EXIT_AGAIN
    except Terminated:
        print("terminated before it began; run the same command again", file=sys.stderr)
        status = EXIT_AGAIN
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = EXIT_INTERRUPTED
    except BrokenPipeError:  # `… --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_FAILED
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(f"error: no room ({error}); free some there and run this again", file=sys.stderr)
        status = EXIT_USER
    sys.stdout.flush()
    sys.exit(status)


class Options(argparse.ArgumentParser):
    """argparse for commands with options of their own; a wrong one is a `UserError`, one line and status 2."""

    def __init__(self, doc: str, **settings):
        super().__init__(
            description=doc.strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


def at_least(least: int | float) -> Callable[[str], int | float]:
    """For `type=` of an option: a finite number like `least` (whole where that is), and not below it."""
    kind, limit = ("a whole number", 2**53) if isinstance(least, int) else ("a number", math.inf)

    def parse(text: str) -> int | float:
        try:
            value = type(least)(text)
        except ValueError:
            value = math.nan
        if not least <= value < limit:
            raise argparse.ArgumentTypeError(f"'{text}' is not {kind} of at least {least}")
        return value

    return parse


def experiment_command(
    doc: str,
    run: Callable[[Any], int],
    *,
    dry_run: Callable[[Any], int] | None = None,
    load: Callable[[Path, list[str]], Any] = load_experiment,
    docs: Callable[[], Docs] = field_docs,
    default: Path = DEFAULT,
) -> None:
    """`[EXPERIMENT.yaml] [section.field=value …] [--dry-run]`, without a file `default`.

    `load` makes what `run` and `dry_run` take out of the path and the words; `docs` gives the fields that `--help` lists.
    """

    def main(argv: list[str]) -> int:
        if {"-h", "--help"} & set(argv):
            print(help_text(doc, dry_run is not None, docs()))
            return 0
        flags = {a for a in argv if a.startswith("-")}
        unknown = flags - ({"--dry-run"} if dry_run else set())
        if unknown:
            raise UserError(f"{sorted(unknown)[0]}: no such option; --help lists what there is")
        words = [a for a in argv if a not in flags]
        experiment = load(*split_words(words, default))
        return dry_run(experiment) if "--dry-run" in flags else run(experiment)

    guarded(main)


def split_words(words: list[str], default: Path = DEFAULT) -> tuple[Path, list[str]]:
    """The experiment's path, in front, and the overrides."""
    files = [w for w in words if "=" not in w]
    if len(files) > 1:
        raise UserError(
            f"'{files[1]}': one experiment at a time; overrides are section.field=value"
        )
    return Path(files[0]) if files else default, [w for w in words if "=" in w]


def help_text(doc: str, dry: bool, docs: Docs | None = None) -> str:
    """The command's description and every field (of `docs`, else of an experiment) with its type and default."""
    lines = [
        doc.strip(),
        "",
        "usage: [EXPERIMENT.yaml] [section.field=value …]" + (" [--dry-run]" if dry else ""),
        "",
        "fields (type; default):",
    ]
    for key, field in (docs or field_docs()).items():
        lines += [f"  {key}  ({field.type}; {field.shown_default})", f"      {field.description}"]
        lines += [f"        {choice}: {text}" for choice, text in field.choices.items()]
    return "\n".join(lines)
