"""A tokenizer that was trained on a corpus goes with the run: no command needs the corpus."""

import json

import pytest

from orchestrator.config.experiment import load_experiment
from orchestrator.data.prepare import prepare
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from pipelines import evaluate, inspect_batch, replay, sample
from tests.helpers.here import here
from tests.helpers.local_job import LocalTrainJob, without_ray
from tests.pipelines.conftest import SMALL


@pytest.fixture(scope="module")
def run(tiny_corpus, tmp_path_factory):
    """A run on a copy of the corpus, which does not exist any more."""
    folder = tmp_path_factory.mktemp("trained")
    corpus = folder / "copy.txt"
    corpus.write_bytes(tiny_corpus.read_bytes())
    words = [f"data.corpus={corpus}", f"data.dir={folder / 'data'}", "data.val_fraction=0.05"]
    experiment = load_experiment(None, ["name=run", *words, *SMALL, "data.tokenizer=bpe:290"])
    with here():
        prepare(experiment.data, folder / "data")
    run = RunFolder(folder / "run")
    run.path.mkdir()
    train(experiment, run, folder / "data", Worker(cpus=1))
    corpus.unlink()
    return run


def test_sample_is_text_of_the_merges(run, capsys):
    tokenizer = load_tokenizer("bpe:290", run.checkpoint(12))
    assert b" the" in tokenizer.tokens
    prompt = ["--prompt", "the cat", "--max-new-tokens", "9"]
    assert sample.main([str(run.checkpoint(12)), *prompt]) == 0
    assert "the cat" in capsys.readouterr().out


def test_evaluation_has_bits_per_byte_of_the_run(run, capsys):
    assert evaluate.main([str(run.path)]) == 0
    table = capsys.readouterr().out
    last = journal.read(run)[-1]
    assert f"{last['val/bits_per_byte']:.4f}" in table
    assert "the same bits" in table


def test_batch_is_shown_as_text(run, capsys):
    assert inspect_batch.main([str(run.checkpoint(12) / "experiment.yaml"), "--step", "3"]) == 0
    assert "290 ids of bpe:290" in capsys.readouterr().out


def test_replay_is_equal(run, capsys):
    assert replay.main([str(run.path)]) == 0
    assert "weights equal" in capsys.readouterr().out


def test_merges_are_in_the_checkpoint_and_in_the_manifest(run):
    stored = json.loads((run.checkpoint(12) / "tokenizer.json").read_text("utf-8"))
    manifest = json.loads((run.path.parent / "data" / "manifest.json").read_text("utf-8"))
    assert len(stored["merged"]) == 290 - 257
    assert stored.items() >= manifest["tokenizer"].items()
    assert manifest["tokenizer"]["trained_characters"] > 50_000


def test_last_sample_continues_the_prompt(tiny_corpus, tiny_dataset, tmp_path, capsys):
    words = ["train.sample_prompt=the cat ", "train.sample_tokens=40", "train.max_steps=1"]
    files = [f"data.corpus={tiny_corpus}", f"data.dir={tiny_dataset}", f"storage={tmp_path}"]
    with without_ray():
        assert LocalTrainJob(load_experiment(None, ["name=run", *SMALL, *files, *words])).run() == 0
    out = capsys.readouterr().out
    sample = out.split("──── sample (step-00000001.txt) ────\n")[1].split("\n────\n")[0]
    assert sample.startswith("the cat ")
    assert len(sample.rstrip("\n")) >= len("the cat ") + 30  # characters at the end may be spaces
