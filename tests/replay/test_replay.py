"""A run made again is the run, whatever happened to it meanwhile; where it is not, the difference and its cause are named."""

import json
import math
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.data.dataset import load_manifest
from orchestrator.errors import UserError
from orchestrator.replay import verdict
from orchestrator.replay.replay import Recorded, experiment_of, pieces, replay, stretch
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker

HELPER = Path(__file__).resolve().parent.parent / "helpers" / "train_rank.py"
SMALL = [
    "name=small",
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "model.block_size=32",
    "model.dropout=0.1",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
    "train.max_steps=20",
    "train.log_interval=3",
    "train.eval_interval=5",
    "train.eval_tokens=400",
    "train.checkpoint_interval=4",
    "train.keep=3",
    "schedule.max_lr=1e-2",
    "schedule.warmup_steps=4",
]
LOGGED = [0, 3, 5, 6, 9, 10, 12, 15, 18, 20]


@pytest.fixture(autouse=True)
def threads():
    """Replays set what their run had; other tests keep their own."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train_to(run_dir: Path, data_dir: Path, *words: str, cpus: int = 1) -> Path:
    run_dir.mkdir(exist_ok=True)
    train(load_experiment(None, [*SMALL, *words]), RunFolder(run_dir), data_dir, Worker(cpus=cpus))
    return run_dir


@pytest.fixture(scope="module")
def golden(tiny_dataset, tmp_path_factory) -> Path:
    """20 steps, with checkpoints of steps 12, 16 and 20."""
    run_dir = train_to(tmp_path_factory.mktemp("golden") / "small", tiny_dataset)
    assert checkpoint.steps(run_dir / "checkpoints")[-3:] == [12, 16, 20]
    return run_dir


@pytest.fixture
def run_dir(golden, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(golden, tmp_path / "small"))


@pytest.fixture
def again(tiny_dataset, tmp_path):
    """Replay a run's folder: its verdict."""

    def make(run_dir: Path, steps=None, data_dir: Path = tiny_dataset) -> verdict.Verdict:
        run, scratch = Recorded.read(run_dir), tmp_path / f"again-{uuid.uuid4().hex}"
        scratch.mkdir()
        return replay(run, stretch(run, steps), load_manifest(data_dir), scratch, lambda line: None)

    return make


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def change_line(run_dir: Path, step: int, change) -> None:
    """`change` the journal's line of `step`, in place."""
    lines = journal.read(RunFolder(run_dir))
    for line in lines:
        if line["step"] == step:
            change(line)
    RunFolder(run_dir).journal_file.write_text(
        "".join(json.dumps(line) + "\n" for line in lines), "utf-8"
    )


def write_experiment(run_dir: Path, *words: str) -> None:
    (run_dir / "experiment.yaml").write_text(
        load_experiment(None, [*SMALL, *words]).to_yaml(), "utf-8"
    )


def kinds(result: verdict.Verdict) -> list[str]:
    return [cause.kind for cause in result.causes()]


# ---- equal ----
@pytest.mark.parametrize(
    ("steps", "begin", "logged", "compared"),
    [
        (None, 16, [18, 20], [20]),
        ((None, None), None, LOGGED, [12, 16, 20]),
        ((13, 17), 12, [15], [16]),
        ((14, None), 12, [15, 18, 20], [16, 20]),
        ((1, 8), None, [3, 5, 6], []),
        ((16, 19), 16, [18], []),
    ],
)
def test_an_unchanged_run_is_equal_and_untouched(golden, again, steps, begin, logged, compared):
    before = bytes_of(golden)
    result = again(golden, steps)
    assert (result.equal, result.begin, result.lines) == (True, begin, len(logged))
    standing = [
        step for step in checkpoint.steps(golden / "checkpoints") if step < 12
    ]  # the best one may be among these
    assert [step for step in result.weights if step not in standing] == compared
    assert result.causes() == []
    assert bytes_of(golden) == before


def test_two_workers_are_one(tiny_dataset, tmp_path, again):
    run_dir, store = tmp_path / "wide", tmp_path / "store"
    run_dir.mkdir()
    jobs = [
        {
            "rank": r,
            "world_size": 2,
            "store": str(store),
            "run_dir": str(run_dir),
            "data_dir": str(tiny_dataset),
            "overrides": SMALL,
        }
        for r in range(2)
    ]
    workers = [
        subprocess.Popen(
            [sys.executable, str(HELPER), json.dumps(job)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for job in jobs
    ]
    assert [w.wait(120) for w in workers] == [0, 0]
    result = again(run_dir, (None, None))
    assert (result.equal, result.lines) == (True, len(LOGGED))


def test_a_run_that_was_killed_is_made_again_to_its_last_line(tiny_dataset, tmp_path, again):
    (tmp_path / "killed").mkdir()
    folder = RunFolder(tmp_path / "killed")
    lines = Trainer(load_experiment(None, SMALL), folder, tiny_dataset, Worker(cpus=1)).run()
    assert next(line for line in lines if line["step"] == 18)
    lines.close()
    result = again(tmp_path / "killed")
    assert (result.equal, result.last_step, result.begin) == (True, 18, 12)
    assert list(result.weights) == [16]


def test_a_run_that_was_asked_to_stop_before_its_line_was_written(tiny_dataset, tmp_path, again):
    run_dir, words = tmp_path / "asked", ["train.checkpoint_interval=null", "train.keep=9"]
    run_dir.mkdir()
    experiment = load_experiment(None, [*SMALL, *words])
    run = Trainer(
        experiment,
        RunFolder(run_dir),
        tiny_dataset,
        Worker(cpus=1),
        stop_requested=lambda: run.state.step >= 14,
    )
    assert [line["step"] for line in run.run()][-1] == 12
    assert checkpoint.steps(run_dir / "checkpoints") == [
        15
    ]  # whose line is due, and written by the next attempt
    train_to(run_dir, tiny_dataset, *words)
    for steps, begin in ((None, 15), ((15, 20), 15), ((3, 20), None)):
        result = again(run_dir, steps)
        assert (result.equal, result.begin) == (True, begin)


@pytest.mark.parametrize("end", [10, 11])
def test_a_run_that_grew_has_no_trace_of_its_first_end(tiny_dataset, tmp_path, again, end):
    train_to(tmp_path / "grown", tiny_dataset, f"train.max_steps={end}", "schedule.decay_steps=20")
    train_to(tmp_path / "grown", tiny_dataset, "schedule.decay_steps=20")
    assert again(tmp_path / "grown", (None, None)).equal


def attempt(from_step: int, cpus: int, log_interval: int, eval_interval: int) -> dict:
    return {
        "from_step": from_step,
        "layout": {"num_workers": 1, "cpus_per_worker": cpus, "use_gpu": False},
        "train.log_interval": log_interval,
        "train.eval_interval": eval_interval,
    }


def test_every_attempt_has_its_own_intervals_and_threads(tiny_dataset, tmp_path, again):
    """No checkpoint of the first attempt stands any more: run.json tells."""
    run_dir = tmp_path / "changed"
    keep = ["train.keep=1", "train.eval_interval=null", "train.allow_drift=true"]
    run_dir.mkdir()
    first = Trainer(
        load_experiment(None, [*SMALL, *keep]),
        RunFolder(run_dir),
        tiny_dataset,
        Worker(cpus=1),
        end_step=7,
    )
    assert [line["step"] for line in first.run()] == [3, 6]
    train_to(run_dir, tiny_dataset, *keep, "train.log_interval=4", cpus=2)
    assert checkpoint.steps(run_dir / "checkpoints") == [20]
    attempts = [
        attempt(0, 1, 3, None),
        attempt(12, 1, 3, None),
        attempt(7, 2, 4, None),
    ]  # the second one's steps were undone
    (run_dir / "run.json").write_text(json.dumps({"attempts": attempts}))
    assert again(run_dir, (None, None)).equal
    (run_dir / "run.json").unlink()
    assert not again(run_dir, (None, None)).equal


def test_a_checkpoint_tells_the_threads_that_run_json_does_not(tiny_dataset, tmp_path, again):
    run_dir = train_to(tmp_path / "run", tiny_dataset, cpus=2)
    assert again(run_dir).equal


def test_a_trial_of_a_sweep_is_made_again_as_one_run(sweeps, again):
    """The curve is put together from stages, the checkpoints are the last one's."""
    study = sweeps.open("sweep.grid={train.max_steps: [10, 20]}")
    assert len(sweeps.run(study)) > len(study.trials)
    for trial in study.trials:
        result = again(sweeps.folder / "sweep" / "trials" / trial, (None, None))
        assert result.equal
        assert result.weights


# ---- different ----
def test_one_ulp_in_the_journal_is_found_where_it_is(run_dir, again):
    def nudge(line):
        line["train/loss"] = math.nextafter(line["train/loss"], 9.0)

    change_line(run_dir, 15, nudge)
    result = again(run_dir, (12, None))
    assert (result.first.step, result.first.key, result.first.ulps) == (15, "train/loss", 1)
    assert kinds(result) == ["journal"]  # the weights after it are the same
    assert result.first.then.hex() in str(result.first)
    assert repr(result.first.now) in str(result.first)
    stored = json.loads(json.dumps(result.to_json()))["first"]
    assert (
        float.fromhex(stored["then"]["hex"])
        == float(stored["then"]["decimal"])
        == result.first.then
    )
    assert again(run_dir, (16, None)).equal


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda line: line.pop("val/loss"), "step 15, val/loss: not there then, but now"),
        (
            lambda line: line.update({"train/skipped_steps": 1.0}),
            "step 15, train/skipped_steps: there then, not now",
        ),
        (lambda line: line.update({"step": 14}), "step 14, train/loss: there then, not now"),
    ],
)
def test_what_is_missing_or_too_much_is_named(run_dir, again, change, said):
    change_line(run_dir, 15, change)
    assert str(again(run_dir, (12, 16)).first) == said


def test_one_ulp_in_the_weights_is_found(run_dir, again):
    path = run_dir / "checkpoints" / "step-00000016"
    tensors = {
        name: {k: v.clone() for k, v in checkpoint.load_tensors(path, name).items()}
        for name in ("model", "optimizer")
    }
    name = sorted(tensors["model"])[-1]
    flat = tensors["model"][name].reshape(-1)
    flat[3] = torch.nextafter(flat[3], torch.tensor(9.0))
    texts = {
        n: (path / n).read_text("utf-8")
        for n in ("experiment.yaml", "model.json", "state.json", "tokenizer.json")
    }
    facts = {
        k: v
        for k, v in checkpoint.read_manifest(path).items()
        if k not in ("format", "step", "parts")
    }
    checkpoint.save(run_dir / "checkpoints", 16, tensors, texts, facts)
    result = again(run_dir, (12, 16))
    assert result.weights == {16: False}
    assert (result.first.key, result.first.ulps) == (
        f"model {name}[3] (1 of {flat.numel():,} differ)",
        1,
    )
    assert kinds(result) == ["unknown"]


def test_another_seed_is_named(run_dir, again):
    write_experiment(run_dir, "train.seed=2")
    result = again(run_dir)
    assert not result.equal
    assert result.weights == {20: False}
    assert kinds(result) == ["seed"]
    assert "train.seed: 1337 there, 2 here" in result.causes()[0].what


def test_another_micro_batch_is_another_experiment_and_other_numerics(run_dir, again):
    write_experiment(run_dir, "train.micro_batch_size=4")
    assert {"experiment", "numerics"} == set(kinds(again(run_dir)))
    write_experiment(
        run_dir, "train.log_interval=1", "train.keep=9"
    )  # what may change at any time changes nothing here
    result = again(run_dir)
    assert (result.equal, result.changed) == (True, [])


def test_each_piece_has_its_attempts_settings_and_every_checkpoint_is_compared(run_dir, again):
    write_experiment(run_dir, "train.keep=1")
    assert again(run_dir, (None, None)).weights == {12: True, 16: True, 20: True}
    attempts = [
        {"from_step": 0, "train.on_nonfinite": "skip"},
        {"from_step": 16, "train.on_nonfinite": "stop"},
    ]
    (run_dir / "run.json").write_text(json.dumps({"attempts": attempts}))
    run = Recorded.read(run_dir)
    found = pieces(run, stretch(run, (None, None)))
    assert [(p.stop, p.settings["on_nonfinite"]) for p in found] == [
        (12, "skip"),
        (16, "skip"),
        (20, "stop"),
    ]


def test_what_changed_without_effect_is_said_and_no_cause(run_dir, again):
    (run_dir / "run.json").write_text(
        json.dumps({"tags": {"source.sha256": "0" * 64, "mlflow.source.git.commit": "abcdef" * 7}})
    )
    result = again(run_dir)
    assert (result.equal, result.causes()) == (True, [])
    assert result.rows()["changed since"].startswith("code: commit abcdefabcdef then, ")
    change_line(run_dir, 18, lambda line: line.update({"val/loss": 1.0}))
    write_experiment(run_dir, "train.seed=2")
    assert kinds(again(run_dir)) == ["seed", "code"]


def test_other_tokens_are_named(run_dir, golden, tiny_corpus, tmp_path, ray_cluster, again):
    from orchestrator.data.prepare import prepare

    text = tmp_path / "other.txt"
    text.write_text(tiny_corpus.read_text("utf-8")[::-1], "utf-8")
    other = tmp_path / "other"
    prepare(load_experiment(None, [f"data.corpus={text}", "data.tokenizer=char"]).data, other)
    result = again(run_dir, data_dir=other)
    assert kinds(result) == ["data"]
    assert str(other) in result.causes()[0].what
    assert result.first.step == 18


def test_a_damaged_shard_is_named_and_nothing_is_trained_on_it(
    golden, tiny_dataset, tmp_path, again
):
    copy = Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))
    shard = next(copy.glob("train-*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    result = again(golden, data_dir=copy)
    assert (result.equal, result.impossible, kinds(result)) == (False, True, ["data"])
    assert shard.name in result.causes()[0].what
    assert "cannot be made again" in result.sentence()


# ---- checkpoints that are not whole, and mistakes ----
def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_named(run_dir, again):
    flip(run_dir / "checkpoints" / "step-00000016" / "optimizer.safetensors")
    result = again(run_dir, (17, None))
    assert (result.equal, result.begin, list(result.weights)) == (True, 12, [20])
    assert "step-00000016" in result.passed_over[0]
    for step in checkpoint.steps(run_dir / "checkpoints"):
        if step != 16:
            flip(checkpoint.path_of(run_dir / "checkpoints", step) / "model.safetensors")
    with pytest.raises(UserError, match="holds no whole checkpoint"):
        Recorded.read(run_dir)


def test_one_checkpoint_means_the_whole_run(run_dir):
    checkpoint.keep_only(run_dir / "checkpoints", 20)
    s = stretch(Recorded.read(run_dir))
    assert (s.begin, s.first, s.last) == (None, 0, 20)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((5, 5), "5:5 is no stretch of this run, which has steps 0:20"),
        ((9, 3), "9:3 is no stretch"),
        ((10, 21), "10:21 is no stretch"),
        ((20, None), "20:20 is no stretch"),
        (
            (13, 14),
            "nothing was logged in steps 13:14, and no checkpoint stands there; the run logged at steps 0, 3",
        ),
    ],
)
def test_steps_that_the_run_does_not_have_are_refused(golden, steps, said):
    with pytest.raises(UserError, match=said):
        stretch(Recorded.read(golden), steps)


def test_a_folder_without_an_experiment_is_its_checkpoints(golden, run_dir):
    run = Recorded.read(golden)
    assert experiment_of(run, stretch(run)) == load_experiment(None, SMALL)
    write_experiment(run_dir, "train.seed=3")
    run = Recorded.read(run_dir)
    assert experiment_of(run, stretch(run)).train.seed == 3


# ---- distances ----
@pytest.mark.parametrize(
    ("a", "b", "formats", "apart"),
    [
        (1.0, math.nextafter(1.0, 2.0), "dq", 1),
        (0.0, -0.0, "dq", 0),
        (-5e-324, 5e-324, "dq", 2),
        (1.0, 2.0, "dq", 2**52),
        (1.0, 2.0, "fi", 2**23),
        (-1.0, -2.0, "fi", 2**23),
        (math.nan, 1.0, "dq", None),
        (None, 1.0, "dq", None),
    ],
)
def test_ulps(a, b, formats, apart):
    assert verdict.ulps(a, b, formats) == verdict.ulps(b, a, formats) == apart


def test_zeros_differ_in_their_sign_and_nan_is_itself():
    assert verdict.of_lines(1, {"val/loss": math.nan}, {"val/loss": math.nan}) == []
    assert len(verdict.of_lines(1, {"val/loss": 0.0}, {"val/loss": -0.0})) == 1
    same = {"w": torch.tensor([1.0, math.nan])}
    assert verdict.of_tensors(1, "model", same, {"w": same["w"].clone()}) == []
    assert len(verdict.of_tensors(1, "model", same, {"w": torch.tensor([1.0, 2.0])})) == 1
    [found] = verdict.of_tensors(1, "model", same, {"w": torch.zeros(3)})
    assert str(found) == "step 1, model w: float32 (2,) then, float32 (3,) now"
