"""Building blocks of the configuration: base class, types of fields, and their description.

`--help`, docs/reference.md and the error messages are made from the result of `describe_fields`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema


def _whole_to_int(value: Any) -> Any:
    """Accept 6e5 where an integer is needed. Other floats stay, and pydantic refuses them."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


# Above 2^53 a float is not exact, and torch accepts no seed above 2^63.
Int = Annotated[int, BeforeValidator(_whole_to_int), Field(le=2**53)]
Steps = Annotated[Int, Field(ge=1)]
Interval = Steps | None
Text = Annotated[str, Field(min_length=1)]


class Effect(Enum):
    """What the value of a field changes."""

    STEPS = "what a step computes"
    ADDITIONS = "only the order of additions in a step"
    RATES = "the learning rates"
    TOKENS = "the tokens"
    LENGTH = "the number of steps"
    ATTEMPT = "what is logged, and when an attempt stops"
    NOTHING = "not what is learned, but where a run is and what of it is kept"


class Later:
    """Marks a field that earlier versions did not have: they worked as its default says.

    Such a field is no part of the meaning of a trial's name while it has its default.
    """


FREE = (Effect.LENGTH, Effect.ATTEMPT, Effect.NOTHING)  # may change between two attempts of a run


class Section(BaseModel):
    """A frozen group of fields. Unknown fields and values of another type are errors.

    Attributes:
        effect: Effect of each field that is not marked with another one:
            `Annotated[int, Effect.NOTHING]`.
    """

    effect: ClassVar[Effect] = Effect.STEPS
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    def replace(self, **changes: Any) -> Self:
        """Return a copy in which some fields differ.

        The values are not validated again: use this for values that the program computes.

        Args:
            **changes: New values by field; `train__max_steps=10` changes a field of a section.

        Raises:
            TypeError: There is no such field.
        """
        updates: dict[str, Any] = {}
        for path, value in changes.items():
            name, _, rest = path.partition("__")
            if name not in type(self).model_fields:
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
            if rest:
                section = updates.get(name, getattr(self, name))
                value = section.replace(**{rest: value})
            updates[name] = value
        return self.model_copy(update=updates)


@dataclass(frozen=True, eq=False)
class OneOf:
    """Marks a text field whose value must be a key of `table`: `Annotated[str, OneOf(table)]`.

    A new entry of the table is then a new choice, also in the error messages and in `--help`.
    `Literal` cannot be used: type checkers need its values in the source.

    Attributes:
        table: The choices. Each value has a `help` text of one line.
    """

    table: Mapping[str, Any]

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.literal_schema(list(self.table))


@dataclass(frozen=True)
class FieldDoc:
    """Description of one field.

    Attributes:
        type: Type in words, such as "an integer or null".
        default: Value if the field is not given.
        description: Meaning and unit.
        effect: What its value changes.
        choices: One line of help by choice, for fields that have a `OneOf` table.
        is_later: See `Later`.
    """

    type: str
    default: Any
    description: str
    effect: Effect
    choices: Mapping[str, str] = field(default_factory=dict)
    is_later: bool = False

    @property
    def shown_default(self) -> str:
        """The default as it is written in YAML."""
        if self.default is None or isinstance(self.default, bool):
            return json.dumps(self.default)
        return str(self.default)


Docs = dict[str, FieldDoc]  # by "section.field"; sections may be nested


def describe_fields(model: type[Section]) -> Docs:
    """Describe every field of a configuration, in the order of its sections."""
    docs: Docs = {}
    for name, info in model.model_fields.items():
        section = section_class(info)
        if section is None:
            docs[info.alias or name] = _describe(info, model.effect)
        else:
            inner = describe_fields(section)
            docs |= {f"{name}.{key}": doc for key, doc in inner.items()}
    return docs


def without_empty(tree: dict[str, Any], docs: Docs, start: str = "") -> dict[str, Any]:
    """Leave out sections that are None, because all their lines are comments."""
    found = {}
    for key, value in tree.items():
        name = f"{start}{key}"
        if isinstance(value, dict):
            found[key] = without_empty(value, docs, f"{name}.")
        elif value is not None or (start and not _is_section(name, docs)):
            found[key] = value
    return found


def _is_section(name: str, docs: Docs) -> bool:
    if name in docs:
        return docs[name].type.startswith("a mapping")
    return any(field.startswith(f"{name}.") for field in docs)


def section_class(info: FieldInfo) -> type[Section] | None:
    """Return the class of a section; None for a field that is not a section."""
    annotation = info.annotation
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return None


def _describe(info: FieldInfo, effect: Effect) -> FieldDoc:
    choices = {}
    for mark in info.metadata:
        if isinstance(mark, OneOf):
            choices = {name: entry.help for name, entry in mark.table.items()}
        if isinstance(mark, Effect):
            effect = mark
    words = " | ".join(choices) or _type_in_words(info.annotation)
    is_later = Later in info.metadata
    return FieldDoc(words, info.default, info.description or "", effect, choices, is_later)


_WORDS = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "a value",
}


def _type_in_words(annotation: Any) -> str:
    """Return a type in words: `int | None` is "an integer or null"."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is None:
        return _WORDS[annotation]
    if origin is Annotated:
        return _type_in_words(arguments[0])
    if origin is Literal:
        return " | ".join(arguments)
    if origin is list:
        return "a list of values" if arguments[0] is Any else "a list of texts"
    if origin is dict:
        values = arguments[1]
        return "a mapping" if values is Any else f"a mapping to {_type_in_words(values)}"
    # A union. Two of its types may have the same words.
    assert origin is Union or origin.__name__ == "UnionType", annotation
    words = dict.fromkeys(_type_in_words(part) for part in arguments)
    return " or ".join(words)
