"""A replayed stretch equals the run; otherwise the report names the difference and its cause."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.data.dataset import load_manifest
from orchestrator.errors import UserError
from orchestrator.replay.recorded import RecordedRun
from orchestrator.replay.replay import Replay
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker
from tests.helpers import train_rank
from tests.helpers.checkpoints import save

SMALL = [
    "name=small",
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "model.block_size=32",
    "model.dropout=0.1",
    "model.pad_vocab_to=1",
    "train.dtype=float32",
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
WHOLE = (None, None)


@pytest.fixture(autouse=True)
def threads():
    """Restore the number of threads: a replay sets that of its run."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def experiment_with(*words):
    return load_experiment(None, [*SMALL, *words])


def make_trainer(folder, data_dir, *words, cpus=1, **options):
    folder.path.mkdir(exist_ok=True)
    return Trainer(experiment_with(*words), folder, data_dir, Worker(cpus=cpus), **options)


def train_run(folder, data_dir, *words, cpus=1):
    folder.path.mkdir(exist_ok=True)
    train(experiment_with(*words), folder, data_dir, Worker(cpus=cpus))
    return folder


@pytest.fixture(scope="module")
def golden(tiny_dataset, tmp_path_factory) -> RunFolder:
    """20 steps, with checkpoints of steps 12, 16 and 20, and perhaps of the best step before."""
    folder = train_run(RunFolder(tmp_path_factory.mktemp("golden") / "small"), tiny_dataset)
    assert folder.checkpoint_steps()[-3:] == [12, 16, 20]
    return folder


@pytest.fixture
def run(golden, tmp_path) -> RunFolder:
    """A copy that a test may change."""
    return RunFolder(shutil.copytree(golden.path, tmp_path / "small"))


@pytest.fixture
def replay(tiny_dataset, tmp_path_factory):
    """Replay the steps of a run folder. Return the report."""

    def replay(folder, steps=None, data_dir=tiny_dataset):
        recorded = RecordedRun(folder)
        scratch = RunFolder(tmp_path_factory.mktemp("scratch"))
        made = Replay(recorded, recorded.stretch(steps))
        return made.compare(load_manifest(data_dir), scratch, lambda line: None)

    return replay


def contents(folder):
    return {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def change_line(folder, step, change):
    lines = journal.read(folder)
    for line in lines:
        if line["step"] == step:
            change(line)
    folder.journal_file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_experiment(folder, *words):
    folder.experiment_file.write_text(experiment_with(*words).to_yaml())


def write_record(folder, **record):
    folder.run_file.write_text(json.dumps({"key": "k", **record}))


def kinds(report):
    return [cause.kind for cause in report.causes()]


# ---- equal ----


@pytest.mark.parametrize(
    ("steps", "begin", "logged", "compared"),
    [
        (None, 16, [18, 20], [20]),
        (WHOLE, None, LOGGED, [12, 16, 20]),
        ((13, 17), 12, [15], [16]),
        ((14, None), 12, [15, 18, 20], [16, 20]),
        ((1, 8), None, [3, 5, 6], []),
        ((16, 19), 16, [18], []),
    ],
)
def test_unchanged_run_is_equal_and_not_modified(golden, replay, steps, begin, logged, compared):
    before = contents(golden)
    report = replay(golden, steps)
    assert report.equal
    assert report.stretch.begin == begin
    assert report.lines == len(logged)
    assert [step for step in report.weights if step >= 12] == compared
    assert report.causes() == []
    assert contents(golden) == before


def test_run_with_other_batches_and_an_average_is_equal(tiny_dataset, tmp_path, replay):
    words = ["train.global_batch_size=null", "train.batch_schedule={0: 8, 14: 16}", "train.ema=0.9"]
    folder = train_run(RunFolder(tmp_path / "rising"), tiny_dataset, *words)
    assert replay(folder, (13, 20)).equal
    name, _ = nudge_weight(folder, 20, "ema")
    [difference] = replay(folder, (16, 20)).differences
    assert difference.key.startswith(f"ema {name}[3]")


def test_run_on_two_workers_is_replayed_by_one(tiny_dataset, tmp_path, replay):
    folder = RunFolder(tmp_path / "wide")
    folder.path.mkdir()
    workers = train_rank.start(folder, tiny_dataset, SMALL, 2)
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    report = replay(folder, WHOLE)
    assert report.equal
    assert report.lines == len(LOGGED)


def test_killed_run_is_replayed_to_its_last_line(tiny_dataset, tmp_path, replay):
    folder = RunFolder(tmp_path / "killed")
    lines = make_trainer(folder, tiny_dataset).run()
    assert next(line for line in lines if line["step"] == 18)
    lines.close()
    report = replay(folder)
    assert report.equal
    assert (report.stretch.begin, report.stretch.last) == (12, 18)
    assert list(report.weights) == [16]


def test_run_that_was_stopped_before_its_line_was_written(tiny_dataset, tmp_path, replay):
    folder = RunFolder(tmp_path / "asked")
    words = ["train.checkpoint_interval=null", "train.keep=9"]
    trainer = make_trainer(
        folder, tiny_dataset, *words, stop_requested=lambda: trainer.state.step >= 14
    )
    assert [line["step"] for line in trainer.run()][-1] == 12
    assert folder.checkpoint_steps() == [15]  # the next attempt writes its line
    train_run(folder, tiny_dataset, *words)
    for steps, begin in ((None, 15), ((15, 20), 15), ((3, 20), None)):
        report = replay(folder, steps)
        assert report.equal
        assert report.stretch.begin == begin


@pytest.mark.parametrize("end", [10, 11])
def test_extended_run_is_equal(tiny_dataset, tmp_path, replay, end):
    folder = RunFolder(tmp_path / "grown")
    train_run(folder, tiny_dataset, f"train.max_steps={end}", "schedule.decay_steps=20")
    train_run(folder, tiny_dataset, "schedule.decay_steps=20")
    assert replay(folder, WHOLE).equal


def attempt(from_step, cpus, log_interval):
    return {
        "from_step": from_step,
        "layout": {"num_workers": 1, "cpus_per_worker": cpus, "use_gpu": False},
        "train.log_interval": log_interval,
        "train.eval_interval": None,
    }


def test_each_attempt_has_its_own_intervals_and_threads(tiny_dataset, tmp_path, replay):
    """The first attempt left no checkpoint, so only run.json tells its settings."""
    folder = RunFolder(tmp_path / "changed")
    words = ["train.keep=1", "train.eval_interval=null", "train.allow_drift=true"]
    first = make_trainer(folder, tiny_dataset, *words, end_step=7)
    assert [line["step"] for line in first.run()] == [3, 6]
    train_run(folder, tiny_dataset, *words, "train.log_interval=4", cpus=2)
    assert folder.checkpoint_steps() == [20]
    # The steps of the second attempt were replaced by those of the third.
    write_record(folder, attempts=[attempt(0, 1, 3), attempt(12, 1, 3), attempt(7, 2, 4)])
    assert replay(folder, WHOLE).equal
    folder.run_file.unlink()
    assert not replay(folder, WHOLE).equal


def test_checkpoint_tells_the_number_of_threads(tiny_dataset, tmp_path, replay):
    folder = train_run(RunFolder(tmp_path / "run"), tiny_dataset, cpus=2)
    assert replay(folder).equal


def test_trial_of_a_sweep_is_replayed_as_one_run(sweeps, replay):
    """Its curve is assembled from stages; its checkpoints are those of the last stage."""
    study = sweeps.open("sweep.grid={train.max_steps: [10, 20]}")
    assert len(sweeps.run(study)) > len(study.trials)
    for trial in study.trials:
        report = replay(RunFolder(sweeps.folder / "sweep" / "trials" / trial), WHOLE)
        assert report.equal
        assert report.weights


# ---- different ----


def test_one_ulp_in_the_journal_is_found(run, replay):
    def nudge(line):
        line["train/loss"] = math.nextafter(line["train/loss"], 9.0)

    change_line(run, 15, nudge)
    report = replay(run, (12, None))
    first = report.differences[0]
    assert (first.step, first.key) == (15, "train/loss")
    assert report.weights and all(report.weights.values())
    assert kinds(report) == ["unknown"]
    assert first.then.hex() in str(first)
    assert repr(first.now) in str(first)
    stored = json.loads(json.dumps(report.to_json()))["first"]["then"]
    assert float.fromhex(stored["hex"]) == float(stored["decimal"]) == first.then
    assert replay(run, (16, None)).equal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.pop("val/loss"), "step 15, val/loss: missing in the run"),
        (
            lambda line: line.update({"train/skipped_steps": 1.0}),
            "step 15, train/skipped_steps: missing in the replay",
        ),
        (lambda line: line.update({"step": 14}), "step 14, train/loss: missing in the replay"),
    ],
)
def test_missing_and_additional_values_are_named(run, replay, change, message):
    change_line(run, 15, change)
    assert str(replay(run, (12, 16)).differences[0]) == message


def test_one_ulp_in_the_weights_is_found(run, replay):
    name, size = nudge_weight(run, 16)
    report = replay(run, (12, 16))
    first = report.differences[0]
    assert report.weights == {16: False}
    assert first.key == f"model {name}[3] (1 of {size:,} differ)"
    assert kinds(report) == ["unknown"]


def nudge_weight(folder, step, changed="model"):
    """Change the fourth element of a tensor, with a valid manifest. Return its name and size."""
    path = folder.checkpoint(step)
    manifest = checkpoint.read_manifest(path)
    tensors = {
        part: {name: tensor.clone() for name, tensor in checkpoint.load_tensors(path, part).items()}
        for part in {"model", "optimizer", changed}
    }
    name = max(tensors[changed])
    flat = tensors[changed][name].reshape(-1)
    flat[3] = torch.nextafter(flat[3], torch.tensor(9.0))
    texts = {
        part: (path / part).read_text("utf-8")
        for part in manifest["parts"]
        if not part.endswith(".safetensors")
    }
    own = ("format", "step", "parts")
    facts = {key: value for key, value in manifest.items() if key not in own}
    save(folder.checkpoints, step, tensors, texts, facts)
    return name, flat.numel()


def test_changed_seed_is_the_cause(run, replay):
    write_experiment(run, "train.seed=2")
    report = replay(run)
    assert not report.equal
    assert report.weights == {20: False}
    assert kinds(report) == ["seed"]
    assert "train.seed: before 1337, now 2" in report.causes()[0].what


def test_report_blames_micro_batch_but_not_intervals(run, replay):
    write_experiment(run, "train.micro_batch_size=4")
    assert set(kinds(replay(run))) == {"experiment", "numerics"}
    write_experiment(run, "train.log_interval=1", "train.keep=9")
    report = replay(run)
    assert report.equal
    assert report.changes == []


def test_every_checkpoint_is_compared_although_the_run_keeps_one(run, replay):
    write_experiment(run, "train.keep=1")
    assert replay(run, WHOLE).weights.items() >= {12: True, 16: True, 20: True}.items()


def test_segments_have_the_settings_of_their_attempts(run):
    attempts = [
        {"from_step": 0, "train.on_nonfinite": "skip"},
        {"from_step": 16, "train.on_nonfinite": "stop"},
    ]
    write_record(run, attempts=attempts)
    recorded = RecordedRun(run)
    segments = Replay(recorded, recorded.stretch((12, 20))).segments
    found = [(segment.end, segment.settings["train.on_nonfinite"]) for segment in segments]
    assert found == [(16, "skip"), (20, "stop")]


def test_change_without_effect_is_reported_but_is_no_cause(run, replay):
    tags = {"source.sha256": "0" * 64, "mlflow.source.git.commit": "abcdef" * 7}
    write_record(run, tags=tags)
    report = replay(run)
    assert report.equal
    assert report.causes() == []
    changed = str(report.rows()["changed since"])
    assert changed.startswith("code: commit abcdefabcdef then, ")
    change_line(run, 18, lambda line: line.update({"val/loss": 1.0}))
    write_experiment(run, "train.seed=2")
    assert kinds(replay(run)) == ["seed", "code"]


def test_other_tokens_are_the_cause(run, tiny_corpus, tmp_path, replay):
    from orchestrator.data.prepare import prepare

    corpus = tmp_path / "other.txt"
    corpus.write_text(tiny_corpus.read_text("utf-8")[::-1], "utf-8")
    other = tmp_path / "other"
    prepare(load_experiment(None, [f"data.corpus={corpus}", "data.tokenizer=char"]).data, other)
    report = replay(run, data_dir=other)
    assert kinds(report) == ["data"]
    assert str(other) in report.causes()[0].what
    assert report.differences[0].step == 18


def test_nothing_is_trained_on_a_damaged_shard(golden, tiny_dataset, tmp_path, replay):
    copy = Path(shutil.copytree(tiny_dataset, tmp_path / "copy"))
    shard = next(copy.glob("train-*.parquet"))
    flip_bit(shard)
    report = replay(golden, data_dir=copy)
    assert not report.equal
    assert report.is_empty
    assert kinds(report) == ["data"]
    assert shard.name in report.causes()[0].what
    assert "cannot be trained again" in report.sentence()


# ---- damaged checkpoints, wrong steps ----


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoint_is_skipped_and_named(run, replay):
    flip_bit(run.checkpoint(16) / "optimizer.safetensors")
    report = replay(run, (17, None))
    assert report.equal
    assert report.stretch.begin == 12
    assert list(report.weights) == [20]
    assert "step-00000016" in report.damaged[0]
    for step in run.checkpoint_steps():
        if step != 16:
            flip_bit(run.checkpoint(step) / "model.safetensors")
    with pytest.raises(UserError, match="has no valid checkpoint"):
        RecordedRun(run)


def test_run_with_one_checkpoint_is_replayed_from_the_start(run):
    checkpoint.keep_only(run.checkpoints, 20)
    stretch = RecordedRun(run).stretch()
    assert (stretch.begin, stretch.first, stretch.last) == (None, 0, 20)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((5, 5), "5:5 is not within this run, which has steps 0:20"),
        ((9, 3), "9:3 is not within this run"),
        ((10, 21), "10:21 is not within this run"),
        ((20, None), "20:20 is not within this run"),
        ((13, 14), "nothing was logged in steps 13:14, and they have no checkpoint"),
    ],
)
def test_steps_that_the_run_does_not_have_are_refused(golden, steps, message):
    with pytest.raises(UserError, match=message):
        RecordedRun(golden).stretch(steps)


def test_folder_without_experiment_has_that_of_its_checkpoint(golden, run):
    assert RecordedRun(golden).experiment(20) == experiment_with()
    write_experiment(run, "train.seed=3")
    assert RecordedRun(run).experiment(20).train.seed == 3
