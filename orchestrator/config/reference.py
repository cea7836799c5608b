"""Write docs/reference.md, the table of all fields: `python -m orchestrator.config.reference`."""

from collections.abc import Iterable

from model.models import DEFAULT, MODELS
from orchestrator.config.experiment import field_docs
from orchestrator.config.fields import FREE, FieldDoc
from orchestrator.config.sweep import SweepFile, sweep_docs
from orchestrator.own_code import is_own

HEADER = """\
# Reference: all fields

`make reference` writes this page from `orchestrator/config/`; do not edit it.

A field is set in an experiment file or as `section.field=value` on the command line. Fields of
`sweep` are used only by `pipelines/sweep.py`.

A run that has a checkpoint can be resumed with other values of its *free* fields. All other fields
are its *identity*: with another value the run is refused and needs a new `name`. There are three
exceptions. `train.max_steps` may grow if this changes no learning rate that was already used.
`data.corpus` and `data.text_field` may change: the tokens are compared. `train.allow_drift=true`
permits other values of `train.micro_batch_size`, `train.reduction_slots` and `train.compile`.
"""


def reference() -> str:
    """Return the page: one table per section, one row per field."""
    lines = [HEADER.rstrip()]
    section = None
    for key, doc in sweep_docs().items():
        title = key.partition(".")[0] if "." in key else "top level"
        if title != section:
            if section == "model":
                lines += _other_models()
            section = title
            info = SweepFile.model_fields.get(title)
            summary = (info.annotation.__doc__ or "").partition("\n")[0] if info is not None else ""
            lines += _section_start(title, summary)
        lines.append(_row(_cells(key, doc)))
    return "\n".join(lines) + "\n"


def _other_models() -> list[str]:
    lines = []
    for kind, model in MODELS.items():
        if kind != DEFAULT and not is_own(kind):
            lines += _section_start(f"model, if model.kind is {kind}", f"{model.help}.")
            docs = field_docs(kind).items()
            lines += [_row(_cells(key, doc)) for key, doc in docs if key.startswith("model.")]
    return lines


def _section_start(title: str, summary: str) -> list[str]:
    lines = ["", f"## {title}"]
    if summary:
        lines += ["", summary]
    return [*lines, "", _row(["field", "type", "default", "class", "meaning"]), _row(["---"] * 5)]


def _cells(key: str, doc: FieldDoc) -> list[str]:
    meaning = doc.description
    if doc.choices:
        choices = (f"`{name}`: {text}" for name, text in doc.choices.items())
        meaning += f" ({'; '.join(choices)})"
    return [f"`{key}`", doc.type, f"`{doc.shown_default}`", field_class(key, doc), meaning]


def field_class(key: str, doc: FieldDoc) -> str:
    """Return whether a field may change when a run is resumed: free, identity, or sweep."""
    if key.startswith("sweep."):
        return "sweep"
    return "free" if doc.effect in FREE else "identity"


def _row(cells: Iterable[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return f"| {' | '.join(escaped)} |"


if __name__ == "__main__":
    print(reference(), end="")
