"""Every mistake in a sweep is refused before anything runs; valid sweeps are accepted."""

import json
import re

import pytest

from orchestrator.config.experiment import Experiment, field_docs, fields_with
from orchestrator.config.fields import Effect
from orchestrator.errors import UserError
from orchestrator.sweep.space.checks import COMPARED
from orchestrator.sweep.space.expand import load_sweep

PEAKS = "sweep.grid.schedule.max_lr=[1e-3, 2e-3]"
PROBE = ["sweep.stop=anneal_probe", "sweep.probe_step=40", "sweep.probe_steps=10"]
FIXED = [*fields_with(Effect.NOTHING), *COMPARED]
SAMPLES = ["sweep.sampler=random", "sweep.num_samples=2"]


def refusal(*words: str) -> list[str]:
    """Return the lines of the error, without the source in front."""
    with pytest.raises(UserError) as caught:
        load_sweep(None, words)
    lines = str(caught.value).split("\n")
    assert all(line.startswith("command line: ") for line in lines), lines
    return [line.removeprefix("command line: ") for line in lines]


def test_all_invalid_trials_are_reported_with_one_line_each():
    lines = refusal(
        "sweep.grid.train.max_steps=[40, 80, 120]",
        "sweep.grid.schedule.warmup_steps=[10, 60]",
        "sweep.grid.schedule.kind=[cosine, wsd]",
        "sweep.seeds=2",
        "sweep.trials.wide.model.n_head=5",
        "sweep.grid.data.tokenizer=[byte, char]",
        "sweep.trials.wide.schedule.warmup_steps=1e6",
    )
    assert lines[0] == "5 of 25 trials cannot be run"
    assert lines[1:] == [
        f"trial tokenizer-{t}_kind-{kind}_warmup_steps-60_max_steps-40: "
        "schedule.warmup_steps: 60 must be below train.max_steps=40"
        for kind in ("cosine", "wsd")
        for t in ("byte", "char")
    ] + [
        "trial wide: schedule.warmup_steps: 1000000 must be below train.max_steps=2000; "
        "model.n_head: 5 does not divide n_embd=768"
    ]


def test_auto_is_no_type_to_compare():
    says = "train.dtype: auto stands for one of the other types; give the types themselves"
    assert refusal("sweep.grid.train.dtype=[auto, float32]") == [f"sweep.grid.{says}"]
    trials = ["sweep.trials.a.train.dtype=float32", "sweep.trials.b.train.dtype=auto"]
    assert refusal(*trials) == [f"sweep.trials.b.{says}"]


def test_mistakes_of_section_and_experiment_are_reported_together():
    lines = refusal(
        "train.max_steps=0", "sweep.seeds=0", "sweep.grid.schedule.max_lr=5", "sweep.sed=3"
    )
    assert lines == [
        "train.max_steps: 0 is not an integer at least 1",
        "sweep.grid.schedule.max_lr: 5 is not a list of values",
        "sweep.seeds: 0 is not an integer at least 1",
        "sweep.sed: no such field; did you mean sweep.seeds?",
    ]
    lines = refusal(
        "sweep.grid.schedule.kind=[cosin, wsd]",
        "sweep.grid.train.keep=[1]",
        "sweep.trials.a.train.steps=3",
        "sweep.probe_step=5",
        "sweep.num_samples=3",
        "train.eval_interval=null",
    )
    assert [line.split(": ")[0] for line in lines] == [
        "sweep.grid.schedule.kind",
        "sweep.grid.train.keep",
        "sweep.trials.a.train.steps",
        "sweep.num_samples",
        "sweep.probe_step",
        "train.eval_interval",
    ]


ONE_LINE = [  # overrides, start of the line, other words of the line
    ([], "sweep: ", "no field to vary"),
    (["sweep.seeds=3"], "sweep: ", "sweep.grid.train.seed"),
    (["sweep=5"], "sweep: ", "not a section"),
    (["sweep.grid=[1]"], "sweep.grid: ", "[1] is not a mapping to a list of values"),
    (["sweep.grid.train.max_steps=[]"], "sweep.grid.train.max_steps: ", "of length at least 1"),
    (
        ["sweep.space.train.max_steps=5", *SAMPLES],
        "sweep.space.train.max_steps: ",
        "5 is not a list of values or a mapping",
    ),
    (["sweep.trials.mine=5"], "sweep.trials.mine: ", "5 is not a mapping"),
    ([PEAKS, "sweep.stop=hyperband"], "sweep.stop: ", "none | anneal_probe | asha"),
    ([PEAKS, "sweep.seeds=1.5"], "sweep.seeds: ", "1.5"),
    ([PEAKS, *PROBE, "sweep.probe_margin=-1"], "sweep.probe_margin: ", "at least 0"),
    ([PEAKS, "sweep.diverged_above=0"], "sweep.diverged_above: ", "above 0"),
    ([PEAKS, "sweep.keep_branches=1"], "sweep.keep_branches: ", "true or false"),
    (
        ["sweep.grid.schedule.max_lrs=[1]"],
        "sweep.grid.schedule.max_lrs: ",
        "did you mean schedule.max_lr?",
    ),
    (["sweep.grid.max_steps=[1]"], "sweep.grid.max_steps: ", "did you mean train.max_steps?"),
    (["sweep.grid={1: [2]}"], "sweep.grid.1: ", "no such field"),
    (
        ["sweep.space.schedule.maxlr=[1]", *SAMPLES],
        "sweep.space.schedule.maxlr: ",
        "did you mean schedule.max_lr?",
    ),
    (
        ["sweep.trials.mine.schedul.kind=wsd"],
        "sweep.trials.mine.schedul.kind: ",
        "did you mean schedule.kind?",
    ),
    (["sweep.trials.mine.kind=wsd"], "sweep.trials.mine.kind: ", "no such field"),
    (
        ["sweep.trials.mine={schedule: {kind: wsd}}"],
        "sweep.trials.mine.schedule: ",
        "no such field",
    ),
    (
        ["sweep.grid.schedule.max_lr=[1e-3, 0]"],
        "sweep.grid.schedule.max_lr: ",
        "0 is not a number above 0",
    ),
    (
        ["sweep.grid.schedule.max_lr=[1e-3, 0.001]"],
        "sweep.grid.schedule.max_lr: ",
        "0.001 is given twice",
    ),
    (["sweep.grid.train.max_steps=[2000-01-01]"], "sweep.grid.train.max_steps: ", "2000-01-01"),
    (
        ["sweep.trials.mine.schedule.kind=wds"],
        "sweep.trials.mine.schedule.kind: ",
        '"wds" is not cosine',
    ),
    (["sweep.trials={a/b: {}}"], "sweep.trials: ", '"a/b" becomes the name of a folder'),
    ([f"sweep.trials.{'x' * 101}.schedule.kind=wsd"], "sweep.trials: ", "at most 100"),
    (
        [PEAKS, "sweep.trials.max_lr-0.001.schedule.kind=wsd"],
        "sweep.trials: ",
        '"max_lr-0.001" names two trials',
    ),
    (["sweep.grid.train.seed=[1, 2]", "sweep.seeds=2"], "sweep.grid.train.seed: ", "sweep.seeds=2"),
    (
        ["sweep.space.train.seed={low: 1, high: 9}", *SAMPLES],
        "sweep.space.train.seed: ",
        "use sweep.seeds",
    ),
    (
        ["sweep.trials.mine.train.seed=3", "sweep.seeds=2"],
        "sweep.trials.mine.train.seed: ",
        "sweep.seeds=2",
    ),
    (
        [PEAKS, "sweep.space.schedule.max_lr=[1]", *SAMPLES],
        "sweep.space.schedule.max_lr: ",
        "sweep.grid too",
    ),
    ([PEAKS, "sweep.num_samples=3"], "sweep.num_samples: ", "no sweep.sampler"),
    (["sweep.sampler=random", "sweep.space.schedule.max_lr=[1]"], "sweep.num_samples: ", "missing"),
    (SAMPLES, "sweep.space: ", "missing"),
    ([PEAKS, "sweep.space.model.n_layer=[1]"], "sweep.space: ", "no sweep.sampler"),
    ([PEAKS, "sweep.stop=anneal_probe", "sweep.probe_steps=5"], "sweep.probe_step: ", "missing"),
    ([PEAKS, "sweep.stop=anneal_probe", "sweep.probe_step=5"], "sweep.probe_steps: ", "missing"),
    ([PEAKS, "sweep.probe_steps=5"], "sweep.probe_steps: ", "anneal_probe"),
    ([PEAKS, "sweep.probe_margin=0.1", "sweep.stop=asha"], "sweep.probe_margin: ", "not asha"),
    ([PEAKS, *PROBE, "train.max_steps=40"], "sweep.probe_step: ", "no trial has more than 40"),
    ([PEAKS, "train.eval_interval=null"], "train.eval_interval: ", "val/loss"),
    ([PEAKS, "sweep.from=base"], "sweep.from: ", '"base" is not RUN@STEP'),
    ([PEAKS, "sweep.from=base@0"], "sweep.from: ", '"base@0" is not RUN@STEP'),
    ([PEAKS, "sweep.from='@5'"], "sweep.from: ", '"@5" is not RUN@STEP'),
    ([PEAKS, "sweep.from=base@5", "sweep.seeds=2"], "sweep.seeds: ", "one seed"),
    (
        ["sweep.grid.model.n_layer=[1]", "sweep.from=base@5"],
        "sweep.grid.model.n_layer: ",
        "all fields but schedule.*",
    ),
    (["sweep.trials.mine.train.max_steps=50", "sweep.from=base@50"], "sweep.from: ", "trial mine"),
    (
        [
            "sweep.grid.schedule.warmup_steps=" + json.dumps([*range(101)]),
            "sweep.grid.train.max_steps=" + json.dumps([*range(200, 300)]),
        ],
        "sweep: ",
        "10100 trials are more than 10000",
    ),
    ([PEAKS, "sweep.seeds=5001"], "sweep: ", "10002 trials are more than 10000"),
]


@pytest.mark.parametrize(("words", "begins", "says"), ONE_LINE)
def test_mistake_is_one_line_with_the_field_and_the_reason(words, begins, says):
    (line,) = refusal(*words)
    assert line.startswith(begins)
    assert says in line
    assert len(line) < 260


RANGES = [
    (
        "schedule.kind",
        "{low: 1, high: 2}",
        "a range is for numbers and the field is cosine | linear",
    ),
    (
        "train.max_steps",
        "{low: 1, high: 5, lgo: true}",
        'a range has low, high, log, step, and no "lgo"',
    ),
    ("train.max_steps", "{low: 1}", "high is missing"),
    ("train.max_steps", "{}", "low is missing"),
    ("train.max_steps", "{low: 1.5, high: 5}", "1.5 is not an integer"),
    ("schedule.max_lr", "{low: x, high: 5}", '"x" is not a number'),
    ("schedule.max_lr", "{low: 5, high: 5}", "low=5.0 is not below high=5.0"),
    ("schedule.max_lr", "{low: 5, high: 1}", "low=5.0 is not below high=1.0"),
    ("optim.weight_decay", "{low: 0, high: 1, log: true}", "low=0.0 has no logarithm"),
    ("optim.weight_decay", "{low: 0.1, high: 1, log: 1}", "log=1 is not true or false"),
    ("optim.weight_decay", "{low: 0.1, high: 1, log: true, step: 0.1}", "exclude each other"),
    ("optim.weight_decay", "{low: 0, high: 1, step: 0}", "step=0 is not a number above 0"),
    ("optim.weight_decay", "{low: 0, high: 1, step: x}", 'step="x" is not a number above 0'),
    ("optim.weight_decay", "{low: 0, high: 1, step: 1.5}", "at most high - low = 1"),
    ("model.n_layer", "{low: 1, high: 9, step: 0.5}", "step=0.5 is not whole"),
    ("model.n_layer", "[1, 0, x]", "0 is not an integer at least 1"),
]


@pytest.mark.parametrize(("field", "words", "says"), RANGES)
def test_mistake_in_a_range_is_explained(field, words, says):
    lines = refusal(f"sweep.space.{field}={words}", *SAMPLES)
    assert all(line.startswith(f"sweep.space.{field}: ") for line in lines)
    assert says in lines[0]


@pytest.mark.parametrize(
    "where", ["sweep.grid.{}=[1]", "sweep.space.{}=[1]", "sweep.trials.mine={{{}: 1}}"]
)
@pytest.mark.parametrize("field", FIXED)
def test_fixed_field_is_refused_with_the_reason(where, field):
    (line,) = refusal(where.format(field), *(SAMPLES if "space" in where else []))
    assert re.match(
        rf"sweep\.(grid|space|trials\.mine)\.{re.escape(field)}: cannot be swept: \w+", line
    )


def test_all_other_fields_can_be_swept():
    free = [key for key in field_docs() if key not in (*FIXED, "model.kind")]
    assert len(free) > 30
    flat = Experiment().flat()
    for key in free:
        (trial,) = load_sweep(None, [f"sweep.grid.{key}=[{json.dumps(flat[key])}]"]).trials
        assert trial.experiment.replace(name="quickstart") == Experiment()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["sweep.grid.schedule.kind=[wsd, cosine]"], "schedule.kind"),
        (["sweep.grid.train.max_steps=[40, 80]"], "train.max_steps"),
        ([PEAKS, "sweep.trials.mine.schedule.decay_fraction=0.5"], "schedule.decay_fraction"),
        (
            ["sweep.grid.schedule.warmup_steps=[0, 5]", "sweep.grid.train.max_steps=[40, 80]"],
            "schedule.warmup_steps, train.max_steps",
        ),
        (
            [
                "sweep.sampler=random",
                "sweep.num_samples=2",
                "sweep.space.train.max_steps={low: 40, high: 80}",
            ],
            "train.max_steps",
        ),
        (
            [
                "sweep.sampler=random",
                "sweep.num_samples=2",
                "sweep.space.schedule.kind=[wsd, linear]",
            ],
            "schedule.kind",
        ),
    ],
)
def test_asha_is_refused_for_different_schedules(words, named):
    (line,) = refusal(*words, "sweep.stop=asha")
    assert line.startswith("sweep.stop: asha")
    assert f"{named} differ here" in line
    assert "anneal_probe" in line


@pytest.mark.parametrize(
    "words",
    [
        [PEAKS, "sweep.seeds=2"],
        ["sweep.grid.model.dropout=[0, 0.1]", "sweep.grid.schedule.kind=[wsd]"],
        [PEAKS, "sweep.trials.mine.schedule.kind=cosine"],  # the kind of all trials
        [
            "sweep.sampler=random",
            "sweep.num_samples=2",
            "sweep.space.schedule.max_lr=[1, 2]",
            "sweep.space.schedule.kind=[wsd]",
        ],
    ],
)
def test_asha_is_accepted_for_one_schedule_shape(words):
    assert load_sweep(None, [*words, "sweep.stop=asha"]).settings.stop == "asha"


def test_probe_is_accepted_if_one_trial_is_long_enough():
    sweep = load_sweep(
        None, ["sweep.grid.train.max_steps=[20, 41]", *PROBE, "sweep.probe_margin=0"]
    )
    assert (sweep.settings.probe_step, sweep.settings.probe_steps, sweep.settings.probe_margin) == (
        40,
        10,
        0,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep.probe_step=40", "schedule.warmup_steps=40"], "lies inside a warmup of 40 steps"),
        (
            ["sweep.probe_step=40", "sweep.from=base@40"],
            "is not after the branch of sweep.from=base@40",
        ),
    ],
)
def test_probe_before_the_trials_branch_is_refused(words, said):
    (line,) = refusal(
        "sweep.grid.train.max_steps=[90]", "sweep.stop=anneal_probe", "sweep.probe_steps=5", *words
    )
    assert line.startswith("sweep.probe_step: 40") and said in line
