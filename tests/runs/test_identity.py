"""Which experiments may continue in a run folder, and what an attempt stores there."""

import shutil
from pathlib import Path

import pytest
import torch

from orchestrator.config.experiment import Experiment, field_docs, load_experiment
from orchestrator.config.steps import StepSettings
from orchestrator.data.dataset import Manifest, Split, data_identity
from orchestrator.errors import UserError
from orchestrator.runs import stop
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.identity import begin_attempt, check_resumable, identity_differences
from orchestrator.runs.journal import Journal
from tests.helpers.checkpoints import save
from tests.helpers.facts import FACTS

BASE = [
    "name=a",
    "train.max_steps=100",
    "train.micro_batch_size=1",
    "train.global_batch_size=8",
    "data.tokenizer=byte",
]

# Another legal value of every field that is the run's identity.
IDENTITY = {
    "model.kind": "modern",
    "data.tokenizer": "char",
    "data.split": "hash",
    "data.val_fraction": "0.2",
    "data.invalid_utf8": "replace",
    "data.append_eot": "true",
    "model.block_size": "512",
    "model.n_layer": "6",
    "model.n_head": "6",
    "model.n_embd": "384",
    "model.dropout": "0.1",
    "model.bias": "true",
    "model.activation": "gelu_tanh",
    "model.loss_chunk": "64",
    "model.pad_vocab_to": "64",
    "optim.beta1": "0.8",
    "optim.beta2": "0.99",
    "optim.weight_decay": "0.0",
    "optim.max_grad_norm": "null",
    "optim.kind": "muon",
    "optim.momentum": "0.9",
    "optim.momentum_warmup_steps": "10",
    "optim.cautious": "true",
    "optim.polar_steps": "3",
    **{
        f"optim.groups.{group}.{field}": "0.5"
        for group in ("matrix", "embedding", "head", "scalar")
        for field in ("lr_scale", "weight_decay", "beta1", "beta2")
    },
    "schedule.kind": "linear",
    "schedule.max_lr": "1e-3",
    "schedule.min_lr_ratio": "0.2",
    "schedule.warmup_steps": "5",
    "schedule.decay_steps": "50",
    "schedule.decay_fraction": "0.3",
    "schedule.decay_shape": "cosine",
    "schedule.exponent": "2",
    "schedule.points": "{0: 1}",
    **{
        f"schedule.{name}.{field}": value
        for name in ("weight_decay", "momentum")
        for field, value in {
            "kind": "cosine",
            "decay_steps": "50",
            "decay_fraction": "0.3",
            "points": "{0: 1}",
        }.items()
    },
    "schedule.weight_decay.min_ratio": "0.5",
    "schedule.momentum.final": "0.5",
    "train.micro_batch_size": "2",
    "train.global_batch_size": "16",
    "train.batch_schedule": "{0: 8, 50: 16}",
    "train.ema": "0.99",
    "train.reduction_slots": "4",
    "train.seed": "1",
    "train.dtype": "bfloat16",
    "train.compile": "true",
    "train.eval_tokens": "100",
    "train.init_from": "gpt2",
}
FREE = {
    "train.on_nonfinite": "skip",
    "train.allow_drift": "true",
    "train.restart": "true",
    "compute.hang_after_s": "60",
    "compute.wait_for_nodes_s": "60",
    "name": "b",
    "storage": "/elsewhere",
    "mirror": "s3://bucket/elsewhere",
    "data.dir": "/elsewhere",
    "data.corpus": "moved.txt",
    "data.text_field": "body",
    "data.on_null": "skip",
    "data.encoder": "tiktoken",
    "train.log_interval": "1",
    "train.eval_interval": "7",
    "train.checkpoint_interval": "null",
    "train.keep": "9",
    "train.sample_prompt": "def",
    "train.sample_tokens": "9",
    "compute.num_workers": "4",
    "compute.cpus_per_worker": "2",
    "compute.use_gpu": "true",
    "tracking.uri": "http://elsewhere:5000",
    "tracking.experiment": "other",
    "tracking.alert": "never",
    "train.shard_optimizer": "false",
    "train.overlap_exchange": "false",
    "train.activation_checkpointing": "true",
}


def experiment(*words: str) -> Experiment:
    return load_experiment(None, [*BASE, *words])


def dataset(stream: str = "s", directory: Path = Path("/data")) -> Manifest:
    splits = {name: Split(1000, 1, 1000, f"{stream}-{name}", ()) for name in ("train", "val")}
    return Manifest(directory, {"name": "byte", "n_vocab": 256}, splits, digest="digest")


def commit(folder: RunFolder, step: int, e: Experiment) -> Path:
    """Save a checkpoint of an experiment that was trained on `dataset()`."""
    weights = {"w": torch.full((3,), float(step))}
    fingerprints = FACTS["fingerprints"] | {"data": data_identity(dataset())}
    texts = {"experiment.yaml": e.to_yaml()}
    facts = {"metrics": {}, "fingerprints": fingerprints}
    return save(folder.checkpoints, step, {"model": weights}, texts, facts)


def test_every_field_is_either_identity_or_free():
    rows = set(IDENTITY) | set(FREE) | {"train.max_steps"}
    assert rows == set(Experiment().flat())


def what_makes_it_count(field: str) -> list[str]:
    """Return overrides with which a field has an effect."""
    mark = field_docs()[field].only_for
    if mark is None or mark.missing(experiment().flat()) is None:
        return []
    other = mark.fields[0].strip("/")
    return [*what_makes_it_count(other), f"{other}={mark.values[0]}"]


@pytest.mark.parametrize("field", IDENTITY)
def test_changed_identity_field_is_shown_with_both_values(field):
    name = field.rpartition(".")[2]
    before = what_makes_it_count(field)
    if name == "points":
        before.append(f"{field}={{0: 2}}")
    also = ["train.global_batch_size=null"] if name == "batch_schedule" else []
    wanted = experiment(*before, *also, f"{field}={IDENTITY[field]}")
    lines = identity_differences(experiment(*before), wanted, 10)
    (line,) = [line for line in lines if line.startswith(f"{field}: ")]
    assert line.endswith(f", now {wanted.flat()[field]!r}")
    # Another micro-batch size also changes the number of slots.
    assert len(lines) == (2 if field == "train.micro_batch_size" else 1)


@pytest.mark.parametrize("field", FREE)
def test_free_field_may_change(field):
    wanted = experiment(f"{field}={FREE[field]}")
    assert wanted.flat()[field] != experiment().flat()[field]
    assert identity_differences(experiment(), wanted, 10) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((), ("train.reduction_slots=8",)),
        (("train.reduction_slots=8",), ()),
        ((), ("schedule.decay_steps=100",)),
        ((), ("train.global_batch_size=null", "train.batch_schedule={0: 8}")),
        ((), ("train.global_batch_size=null", "train.batch_schedule={0: 8, 50: 8}")),
        (
            ("schedule.weight_decay.kind=cosine", "schedule.weight_decay.decay_steps=100"),
            ("schedule.weight_decay.kind=cosine",),
        ),
        ((), ("schedule.momentum.decay_steps=100",)),
        ((), ("optim.groups.matrix.weight_decay=0.1", "optim.groups.head.beta1=0.9")),
        (("optim.groups.scalar.weight_decay=0", "optim.groups.head.lr_scale=1"), ()),
        (("optim.kind=muon", "optim.groups.embedding.lr_scale=5"), ("optim.kind=muon",)),
        (("model.kind=modern", "model.n_kv_head=6"), ("model.kind=modern",)),
        ((), ("schedule.momentum.final=0.95", "schedule.weight_decay.decay_fraction=0.2")),
        (("schedule.decay_steps=100",), ()),
    ],
)
def test_null_and_the_value_that_it_means_are_the_same(before, after):
    assert identity_differences(experiment(*before), experiment(*after), 10) == []


@pytest.mark.parametrize(
    ("schedule", "max_steps", "step", "changes"),
    [
        ("schedule.decay_steps=100", 200, 100, False),
        ("schedule.decay_steps=null", 200, 10, True),
        ("schedule.decay_steps=null", 200, 1, False),  # update 0 has the peak in both
        ("schedule.kind=constant", 200, 100, False),
        ("schedule.kind=wsd", 200, 80, False),
        ("schedule.kind=wsd", 200, 82, True),
        ("schedule.warmup_steps=20", 200, 21, False),
        ("schedule.warmup_steps=20", 200, 22, True),
        ("schedule.decay_steps=100", 50, 50, False),
        ("schedule={kind: constant, weight_decay: {kind: cosine}}", 200, 10, True),
        ("schedule={kind: constant, momentum: {kind: wsd}}", 200, 80, False),
        (
            "schedule={kind: constant, weight_decay: {kind: cosine, decay_steps: 100}}",
            200,
            9,
            False,
        ),
        ("schedule={kind: constant, momentum: {kind: wsd, final: 0.5}}", 200, 82, True),
        ("schedule.decay_steps=100", 49, 50, True),  # more steps are done
    ],
)
def test_max_steps_may_change_if_no_learning_rate_that_was_used_changes(
    schedule, max_steps, step, changes
):
    stored = experiment("optim.kind=muon", schedule)  # it has a momentum
    wanted = stored.replace(train__max_steps=max_steps)
    lines = identity_differences(stored, wanted, step)
    if changes:
        assert "train.max_steps" in lines[0]
    else:
        assert lines == []
        assert rates(stored, step) == rates(wanted, step)


def test_max_steps_may_grow_with_the_schedule_that_the_refusal_proposes():
    stored = experiment()
    (line,) = identity_differences(stored, experiment("train.max_steps=200"), 100)
    assert "schedule.decay_steps=100" in line
    wanted = experiment("schedule.decay_steps=100", "train.max_steps=200")
    assert identity_differences(stored, wanted, 100) == []
    assert rates(stored, 100) == rates(wanted, 100)


def rates(e: Experiment, steps: int) -> list[StepSettings]:
    """Settings of the first updates."""
    return [e.steps()(update) for update in range(steps)]


def test_same_experiment_resumes_and_any_may_start_before_the_first_checkpoint(folder):
    assert check_resumable(folder, experiment("train.seed=1"), dataset()) == 0
    commit(folder, 20, experiment())
    moved = dataset(directory=Path("/moved"))
    assert check_resumable(folder, experiment("train.keep=5"), moved) == 20


def test_refusal_shows_every_difference_and_a_way_out(folder):
    commit(folder, 20, experiment())
    wanted = experiment("train.seed=1", "optim.beta1=0.5")
    with pytest.raises(UserError) as caught:
        check_resumable(folder, wanted, dataset("other"))
    for words in (
        "train.seed: before 1337, now 1",
        "optim.beta1: before 0.9, now 0.5",
        "data: ",
        "name=",
        str(folder.path),
    ):
        assert words in str(caught.value)


def test_only_drift_is_permitted_by_allow_drift(folder):
    commit(folder, 20, experiment())
    drift = experiment("train.micro_batch_size=2", "train.reduction_slots=4")
    with pytest.raises(UserError, match="train.allow_drift=true"):
        check_resumable(folder, drift, dataset())
    assert check_resumable(folder, drift.replace(train__allow_drift=True), dataset()) == 20
    with pytest.raises(UserError, match="train.seed"):
        check_resumable(folder, experiment("train.seed=1", "train.allow_drift=true"), dataset())


def test_experiment_is_compared_with_the_latest_valid_checkpoint(folder):
    commit(folder, 20, experiment())
    damaged = commit(folder, 40, experiment("train.seed=1"))
    (damaged / "model.safetensors").write_bytes(b"")
    warnings: list[str] = []
    assert check_resumable(folder, experiment(), dataset(), warnings.append) == 20
    assert "step-00000040" in warnings[0]


def test_folder_without_an_experiment_is_refused(folder):
    with pytest.raises(UserError, match=r"experiment\.yaml"):
        folder.read_experiment()


def lose_checkpoints(folder) -> None:
    """Lose all checkpoints of a run that has written some."""
    shutil.rmtree(folder.checkpoints)


def damage_checkpoints(folder) -> None:
    for step in folder.checkpoint_steps():
        (folder.checkpoint(step) / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("lose", [lose_checkpoints, damage_checkpoints])
def test_run_that_lost_its_checkpoints_begins_again_only_on_request(folder, lose):
    begin_attempt(folder, experiment(), {}, {"from_step": 0})
    key = folder.read_record()["key"]
    Journal(folder).append(10, {"train/loss": 1.0})
    line = folder.journal_file.read_bytes()
    commit(folder, 20, experiment())
    folder.checkpointed_file.touch()
    lose(folder)
    with pytest.raises(UserError, match="train.restart=true") as refused:
        check_resumable(folder, experiment(), dataset())
    assert "\n" not in str(refused.value)
    assert folder.journal_file.exists()

    restart = experiment("train.restart=true")
    assert check_resumable(folder, restart, dataset()) == 0
    begin_attempt(folder, restart, {}, {"from_step": 0})
    assert folder.read_record()["key"] != key
    assert not folder.journal_file.exists()
    [before] = folder.path.glob("before-*")
    assert RunFolder(before).journal_file.read_bytes() == line
    assert check_resumable(folder, experiment(), dataset()) == 0, "the same command goes on"

    commit(folder, 20, restart)
    assert check_resumable(folder, restart, dataset()) == 20, "a valid checkpoint is used"


# ---- attempts ----


def test_attempts_of_a_run_share_a_key_and_old_endings_are_removed(folder):
    begin_attempt(folder, experiment(), {"params": {"a": 1}}, {"n": 1})
    first = folder.read_record()
    failure = folder.failure_file(0)
    for stale in (folder.summary_file, folder.ending_file, failure):
        stale.write_text("{}")
    stop.request(folder, "SIGTERM")
    begin_attempt(folder, experiment(), {"params": {"a": 2}}, {"n": 2})
    second = folder.read_record()
    assert second["key"] == first["key"]
    assert (second["attempts"], second["params"]) == ([{"n": 1}, {"n": 2}], {"a": 2})
    assert not any(file.exists() for file in (folder.summary_file, folder.ending_file, failure))
    assert stop.requested(folder) is None
    assert folder.read_experiment() == experiment()


def test_changed_experiment_that_starts_over_is_another_tracked_run(folder):
    facts = {"params": {}, "tags": {}, "dataset": {"digest": "d"}}

    def begin(*words: str) -> str:
        begin_attempt(folder, experiment(*words), facts, {})
        return folder.read_record()["key"]

    first = begin()
    folder.samples.mkdir()
    Journal(folder).append(0, {})
    assert begin("train.log_interval=3") == first
    assert folder.journal_file.exists()

    damaged = commit(folder, 10, experiment())
    (damaged / "model.safetensors").write_bytes(b"")
    assert begin("schedule.max_lr=1e-5") != first
    assert not folder.journal_file.exists()
    assert not folder.samples.exists()
    assert len(folder.read_record()["attempts"]) == 1
