"""A run's folder: one writer, the same experiment under the same name, and an honest summary."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.schedule import learning_rate
from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.data.dataset import Manifest, Split, data_identity
from orchestrator.errors import HeldError, UserError
from orchestrator.files import read_json
from orchestrator.runs import identity, lock, stop
from orchestrator.runs import summary as summary_file
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.journal import Journal
from orchestrator.runs.storage import storage_root
from tests.helpers.facts import FACTS

HOLDER = (
    "from pathlib import Path; import sys, time; from orchestrator.runs.lock import held\n"
    "with held(Path(sys.argv[1]) / '.lock'): print('held', flush=True); time.sleep(600)"
)
BASE = [
    "name=a",
    "train.max_steps=100",
    "train.micro_batch_size=1",
    "train.global_batch_size=8",
    "data.tokenizer=byte",
]

# Another legal value of every field that is the run's identity.
IDENTITY = {
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
    "model.pad_vocab_to": "64",
    "optim.beta1": "0.8",
    "optim.beta2": "0.99",
    "optim.weight_decay": "0.0",
    "optim.max_grad_norm": "null",
    "schedule.kind": "linear",
    "schedule.max_lr": "1e-3",
    "schedule.min_lr_ratio": "0.2",
    "schedule.warmup_steps": "5",
    "schedule.decay_steps": "50",
    "schedule.decay_fraction": "0.3",
    "schedule.decay_shape": "cosine",
    "train.micro_batch_size": "2",
    "train.global_batch_size": "16",
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
    "compute.hang_after_s": "60",
    "name": "b",
    "storage": "/elsewhere",
    "data.dir": "/elsewhere",
    "data.corpus": "moved.txt",
    "data.text_field": "body",
    "train.log_interval": "1",
    "train.eval_interval": "7",
    "train.checkpoint_interval": "null",
    "train.keep": "9",
    "compute.num_workers": "4",
    "compute.cpus_per_worker": "2",
    "compute.use_gpu": "true",
    "tracking.uri": "http://elsewhere:5000",
    "tracking.experiment": "other",
}
ONLY_ONE_VALUE = {"optim.kind"}


def experiment(*words: str) -> Experiment:
    return load_experiment(None, [*BASE, *words])


def dataset(stream: str = "s", directory: Path = Path("/data")) -> Manifest:
    splits = {name: Split(1000, 1, 1000, f"{stream}-{name}", ()) for name in ("train", "val")}
    return Manifest(directory, {"name": "byte", "n_vocab": 256}, splits, digest="digest")


def commit(run_dir: Path, step: int, e: Experiment, **metrics: float) -> Path:
    weights = {"w": torch.full((3,), float(step))}
    facts = {
        "metrics": metrics,
        "fingerprints": FACTS["fingerprints"] | {"data": data_identity(dataset())},
    }
    return checkpoint.save(
        run_dir / "checkpoints", step, {"model": weights}, {"experiment.yaml": e.to_yaml()}, facts
    )


# ---- one writer ----
def test_a_held_run_is_refused_naming_the_holder_and_free_again_when_the_holder_is_killed(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(HeldError, match=rf"held by process {holder.pid} on "),
            lock.held(RunFolder(tmp_path).driver_lock),
        ):
            pytest.fail("two writers")
        assert (
            (tmp_path / ".lock").read_text().startswith(f"process {holder.pid} ")
        )  # asking changes nothing
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(20)
    with lock.held(RunFolder(tmp_path).driver_lock):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
        with (
            pytest.raises(HeldError, match=str(os.getpid())),
            lock.held(RunFolder(tmp_path).driver_lock),
        ):
            pytest.fail("two writers")
    with lock.held(RunFolder(tmp_path).driver_lock):
        pass


# ---- the same experiment ----
def test_every_field_is_either_identity_or_free_and_has_a_row():
    rows = set(IDENTITY) | set(FREE) | ONLY_ONE_VALUE | {"train.max_steps"}
    assert rows == set(Experiment().flat())


@pytest.mark.parametrize("field", IDENTITY)
def test_a_changed_identity_field_is_refused_and_shown_with_both_values(field):
    wanted = experiment(f"{field}={IDENTITY[field]}")
    lines = identity.identity_differences(experiment(), wanted, 10)
    (line,) = [line for line in lines if line.startswith(f"{field}: ")]
    assert repr(wanted.flat()[field]) in line
    assert " there, " in line
    assert line.endswith(" here")
    assert len(lines) == 1 + (
        field == "train.micro_batch_size"
    )  # which also changes the number of slots


@pytest.mark.parametrize("field", FREE)
def test_a_free_field_may_change(field):
    assert experiment().flat()[field] != experiment(f"{field}={FREE[field]}").flat()[field]
    assert (
        identity.identity_differences(experiment(), experiment(f"{field}={FREE[field]}"), 10) == []
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((), ("train.reduction_slots=8",)),
        (("train.reduction_slots=8",), ()),
        ((), ("schedule.decay_steps=100",)),
        (("schedule.decay_steps=100",), ()),
    ],
)
def test_saying_what_null_means_changes_nothing(before, after):
    assert identity.identity_differences(experiment(*before), experiment(*after), 10) == []


@pytest.mark.parametrize(
    ("before", "after", "step", "refused"),
    [
        (
            ("schedule.decay_steps=100",),
            ("schedule.decay_steps=100", "train.max_steps=200"),
            100,
            False,
        ),
        (
            (),
            ("schedule.decay_steps=100", "train.max_steps=200"),
            100,
            False,
        ),  # what the refusal of the next row advises
        ((), ("train.max_steps=200",), 10, True),
        ((), ("train.max_steps=200",), 1, False),  # the peak is the peak
        (
            ("schedule.kind=constant",),
            ("schedule.kind=constant", "train.max_steps=200"),
            100,
            False,
        ),
        (("schedule.kind=wsd",), ("schedule.kind=wsd", "train.max_steps=200"), 80, False),
        (("schedule.kind=wsd",), ("schedule.kind=wsd", "train.max_steps=200"), 82, True),
        (
            ("schedule.warmup_steps=20",),
            ("schedule.warmup_steps=20", "train.max_steps=200"),
            21,
            False,
        ),
        (
            ("schedule.warmup_steps=20",),
            ("schedule.warmup_steps=20", "train.max_steps=200"),
            22,
            True,
        ),
        (
            ("schedule.decay_steps=100",),
            ("schedule.decay_steps=100", "train.max_steps=50"),
            50,
            False,
        ),
        (
            ("schedule.decay_steps=100",),
            ("schedule.decay_steps=100", "train.max_steps=49"),
            50,
            True,
        ),
    ],
)
def test_max_steps_may_change_where_no_learning_rate_that_was_used_does(
    before, after, step, refused
):
    stored, wanted = experiment(*before), experiment(*after)
    lines = identity.identity_differences(stored, wanted, step)
    assert bool(lines) == refused, lines
    if not refused:
        rates = [[learning_rate(e.lr_schedule(), n) for n in range(step)] for e in (stored, wanted)]
        assert rates[0] == rates[1]
    else:
        assert "train.max_steps" in lines[0]


def test_an_experiment_goes_on_where_it_is_the_same_and_starts_over_before_the_first_checkpoint(
    tmp_path,
):
    assert identity.check_resumable(RunFolder(tmp_path), experiment("train.seed=1"), dataset()) == 0
    commit(tmp_path, 20, experiment())
    assert (
        identity.check_resumable(
            RunFolder(tmp_path), experiment("train.keep=5"), dataset(directory=Path("/moved"))
        )
        == 20
    )


def test_a_refusal_shows_every_difference_and_a_way_out(tmp_path):
    commit(tmp_path, 20, experiment())
    with pytest.raises(UserError) as caught:
        identity.check_resumable(
            RunFolder(tmp_path), experiment("train.seed=1", "optim.beta1=0.5"), dataset("other")
        )
    text = str(caught.value)
    for words in (
        "train.seed: 1337 there, 1 here",
        "optim.beta1: 0.9 there, 0.5 here",
        "data: ",
        "name=",
        str(tmp_path),
    ):
        assert words in text


def test_identity_is_that_of_the_latest_valid_checkpoint(tmp_path):
    commit(tmp_path, 20, experiment())
    torn = commit(tmp_path, 40, experiment("train.seed=1"))
    (torn / "model.safetensors").write_bytes(b"")
    told: list[str] = []
    assert identity.check_resumable(RunFolder(tmp_path), experiment(), dataset(), told.append) == 20
    assert "step-00000040" in told[0]


def test_a_folder_without_an_experiment_is_called_so(tmp_path):
    with pytest.raises(UserError, match=r"experiment\.yaml"):
        RunFolder(tmp_path).read_experiment()


# ---- where ----
@pytest.mark.parametrize(
    ("storage", "variable", "in_job", "expected"),
    [
        (None, None, False, "CWD/runs"),
        ("x/y", None, False, "CWD/x/y"),
        ("/abs", None, False, "/abs"),
        ("~/s", None, False, "HOME/s"),
        (None, "/env", False, "/env"),
        (None, "env", False, "CWD/env"),
        ("/abs", "/env", False, "/abs"),
        (None, None, True, "HOME/espalier"),
        ("x", None, True, "HOME/espalier/x"),
        ("/abs", None, True, "/abs"),
        (None, "/env", True, "/env"),
        ("~/s", None, True, "HOME/s"),
    ],
)
def test_storage_is_absolute_and_never_a_jobs_throw_away_folder(
    tmp_path, monkeypatch, storage, variable, in_job, expected
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    for name, value in (
        ("ESPALIER_STORAGE", variable),
        ("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}" if in_job else None),
    ):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(
            name, value
        )
    wanted = expected.replace("CWD", str(tmp_path)).replace("HOME", "/home/somebody")
    assert storage_root(Experiment(storage=storage)) == Path(wanted)


# ---- attempts and the summary ----
def test_attempts_add_up_under_one_key_and_old_endings_go(tmp_path):
    identity.begin_attempt(RunFolder(tmp_path), experiment(), {"params": {"a": 1}}, {"n": 1})
    first = read_json(tmp_path / "run.json")
    for stale in ("summary.json", "stopped.json", "failure-rank0.txt"):
        (tmp_path / stale).write_text("{}")
    identity.begin_attempt(RunFolder(tmp_path), experiment(), {"params": {"a": 2}}, {"n": 2})
    second = read_json(tmp_path / "run.json")
    assert second["key"] == first["key"]
    assert (second["attempts"], second["params"]) == ([{"n": 1}, {"n": 2}], {"a": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".reserve",
        "experiment.yaml",
        "run.json",
        "stop.json",
    ]
    assert stop.requested(RunFolder(tmp_path)) is None
    assert RunFolder(tmp_path).read_experiment() == experiment()


def test_a_summary_is_what_journal_and_checkpoints_say(tmp_path):
    log = Journal(RunFolder(tmp_path))
    log.append(0, {"val/loss": 9.0, "val/bits_per_byte": 9.0, "val/best_loss": 9.0})
    log.append(
        10,
        {
            "train/loss": 5.0,
            "perf/step_time_s": 100.0,
            "val/loss": 4.0,
            "val/bits_per_byte": 3.0,
            "val/best_loss": 4.0,
        },
    )
    log.append(20, {"train/loss": 3.0, "perf/step_time_s": 0.5})
    log.append(30, {"train/loss": 2.0, "perf/step_time_s": 0.5})
    commit(tmp_path, 10, experiment())
    last = commit(tmp_path, 30, experiment())
    summary = summary_file.summarize(RunFolder(tmp_path), Ending("done"), 128, "id", 12.34)
    assert summary == json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert summary == {
        "status": "FINISHED",
        "exit_status": 0,
        "step": 30,
        "tokens": 3840,
        "train_loss": 2.0,
        "val_loss": 4.0,
        "val_bits_per_byte": 3.0,
        "best_val_loss": 4.0,
        "checkpoint": str(last),
        "mlflow_run_id": "id",
        "wall_s": 12.3,
        "tokens_per_sec": 256.0,
        "weights_sha256": checkpoint.weights_sha256({"w": torch.full((3,), 30.0)}),
    }


def test_a_run_that_died_at_once_has_a_summary_too(tmp_path):
    summary = summary_file.summarize(RunFolder(tmp_path), Ending("again"), 128, None, 0.0)
    assert (summary["status"], summary["step"], summary["tokens"]) == ("KILLED", 0, 0)
    assert {
        summary[k]
        for k in ("train_loss", "val_loss", "checkpoint", "weights_sha256", "tokens_per_sec")
    } == {None}


def test_a_writer_waits_for_the_one_before_it_and_no_longer_than_it_was_told(tmp_path):
    with (
        lock.held(RunFolder(tmp_path).writer_lock),
        pytest.raises(HeldError),
        lock.held(RunFolder(tmp_path).writer_lock, wait_s=0.3),
    ):
        pass
    with (
        lock.held(RunFolder(tmp_path).driver_lock),
        lock.held(RunFolder(tmp_path).writer_lock, wait_s=5),
    ):
        assert (tmp_path / ".writer").read_text() == (tmp_path / ".lock").read_text()


def test_an_experiment_changed_before_its_first_checkpoint_starts_over_as_another_tracked_run(
    tmp_path,
):
    facts = {"params": {}, "tags": {}, "dataset": {"digest": "d"}}

    def begin(*words: str) -> str:
        identity.begin_attempt(RunFolder(tmp_path), load_experiment(None, list(words)), facts, {})
        return read_json(tmp_path / "run.json")["key"]

    first = begin()
    (tmp_path / "samples").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "timestamp": 1}\n')
    assert begin("train.log_interval=3") == first
    assert (tmp_path / "metrics.jsonl").exists()
    damaged = commit(tmp_path, 10, experiment())
    (damaged / "model.safetensors").write_bytes(b"")
    assert begin("schedule.max_lr=1e-5") != first
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "samples").exists()
    assert len(read_json(tmp_path / "run.json")["attempts"]) == 1
