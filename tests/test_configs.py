"""The experiments in configs/: each is valid and has the numbers that its comments promise."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from model import flops, models
from model.optim import parameter_groups
from model.schedule import learning_rate
from orchestrator.config.experiment import Experiment, load_experiment, parse_experiment
from orchestrator.config.sweep import parse_sweep
from orchestrator.config.yaml_text import read_yaml
from orchestrator.runs import facts
from orchestrator.runs.facts import model_facts
from orchestrator.sweep.branch import Branch, settings_of_steps
from orchestrator.sweep.space.expand import load_sweep
from orchestrator.sweep.tree import build_tree

FILES = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.yaml"))
SWEEPS = [path for path in FILES if path.name.startswith("sweep-")]
CONFIGS = [path for path in FILES if path not in SWEEPS]
GPT2, BPE, CHAR = 50257, 1024, 65  # n_vocab

# Steps are None if the configuration promises only a duration.
# name: (n_vocab, tokens per step, steps, micro-batches, slots, parameters, parameters without
# positions, decayed (tensors, parameters), not decayed)
KNOWN = {
    "quickstart": (BPE, 1024, 1000, 1, 1, 1310848, 1310848, (0, 0), (29, 1310848)),  # no decay
    "shakespeare": (GPT2, 12288, 10, 1, 1, 124373760, 123587328, (50, 124354560), (25, 19200)),
    "shakespeare-char": (CHAR, 16384, 5000, 1, 1, 10745088, 10646784, (26, 10740096), (13, 4992)),
    "shakespeare-char-cpu": (CHAR, 768, 2000, 1, 1, 804096, 795904, (18, 802944), (9, 1152)),
    "shakespeare-char-modern": (
        CHAR,
        768,
        150,
        1,
        1,
        804224,
        804224,
        (0, 0),
        (35, 804224),
    ),  # no decay
    "gpt2-124m": (GPT2, 524288, 600000, 64, 64, 124373760, 123587328, (50, 124354560), (25, 19200)),
    "speedrun-124m": (GPT2, 524288, 3250, 32, 8, 162354816, 162354816, (173, 162354816), (0, 0)),
    "finetune-gpt2": (GPT2, 32768, 20, 32, 8, 124475904, 123689472, (50, 124354560), (98, 121344)),
}


def by_name(name: str, *words: str) -> Experiment:
    return load_experiment(next(path for path in CONFIGS if path.stem == name), list(words))


def test_every_config_has_known_numbers():
    assert {path.stem for path in CONFIGS} == set(KNOWN)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_named_after_its_file_and_reads_back_equal(path):
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert parse_experiment(read_yaml(experiment.to_yaml(), "again"), "again") == experiment
    assert experiment.storage is None  # no path of one machine
    assert experiment.data.dir is None
    assert experiment.tracking.uri is None
    assert path.read_text("utf-8").startswith("# ")  # a comment that describes it


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("model", ["gpt2", "modern"])
@pytest.mark.parametrize(
    "words",
    [
        [],
        ["optim.weight_decay=0"],
        ["optim.groups.embedding.weight_decay=0"],
        ["optim.groups.scalar.weight_decay=0.1"],
    ],
)
def test_decayed_parameters_are_those_that_the_optimizer_decays(model, kind, words):
    shape = ["model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=32"]
    scalars = ["model.layer_scalars=true"] if model == "modern" else []
    experiment = load_experiment(
        None, [f"model.kind={model}", f"optim.kind={kind}", *shape, *scalars, *words]
    )
    groups = parameter_groups(kind, experiment.new_model(65), experiment.optimizer_settings())
    decayed = [p.numel() for group in groups if group["weight_decay"] for p in group["params"]]
    found = model_facts(experiment, 65)
    assert (found["decayed_tensors"], found["decayed_parameters"]) == (len(decayed), sum(decayed))
    assert found["decayed_parameters"] + found["undecayed_parameters"] == found["parameters"]


def test_facts_of_an_edited_model_are_those_of_the_model_that_is_built(monkeypatch):
    words = ["model.kind=modern", "optim.kind=muon", "model.layer_scalars=true"]
    experiment = load_experiment(None, words)
    counted = model_facts(experiment, 65)
    monkeypatch.setitem(flops.COUNTED, "modern", "of another source")
    monkeypatch.setattr(facts, "_is_counted", facts._is_counted.__wrapped__)
    monkeypatch.setattr(models, "empty_model", build := Mock(wraps=models.empty_model))
    assert model_facts(experiment, 65) == counted
    build.assert_called_once()


@pytest.mark.parametrize("name", KNOWN)
def test_config_has_known_numbers(name):
    n_vocab, tokens, steps, micro_batches, slots, total, without, decayed, kept = KNOWN[name]
    experiment = by_name(name)
    found = model_facts(experiment, n_vocab)
    steps = steps or experiment.train.max_steps
    assert experiment.train.max_steps == steps
    assert experiment.tokens_per_step == tokens
    assert (experiment.micro_batches, experiment.slots) == (micro_batches, slots)
    assert (found["parameters"], found["parameters_without_positions"]) == (total, without)
    assert (found["decayed_tensors"], found["decayed_parameters"]) == decayed
    assert (found["undecayed_tensors"], found["undecayed_parameters"]) == kept
    assert found["vocab_size"] == {GPT2: 50304, BPE: 1024, CHAR: 65}[n_vocab]
    schedule = experiment.lr_schedule()
    rates = [learning_rate(schedule, step) for step in (0, steps // 2, steps - 1)]
    assert all(0 < rate <= experiment.schedule.max_lr for rate in rates)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("quickstart", "data.corpus", "builtin:stdlib"),
        ("quickstart", "data.tokenizer", "bpe:1024"),
        ("quickstart", "model.value_embeddings", "alternate"),
        ("quickstart", "optim.momentum", 0.9),
        ("quickstart", "train.sample_prompt", "def read(self, "),
        ("shakespeare", "train.micro_batch_size", 12),
        ("shakespeare", "model.block_size", 1024),
        ("shakespeare", "data.tokenizer", "gpt2"),
        ("shakespeare-char", "train.micro_batch_size", 64),
        ("shakespeare-char", "model.dropout", 0.2),
        ("shakespeare-char-cpu", "train.max_steps", 2000),
        ("shakespeare-char-cpu", "schedule.warmup_steps", 100),
        ("shakespeare-char-cpu", "optim.beta2", 0.99),
        ("gpt2-124m", "compute.num_workers", 8),
        ("gpt2-124m", "schedule.max_lr", 6e-4),
        ("gpt2-124m", "schedule.warmup_steps", 2000),
        ("speedrun-124m", "model.n_head", 6),
        ("speedrun-124m", "model.bias", True),
        ("speedrun-124m", "model.norm_gains", True),
        ("speedrun-124m", "model.smear", False),
        ("speedrun-124m", "model.value_embeddings", None),
        ("speedrun-124m", "optim.weight_decay", 0.05),
        ("finetune-gpt2", "train.init_from", "gpt2"),
        ("finetune-gpt2", "model.activation", "gelu_tanh"),
        ("finetune-gpt2", "schedule.max_lr", 3e-5),
        ("finetune-gpt2", "schedule.kind", "constant"),
    ],
)
def test_config_has_the_values_of_its_source(name, field, value):
    assert by_name(name).flat()[field] == value


def test_speedrun_has_the_rates_and_the_scale_of_its_source():
    """modded-nanogpt, track 3: one rate for each group, a fixed scale of the attention scores."""
    experiment = by_name("speedrun-124m", "model.n_layer=1")
    model = experiment.model
    scale = model.attention_scale / (model.n_embd / model.n_head) ** 0.5
    assert scale == pytest.approx(0.12, rel=1e-4)
    groups = parameter_groups("muon", experiment.new_model(64), experiment.optimizer_settings())
    rates = {g["group"]: g["lr_scale"] * experiment.schedule.max_lr for g in groups}
    assert rates == pytest.approx(
        {"matrix": 0.025, "embedding": 0.7, "head": 0.004, "scalar": 0.015}
    )
    assert {g["group"]: g["weight_decay"] for g in groups} == {
        "matrix": 0.05,
        "embedding": 0.001,
        "head": 0.001,
        "scalar": 0.001,
    }
    schedule = experiment.lr_schedule()
    steps = experiment.train.max_steps
    assert learning_rate(schedule, 0.3 * steps) == 0.025  # constant until then
    assert learning_rate(schedule, round(0.65 * steps)) == pytest.approx(0.0125, rel=0.01)


def test_every_sweep_is_tested():
    assert [path.stem for path in SWEEPS] == ["sweep-schedules"]


def test_sweep_schedules_trains_40_percent_of_its_steps():
    sweep = load_sweep(SWEEPS[0])
    assert parse_sweep(read_yaml(sweep.to_yaml(), "again"), "again") == (sweep.base, sweep.settings)
    trials = []
    for trial in sweep.trials:
        rates, _ = settings_of_steps(trial.experiment.steps(), trial.experiment.train.max_steps)
        trials.append(Branch(trial.name, "", rates))
    tree = build_tree(trials)
    assert (len(trials), tree.steps_asked, tree.steps_in_tree) == (21, 15750, 6381)
    assert sweep.base.data.corpus == "builtin:stdlib"  # no download
    assert SWEEPS[0].read_text("utf-8").startswith("# ")


def test_shakespeare_is_downloaded_with_its_hash():
    known = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    corpora = {path.stem: load_experiment(path).data.corpus for path in CONFIGS}
    downloaded = {name for name, corpus in corpora.items() if str(corpus).startswith("https://")}
    assert downloaded == {
        "shakespeare",
        "shakespeare-char",
        "shakespeare-char-cpu",
        "shakespeare-char-modern",
        "finetune-gpt2",
    }
    assert all(corpora[name].endswith(f"#sha256={known}") for name in downloaded)
