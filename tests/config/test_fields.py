"""Building blocks of the configuration: changed copies, choices from a table, descriptions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import ValidationError

from orchestrator.config.experiment import Experiment
from orchestrator.config.fields import OneOf, Section, describe_fields
from orchestrator.config.messages import validate
from orchestrator.config.reference import field_class, reference
from orchestrator.config.sweep import sweep_docs
from orchestrator.errors import UserError

REPO = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Entry:
    help: str


TABLE = {"round": Entry("has no corners"), "square": Entry("has four corners")}


class Drawing(Section):
    shape: Annotated[str, OneOf(TABLE)] = "round"


# ---- replace ----


def test_replace_changes_fields_of_several_sections():
    before = Experiment()
    after = before.replace(
        name="other", train__max_steps=7, train__seed=1, schedule__kind="constant"
    )
    changed = {key: value for key, value in after.flat().items() if value != before.flat()[key]}
    assert changed == {
        "name": "other",
        "train.max_steps": 7,
        "train.seed": 1,
        "schedule.kind": "constant",
    }
    assert before == Experiment()


@pytest.mark.parametrize("field", ["nam", "train__max_step", "trian__seed"])
def test_replace_refuses_unknown_field(field):
    with pytest.raises(TypeError, match="has no field"):
        Experiment().replace(**{field: 1})


# ---- choices from a table ----


def test_choices_of_a_field_are_the_keys_of_its_table():
    assert Drawing(shape="square").shape == "square"
    with pytest.raises(ValidationError):
        Drawing(shape="oval")


def test_description_and_error_list_the_choices():
    docs = describe_fields(Drawing)
    assert docs["shape"].type == "round | square"
    assert docs["shape"].choices == {"round": "has no corners", "square": "has four corners"}
    with pytest.raises(UserError) as caught:
        validate(Drawing, {"shape": "oval"}, "here", docs)
    assert str(caught.value) == 'here: shape: "oval" is not round | square'


# ---- docs/reference.md ----


def test_reference_page_is_current():
    page = (REPO / "docs" / "reference.md").read_text("utf-8")
    assert page == reference(), "run `make reference`"


def test_every_field_is_described_in_one_line():
    for key, doc in sweep_docs().items():
        assert doc.description.strip(), key
        assert "\n" not in doc.description, key


def test_reference_tells_free_fields_from_identity():
    docs = sweep_docs()
    assert field_class("train.keep", docs["train.keep"]) == "free"
    assert field_class("compute.use_gpu", docs["compute.use_gpu"]) == "free"
    assert field_class("schedule.max_lr", docs["schedule.max_lr"]) == "identity"
    assert field_class("sweep.seeds", docs["sweep.seeds"]) == "sweep"
