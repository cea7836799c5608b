"""YAML as people expect it: the safe subset, without YAML 1.1's traps. Text in, plain values out, and back."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

from orchestrator.errors import UserError

MAX_CHARACTERS = 1 << 20  # an experiment has thousands; PyYAML takes a second for every 100,000
MAX_DIGITS = (
    40  # of a whole number: text of a million is a number that Python then refuses to print
)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its traps: a key given twice is an error, `6e-4` is a number, 010 is not 8, 1:30 is not 90.

    An alias (`*name`) is refused: no experiment needs one, and ten lines of them make more values than memory holds.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        seen = set()
        for key in filter(lambda key: isinstance(key, Hashable), keys):  # others are refused below
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key}' is given twice", node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} digits", node.start_mark
            )
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that `_Loader` would read as numbers: a run may be called 1e5."""


def _plain_numbers(cls: type) -> None:
    """Base 60 and octal leave the rules for integers and floats; exponents without a point or a sign come in."""
    cls.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if not tag.endswith((":int", ":float"))]
        for first, rules in cls.yaml_implicit_resolvers.items()
    }
    whole = r"[-+]?(0|[1-9][\d_]*|0x[\da-fA-F][\da-fA-F_]*)"
    broken = r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
    cls.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(f"^({whole})$"), list("-+0123456789")
    )
    cls.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"^({broken})$"), list("-+.0123456789")
    )


_plain_numbers(_Loader)
_plain_numbers(_Dumper)


def read_yaml(text: str, where: str) -> Any:
    """Parse YAML as experiments and overrides use it; `where` opens the message of a `UserError`."""
    if len(text) > MAX_CHARACTERS:
        raise UserError(
            f"{where}: {len(text):,} characters are no experiment; {MAX_CHARACTERS:,} are the most"
        )
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{where}{place}: not YAML: {problem}") from None
    except (ValueError, RecursionError) as error:  # a day 2024-99-99; ten thousand brackets
        raise UserError(f"{where}: not YAML: {error}") from None


def write_yaml(tree: Any) -> str:
    """Text that `read_yaml` reads back as an equal tree."""
    # Beyond ASCII as escapes: PyYAML writes some line breaks of Unicode that it then reads as spaces.
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=False)
