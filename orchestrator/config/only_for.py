"""Fields that have an effect only together with some values of another field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.config.fields import Docs


class OnlyFor:
    """Marks a field that has an effect only if another field has one of some values.

    Args:
        values: The values. A file of the user is always one of them.
        *fields: Names of other fields of the section, or of any field after a "/"; one of them is
            enough.
        marked: Fields to which the mark of a section applies; none: all.
    """

    def __init__(self, values: Iterable[str], *fields: str, marked: Iterable[str] = ()) -> None:
        self.values = tuple(values)
        self.fields = fields or ("kind",)
        self.marked = tuple(marked)

    @staticmethod
    def of(metadata: Iterable[Any], field: str = "") -> OnlyFor | None:
        """Return the mark among the metadata of a field or, for one of its fields, of a section."""
        marks = (mark for mark in metadata if isinstance(mark, OnlyFor))
        return next((mark for mark in marks if field in mark.marked or not mark.marked), None)

    def inside(self, section: str) -> OnlyFor:
        """Return the mark with the names of the fields in the section around this one."""
        names = (name if name[0] == "/" else f"{section}.{name}" for name in self.fields)
        return OnlyFor(self.values, *names)

    def missing(self, flat: Mapping[str, Any]) -> str | None:
        """Return "field=value" that makes the field useless in an experiment; None if none does."""
        found = {name.strip("/"): flat[name.strip("/")] for name in self.fields}
        if any(value in self.values or ".py:" in value for value in found.values()):
            return None
        return "{}={}".format(*next(iter(found.items())))


def useless(flat: Mapping[str, Any], docs: Docs) -> dict[str, str]:
    """Return the fields that have not their default and have no effect.

    Such a field counts as if it had its default, so others may have no effect either.

    Args:
        flat: Value by field.
        docs: Description by field.

    Returns:
        By field, "field=value" that makes it useless.
    """
    found: dict[str, str] = {}
    counted = dict(flat)
    while True:
        more = {
            key: reason
            for key, doc in docs.items()
            if doc.only_for and counted[key] != doc.default
            if (reason := doc.only_for.missing(counted))
        }
        if not more:
            return found
        found |= more
        counted |= {key: docs[key].default for key in more}
