"""The section `model` of each kind of model: its fields are those of the model's `Config`."""

import functools
import typing
from dataclasses import MISSING, fields
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import Field, TypeAdapter, ValidationError, create_model

from model.models import DEFAULT, MODELS
from orchestrator.config.fields import Int, OneOf, Section, Text
from orchestrator.config.sections import Gpt2, Model
from orchestrator.own_code import error, failure, is_own, parts

SomeFile = TypeVar("SomeFile", bound=Section)


@functools.cache
def section_of(kind: str) -> type[Model]:
    """Return the class of the section `model` for one kind of model."""
    if kind == DEFAULT:
        return Gpt2
    config = MODELS[kind].config
    if is_own(kind):
        _check_config(kind, config)
    types = typing.get_type_hints(config)
    found: dict[str, Any] = {
        one.name: (
            _type(one.name, types),
            _field(one.default, str(one.metadata.get("help", ""))),
        )
        for one in fields(config)
        if one.name != "vocab_size"
    }
    description = Model.model_fields["kind"].description or ""
    # Not `Later`: only a GPT-2 is what earlier versions trained.
    found["kind"] = (Annotated[str, OneOf(MODELS, "FILE.py:CLASS")], _field(kind, description))
    return create_model("Model", __base__=Model, __doc__=Model.__doc__, **found)


@functools.cache
def with_model(file: type[SomeFile], kind: str) -> type[SomeFile]:
    """Return the class of a configuration with the section `model` of one kind."""
    if kind == DEFAULT:
        return file
    section = section_of(kind)
    changed: dict[str, Any] = {"model": (section, section())}
    return create_model(file.__name__, __base__=file, __doc__=file.__doc__, **changed)


def kind_in(tree: dict[str, Any]) -> str:
    """Return the kind of model that a file names. A kind that does not exist is refused later."""
    section = tree.get("model")
    kind = section.get("kind", DEFAULT) if isinstance(section, dict) else DEFAULT
    return kind if isinstance(kind, str) and kind in MODELS else DEFAULT


def _check_config(kind: str, config: type) -> None:
    """Refuse fields of a user's `Config` from which no section can be made.

    Raises:
        UserError: One line with the file and the line in it.
    """
    name = parts(kind)["name"]
    try:
        types = typing.get_type_hints(config)
    except Exception as raised:
        raise failure("model", kind, raised, name, "Config") from None
    for one in fields(config):
        problem = None
        if one.name != "block_size" and hasattr(Model(), one.name):
            problem = "every model has something of this name"
        elif one.name.startswith("_"):
            problem = "its name begins with _"
        elif not one.init:
            problem = "it has init=False; use a property for what follows from other fields"
        elif one.name in ("block_size", "vocab_size") and types[one.name] is not int:
            problem = "its type is not int"
        elif not _is_supported(types[one.name]):
            problem = (
                "its type is not int, float, bool, str, Literal of texts, or one of them | None"
            )
        elif one.default is MISSING:
            problem = "it has no default"
        else:
            try:
                for wanted in (types[one.name], _type(one.name, types)):
                    TypeAdapter(wanted, config=Section.model_config).validate_python(one.default)
            except ValidationError:
                problem = f"the default {one.default!r} is not of its type, or is not allowed"
        if problem is not None:
            raise error("model", kind, f"Config.{one.name}: {problem}", name, "Config", one.name)


def _is_supported(annotation: Any) -> bool:
    if get_origin(annotation) is typing.Literal:
        return all(isinstance(value, str) for value in get_args(annotation))
    if NoneType in get_args(annotation):
        return all(part is NoneType or _is_supported(part) for part in get_args(annotation))
    return annotation in (int, float, bool, str)


def _field(default: Any, description: str) -> Any:
    return Field(default, description=description)


def _type(field: str, types: dict[str, Any]) -> Any:
    return Annotated[Int, Field(ge=1)] if field == "block_size" else _checked(types[field])


def _checked(annotation: Any) -> Any:
    """Return the type with our checks: an integer may be 6e5, and a text is not empty."""
    if annotation is int:
        return Int
    if annotation is str:
        return Text
    if NoneType in get_args(annotation) and get_origin(annotation) is not typing.Literal:
        parts = [_checked(part) for part in get_args(annotation)]
        return functools.reduce(lambda left, right: left | right, parts)
    return annotation
