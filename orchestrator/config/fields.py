"""Building blocks of the configuration: base class, types of fields, and their description.

`--help`, docs/reference.md and the error messages are made from the result of `describe_fields`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from orchestrator.config.only_for import OnlyFor
from orchestrator.own_code import is_own


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


def _by_step(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Check a mapping of steps to values as a whole, so that its errors name the field.

    JSON, in which experiments are stored, has only texts as keys.
    """
    if not isinstance(value, dict):
        return validate(value)
    try:
        return validate({int(k) if str(k).isdecimal() else k: v for k, v in value.items()})
    except ValidationError as error:
        first = {"first": error.errors()[0]}
        raise PydanticCustomError("by_step", "not by step", first) from None


Step = Annotated[Int, Field(ge=0)]
BatchSchedule = Annotated[dict[Step, Steps] | None, WrapValidator(_by_step)]
Points = Annotated[dict[Step, Annotated[float, Field(ge=0)]] | None, WrapValidator(_by_step)]


class Effect(Enum):
    """What the value of a field changes."""

    STEPS = "what a step computes"
    ADDITIONS = "only the order of additions in a step"
    PER_STEP = "what may change from step to step"
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
        file: A file of the user that is a choice too, in words. It is in the table once it is
            loaded; see `own_code`.
    """

    table: Mapping[str, Any]
    file: str | None = None

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_after_validator_function(
            self._checked, core_schema.str_schema(strict=True)
        )

    def _checked(self, value: str) -> str:
        if value not in self.table:
            raise PydanticCustomError("literal_error", "not a choice")
        return value

    @property
    def words(self) -> str:
        """The choices in words."""
        own = [] if self.file is None else [self.file]
        return " | ".join([*self.choices, *own])

    @property
    def choices(self) -> dict[str, str]:
        """The help of each choice, without files of the user."""
        return {name: entry.help for name, entry in self.table.items() if not is_own(name)}


AUTO: Any = "auto"


class OrAuto:
    """Marks a number that may be `auto` until a run begins. Type checkers see the number."""

    def __get_pydantic_core_schema__(
        self, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.union_schema([core_schema.literal_schema([AUTO]), handler(source)])


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
        only_for: When the field has an effect; None: always.
    """

    type: str
    default: Any
    description: str
    effect: Effect
    choices: Mapping[str, str] = field(default_factory=dict)
    is_later: bool = False
    only_for: OnlyFor | None = None

    def inside(self, section: str, only_for: OnlyFor | None) -> "FieldDoc":
        """Return the description of a field of a section, which may have a mark itself."""
        if self.only_for is None:
            return replace(self, only_for=only_for)
        return replace(self, only_for=self.only_for.inside(section))

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
            for key, doc in inner.items():
                docs[f"{name}.{key}"] = doc.inside(name, OnlyFor.of(info.metadata, key))
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
    choices: dict[str, str] = {}
    words = ""
    for mark in info.metadata:
        if isinstance(mark, OneOf):
            choices = mark.choices
            words = mark.words
        if isinstance(mark, Effect):
            effect = mark
    words = words or _type_in_words(info.annotation)
    if any(isinstance(mark, OrAuto) for mark in info.metadata):
        words += f" or {AUTO}"
    is_later = Later in info.metadata
    description = info.description or ""
    only_for = OnlyFor.of(info.metadata)
    return FieldDoc(words, info.default, description, effect, choices, is_later, only_for)


BY_STEP = "a mapping of steps to "
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
        return f"a list of {_type_in_words(arguments[0]).split()[-1]}s"
    if origin is dict:
        key, values = arguments
        if _type_in_words(key) == _WORDS[int]:
            return f"{BY_STEP}{_type_in_words(values)}"
        return "a mapping" if values is Any else f"a mapping to {_type_in_words(values)}"
    # A union. Two of its types may have the same words.
    assert origin is Union or origin.__name__ == "UnionType", annotation
    words = dict.fromkeys(_type_in_words(part) for part in arguments)
    return " or ".join(words)
