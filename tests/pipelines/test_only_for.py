"""Settings without an effect are named, in a run and in a sweep."""

import pytest

from orchestrator.config.experiment import field_docs, load_experiment
from pipelines.common import _note_useless_fields

MUON = "optim.kind=muon"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.momentum=0.9"], ["optim.momentum: 0.9 has no effect with optim.kind=adamw"]),
        (["optim.momentum=0.9", MUON], []),
        (["optim.momentum_warmup_steps=9", "optim.cautious=true"], ["warmup_steps: 9", "cautious"]),
        (["schedule.decay_fraction=0.5"], ["0.5 has no effect with schedule.kind=cosine"]),
        (["schedule.decay_fraction=0.5", "schedule.kind=power"], []),
        (["schedule.decay_fraction=0.5", "schedule.weight_decay.kind=wsd"], []),
        (["schedule.decay_shape=cosine", "schedule.exponent=2"], ["decay_shape", "exponent"]),
        (["schedule.kind=constant", "schedule.min_lr_ratio=0"], ["min_lr_ratio", "=constant"]),
        (["schedule.kind=constant", "schedule.decay_steps=9"], ["schedule.decay_steps: 9"]),
        (["schedule.momentum.kind=wsd"], ["schedule.momentum.kind: wsd", "optim.kind=adamw"]),
        (["schedule.momentum.final=0.8", MUON], ["with schedule.momentum.kind=constant"]),
        (["schedule.weight_decay.min_ratio=0.5"], ["schedule.weight_decay.min_ratio: 0.5"]),
        (["optim.groups.matrix.beta1=0.5"], []),
        (["optim.groups.matrix.beta1=0.5", MUON], ["matrix.beta1: 0.5", "with optim.kind=muon"]),
        (["optim.groups.matrix.lr_scale=2", "optim.groups.scalar.beta1=0.5", MUON], []),
        (["optim.groups.head.lr_scale=2"], ["head.lr_scale: 2.0", "with model.kind=gpt2"]),
        (["optim.groups.head.lr_scale=2", "model.kind=modern"], []),
        # A setting of a schedule without effect has none either.
        (
            ["schedule.momentum.kind=wsd", "schedule.decay_fraction=0.5"],
            ["schedule.momentum.kind: wsd", "schedule.decay_fraction: 0.5"],
        ),
        ([], []),
    ],
)
def test_field_without_effect_is_named(words, said, capsys):
    _note_useless_fields([load_experiment(None, words)])
    lines = capsys.readouterr().err
    assert bool(lines) == bool(said)
    assert all(line.startswith("note: ") for line in lines.splitlines())
    assert all(word in lines for word in said)


def test_field_that_has_an_effect_in_one_trial_is_not_named(capsys):
    words = [["schedule.kind=wsd"], ["schedule.kind=cosine"]]
    _note_useless_fields(
        [load_experiment(None, [*w, "schedule.decay_fraction=0.5"]) for w in words]
    )
    assert capsys.readouterr().err == ""


def test_marks_name_fields_that_exist():
    docs = field_docs()
    marks = [doc.only_for for doc in docs.values() if doc.only_for is not None]
    assert len(marks) > 10
    assert {name.strip("/") for mark in marks for name in mark.fields} <= docs.keys()
