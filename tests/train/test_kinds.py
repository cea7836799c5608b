"""What holds for a GPT-2 with AdamW holds for every other model and optimizer, bit for bit."""

import signal
from pathlib import Path

import pytest
import torch

from model.generate import generate
from orchestrator.checkpoint import store
from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.data.dataset import load_manifest
from orchestrator.replay.recorded import RecordedRun
from orchestrator.replay.replay import Replay
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker
from orchestrator.train.state import load_model
from tests.helpers import train_rank
from tests.helpers.curves import final_outcome as outcome

FILES = Path(__file__).parent.parent / "own"
SMALL = [
    "name=small",
    "data.tokenizer=char",
    "model.block_size=32",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=2",
    "train.global_batch_size=16",
    "train.max_steps=24",
    "train.log_interval=5",
    "train.eval_interval=8",
    "train.eval_tokens=1500",
    "train.checkpoint_interval=4",
    "schedule.max_lr=1e-2",
]
SHAPE = ["model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.dropout=0.1"]
MUON = ["optim.kind=muon", "optim.momentum_warmup_steps=10", "optim.cautious=true"]
EVERY_PART = "modern with every part, and muon"
OWN = "a model and an optimizer of the user"
KINDS = {
    "gpt2 and muon": [*SHAPE, *MUON],
    "modern and muon": ["model.kind=modern", *SHAPE, *MUON],
    EVERY_PART: [
        "model.kind=modern",
        *SHAPE,
        *MUON,
        "model.n_kv_head=1",
        "model.window=SL",
        "model.value_embeddings=alternate",
        "model.layer_scalars=true",
        "model.layer_smear=true",
        "model.norm_gains=true",
        "model.bias=true",
        "model.logit_cap=15",
        "model.loss_chunk=7",
        "train.global_batch_size=null",
        "train.batch_schedule={0: 16, 9: 32, 17: 16}",
        "schedule.weight_decay.kind=cosine",
        "train.ema=0.9",
    ],
    OWN: [
        f"model.kind={FILES}/conv.py:GatedConv",
        f"optim.kind={FILES}/lion.py:lion",
        "model.width=32",
        "model.n_layer=2",
        "model.dropout=0.1",
    ],
    "modern and adamw": ["model.kind=modern", *SHAPE, "optim.groups.embedding.lr_scale=3"],
}


class Kind:
    """A model with an optimizer, and the outcome of its uninterrupted run on one worker."""

    def __init__(self, words: list[str], folder: RunFolder, data_dir: Path) -> None:
        self.words = [*SMALL, *words]
        self.data_dir = data_dir
        self.whole = folder
        self.train(folder)
        self.outcome = outcome(folder)

    def experiment(self, *words: str) -> Experiment:
        return load_experiment(None, [*self.words, *words])

    def train(self, folder: RunFolder, *words: str) -> int:
        folder.path.mkdir(exist_ok=True)
        return train(self.experiment(*words), folder, self.data_dir, Worker(cpus=1))


def parameters() -> list:
    """Return the kinds. Those that others contain are slow tests."""
    fast = (EVERY_PART, OWN)
    return [pytest.param(k, marks=[] if k in fast else pytest.mark.slow) for k in KINDS]


@pytest.fixture(scope="module", params=parameters())
def kind(request, tiny_dataset, tmp_path_factory) -> Kind:
    folder = RunFolder(tmp_path_factory.mktemp("kind") / "small")
    return Kind(KINDS[request.param], folder, tiny_dataset)


def test_training_lowers_the_loss(kind):
    losses = [line["train/loss"] for line in kind.outcome["curve"] if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("world_size", [3, 4])  # the next test has two
def test_several_workers_have_the_same_bits_as_one(kind, folder, world_size):
    processes = train_rank.start(folder, kind.data_dir, kind.words, world_size)
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * world_size
    assert outcome(folder) == kind.outcome


def test_run_killed_on_two_workers_and_resumed_on_one_equals_the_whole(kind, folder):
    processes = train_rank.start(folder, kind.data_dir, kind.words, 2, killed_after=8)
    while max(folder.checkpoint_steps(), default=0) < 8:
        assert all(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
    assert kind.train(folder) == 24
    assert outcome(folder) == kind.outcome
    assert "drift" not in {event["kind"] for event in events.read(folder)}


def test_stage_that_starts_from_a_checkpoint_of_another_equals_the_whole(kind, folder, tmp_path):
    before = RunFolder(tmp_path / "before")
    before.path.mkdir()
    experiment = kind.experiment()
    list(Trainer(experiment, before, kind.data_dir, Worker(), end_step=12).run())
    trainer = Trainer(experiment, folder, kind.data_dir, Worker(), parent=before.checkpoint(12))
    for _ in trainer.run():
        pass
    found = outcome(folder)
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert found[name] == kind.outcome[name]


def test_replay_of_the_whole_run_has_its_bits(kind, tmp_path):
    recorded = RecordedRun(kind.whole)
    replay = Replay(recorded, recorded.stretch((0, 24)))
    report = replay.compare(load_manifest(kind.data_dir), RunFolder(tmp_path), lambda line: None)
    assert report.equal
    assert report.lines == len(kind.outcome["curve"])
    assert 24 in report.weights


def test_stored_model_gives_the_text_of_a_model_without_a_cache(kind):
    model = load_model(store.Content(store.latest_valid(kind.whole.checkpoints)))
    prompt = torch.arange(5)[None]
    drawn = generate(model, prompt, 40, temperature=0)  # longer than the context
    for end in range(5, 45):
        with torch.no_grad():
            logits = model(drawn[:, max(0, end - 32) : end])
        # A cache may round otherwise.
        best = logits[0, -1].max()
        assert logits[0, -1, drawn[0, end]] >= best - 1e-4
