"""Exit statuses of all commands; arguments and `--help` of those that take an experiment."""

import contextlib
import gc
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from model import models
from orchestrator import own_files
from orchestrator.config.experiment import Experiment, field_docs, load_experiment
from orchestrator.config.fields import Docs
from orchestrator.config.load import kind_of_model
from orchestrator.config.only_for import useless
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
from orchestrator.paths import local_path
from orchestrator.runs import signals
from pipelines import streams
from pipelines.options import TRUST, TRUST_HELP

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"
MOST_PROFILED = 100  # steps: their events are in memory until the last one


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Call `main(argv)` and exit with its status.

    These errors are printed without a traceback: a user error or a full disk (status 2), a file
    that cannot be read at the moment, a run that another process writes to, or SIGTERM, SIGHUP or
    SIGQUIT (75), Ctrl-C (130), and a folder that was moved (1). See `orchestrator.errors`. If Ray
    has died, the command may start again.
    """
    streams.secure()
    try:
        signals.begin()
        _trust_copies()
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


def parse_first(
    name: str, parse: Callable[[], Namespace], check: Callable[[Namespace], object]
) -> None:
    """Let a command answer --help and refuse wrong arguments before it imports torch.

    Args:
        name: `__name__` of the command; if it is imported, nothing is done.
        parse: Parses `sys.argv`.
        check: Raises UserError if an argument is wrong. May import what --help does not need.
    """
    if name == "__main__":
        try:
            args = parse()
            _trust_copies()
            check(args)
        except UserError as error:
            sys.exit(_print_error(f"error: {error}", EXIT_USER))


def require_model(args: Namespace) -> None:
    """Raise UserError if the argument `model` is neither a checkpoint nor a run that has one."""
    from orchestrator.train import find

    find.require(args.model, find.is_model)


def _trust_copies() -> None:
    if TRUST in sys.argv[1:]:
        own_files.trust_copies()


def _print_error(message: str, status: int) -> int:
    sys.stdout.flush()  # stdout and stderr may be one file, where the error should come last
    print(message, file=sys.stderr)
    return status


# ---- commands that take an experiment ----


def experiment_command(
    doc: str,
    run: Callable[..., int],
    *,
    dry_run: Callable[[Any], int],
    load: Callable[[Path, list[str]], Any] = load_experiment,
    docs: Callable[[str], Docs] = field_docs,
    default: Path = DEFAULT,
    profiles: bool = False,
) -> NoReturn:
    """Run a command `[EXPERIMENT.yaml] [section.field=value …] [--dry-run]` and exit.

    Args:
        doc: Description for `--help`.
        run: Runs the command with the result of `load`; returns the exit status.
        dry_run: Prints estimates instead.
        load: Reads a file and applies overrides.
        docs: Describes the fields for `--help`, with those of one kind of model.
        default: The experiment file if none is given.
        profiles: The command has the option `--profile`, whose value `run` gets.
    """

    def main(argv: list[str]) -> int:
        if "-h" in argv or "--help" in argv:
            words = [word for word in argv if not word.startswith("-")]
            kind = models.DEFAULT
            with contextlib.suppress(UserError):  # a mistake in the other words
                kind = kind_of_model(*split_words(words, default))
            print(help_text(doc, docs(kind), default, profiles))
            return EXIT_DONE
        argv, profile = _take_profile(argv) if profiles else (argv, {})
        for argument in argv:
            if argument.startswith("-") and argument not in ("--dry-run", TRUST):
                raise UserError(f"{argument}: no such option; --help lists all options")
        words = [argument for argument in argv if not argument.startswith("-")]
        experiment = load(*split_words(words, default))
        _note_useless_fields(getattr(experiment, "experiments", [experiment]))
        if "--dry-run" in argv:
            return dry_run(experiment)
        return run(experiment, **profile)

    run_command(main)


def _note_useless_fields(experiments: list[Experiment]) -> None:
    """Print a line for each field that was given and has no effect in any of the experiments."""
    docs = field_docs(experiments[0].model.kind)
    flats = [experiment.flat() for experiment in experiments]
    reasons = [useless(flat, docs) for flat in flats]
    for key, doc in docs.items():
        given = [i for i, flat in enumerate(flats) if flat[key] != doc.default]
        if given and all(key in reasons[i] for i in given):
            first = given[0]
            line = f"note: {key}: {flats[first][key]} has no effect with {reasons[first][key]}"
            print(line, file=sys.stderr, flush=True)


def _take_profile(argv: list[str]) -> tuple[list[str], dict[str, int]]:
    """Take `--profile N` out of the arguments."""
    words: list[str] = []
    for word in argv:
        words += ["--profile", word[10:]] if word.startswith("--profile=") else [word]
    if "--profile" not in words:
        return argv, {}
    place = words.index("--profile")
    text = "".join(words[place + 1 : place + 2])
    if not text.isdecimal() or not 1 <= int(text) <= MOST_PROFILED or "--dry-run" in words:
        raise UserError(
            f"--profile {text}: give the number of steps to profile, 1 to {MOST_PROFILED}, of a run"
        )
    return [*words[:place], *words[place + 2 :]], {"profile": int(text)}


def split_words(words: Sequence[str], default: Path = DEFAULT) -> tuple[Path, list[str]]:
    """Separate the path of the experiment from the overrides.

    Raises:
        UserError: There is more than one path, or it is an address.
    """
    overrides = [word for word in words if "=" in word and not _is_path(word)]
    files = [word for word in words if word not in overrides]
    if len(files) > 1:
        raise UserError(
            f"'{files[1]}': give one experiment at a time; an override is section.field=value"
        )
    path = local_path("EXPERIMENT.yaml", files[0]) if files else default
    return path, overrides


def _is_path(word: str) -> bool:
    """Return whether a word with a `=` is a path: fields have no `/` in their names."""
    return "/" in word.partition("=")[0]


def help_text(doc: str, docs: Docs, default: Path = DEFAULT, profiles: bool = False) -> str:
    """Return the description of a command and of every field: type, default and meaning."""
    lines = [
        f"usage: {Path(sys.argv[0]).name} [EXPERIMENT.yaml] [section.field=value …] [--dry-run] "
        f"[{TRUST}]",
        "",
        doc.strip(),
        "",
        f"  EXPERIMENT.yaml      file with values of fields (default: configs/{default.name})",
        "  section.field=value  another value for one field",
        "  --dry-run            print estimates of size, time, memory and disk; write nothing",
        *(["  --profile N          record N steps: a trace, and their largest costs"] * profiles),
        f"  {TRUST}         {TRUST_HELP}",
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
