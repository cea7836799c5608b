"""The section `model` of each kind of model: its fields are those of the model's `Config`."""

import functools
import typing
from dataclasses import fields
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import Field, create_model

from model.models import DEFAULT, MODELS
from orchestrator.config.fields import Int, OneOf, Section, Text
from orchestrator.config.sections import Gpt2, Model

SomeFile = TypeVar("SomeFile", bound=Section)


@functools.cache
def section_of(kind: str) -> type[Model]:
    """Return the class of the section `model` for one kind of model."""
    if kind == DEFAULT:
        return Gpt2
    config = MODELS[kind].config
    types = typing.get_type_hints(config)
    found: dict[str, Any] = {
        one.name: (_checked(types[one.name]), _field(one.default, one.metadata.get("help", "")))
        for one in fields(config)
        if one.name != "vocab_size"
    }
    description = Model.model_fields["kind"].description or ""
    # Not `Later`: only a GPT-2 is what earlier versions trained.
    found["kind"] = (Annotated[str, OneOf(MODELS)], _field(kind, description))
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


def _field(default: Any, description: str) -> Any:
    return Field(default, description=description)


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
