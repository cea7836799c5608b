"""evaluate.py gives the loss that training logged, bit for bit, on the tokens of the run only."""

import json
import math
import shutil

import pytest
import torch

from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.data.batches import TokenStream
from orchestrator.data.dataset import load_manifest, write_manifest
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.runs import journal
from orchestrator.runs.folder import RunFolder
from orchestrator.train import state
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.train.trained import open_checkpoint
from pipelines.evaluate import main, measure


def table_of(capsys) -> dict[str, str]:
    """Return the rows of the printed table by name."""
    lines = capsys.readouterr().out.splitlines()
    return dict(map(str.strip, line.strip().split("  ", 1)) for line in lines)


@pytest.mark.parametrize("step", [4, 8, 12])
def test_loss_equals_logged_loss(trained_run, tiny_dataset, capsys, step):
    folder = checkpoint.path_of(trained_run / "checkpoints", step)
    [logged] = [r for r in journal.read(RunFolder(trained_run)) if r["step"] == step]
    result = measure(
        open_checkpoint(folder, "cpu"), load_manifest(tiny_dataset), "val", None
    ).result
    assert (result.loss, result.bits_per_byte) == (logged["val/loss"], logged["val/bits_per_byte"])
    assert main([str(folder)]) == 0
    assert table_of(capsys)["logged loss"] == f"{logged['val/loss']:.6f} (the same bits)"


def test_numbers_equal_their_definitions(trained_run, tiny_dataset, capsys):
    """The expected values are computed window by window, without the code of the evaluation."""
    folder = checkpoint.path_of(trained_run / "checkpoints", 12)
    model, stream = state.load_model(checkpoint.Content(folder)), TokenStream(tiny_dataset, "val")
    lengths = load_tokenizer("char", folder).byte_lengths
    ids = torch.from_numpy(stream.read(0, stream.tokens).astype("int64"))
    nats = 0.0
    with torch.no_grad():
        for i in range(0, len(ids) - 1, 32):
            window = ids[i : i + 33]
            nats += model(window[None, :-1], window[None, 1:], reduction="window").item()
    main([str(trained_run)])
    table, size = table_of(capsys), int(lengths[ids[1:].numpy()].sum())
    assert table["targets"] == f"{len(ids) - 1:,} tokens, {size:,} bytes"
    assert float(table["loss"].split()[0]) == pytest.approx(nats / (len(ids) - 1), abs=2e-6)
    assert float(table["perplexity"]) == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)
    assert float(table["bits per byte"]) == pytest.approx(nats / math.log(2) / size, abs=2e-6)


def test_first_tokens_of_train_split(trained_run, capsys):
    main([str(trained_run), "--split", "train", "--tokens", "501"])
    table = table_of(capsys)
    assert table["targets"].startswith("500 tokens")
    assert table["split"].startswith("train")
    assert "logged loss" not in table


def test_copied_checkpoint_uses_given_data_dir(trained_run, tiny_dataset, tmp_path, capsys):
    shutil.copytree(tiny_dataset, tmp_path / "tokens")
    shutil.copytree(trained_run / "checkpoints" / "step-00000012", tmp_path / "copied")
    main([str(tmp_path / "copied"), f"data.dir={tmp_path / 'tokens'}"])
    table = table_of(capsys)
    assert str(tmp_path / "tokens") in table["split"]
    assert "the same bits" in table["logged loss"]


@pytest.mark.parametrize("place", ["tiny", "sweep/trials/tiny", "sweep/stages/0a"])
def test_dataset_in_storage_is_found_by_content(trained_run, tiny_dataset, tmp_path, capsys, place):
    shutil.copytree(trained_run, tmp_path / place)
    shutil.copytree(tiny_dataset, tmp_path / "data" / "wherever")
    (tmp_path / "data" / "unfinished").mkdir()
    main([str(tmp_path / place), "data.dir=null"])
    assert table_of(capsys)["split"] == f"val, in {tmp_path}/data/wherever"


def test_checkpoint_whose_tokens_are_nowhere_is_refused_in_one_line(
    tiny_dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    words = ["data.tokenizer=char", "model.n_layer=1", "model.n_head=1", "model.n_embd=8"]
    words += ["model.block_size=8", "train.max_steps=1", "data.corpus=absent.txt"]
    (tmp_path / "alone").mkdir()
    train(load_experiment(None, words), RunFolder(tmp_path / "alone"), tiny_dataset, Worker())
    with pytest.raises(UserError) as caught:
        main([str(tmp_path / "alone")])
    message = str(caught.value)
    assert message.startswith("data.dir: the tokens that ") and "\n" not in message
    assert "absent.txt" in message and "data.dir=…" in message


def test_other_tokens_are_refused(trained_run, tiny_dataset, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_dataset, other)
    manifest = json.loads((other / "manifest.json").read_text("utf-8"))
    manifest["splits"]["val"]["stream_sha256"] = "0" * 64
    write_manifest(
        other, {k: v for k, v in manifest.items() if k not in ("format_version", "files", "sha256")}
    )
    with pytest.raises(UserError, match="not those that .* was trained on"):
        main([str(trained_run), f"data.dir={other}"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.max_steps=5"], "cannot be changed for an evaluation; only data.dir"),
        (["more"], "'more': cannot be changed"),
        (["train.micro_batch_size=auto"], "auto is only known to a run; give a number"),
        (["data.dir=/nowhere"], "/nowhere: not a finished dataset"),
        (["--split", "test"], "invalid choice: 'test'"),
        (["--tokens", "1"], "'1' is not a whole number of at least 2"),
    ],
)
def test_wrong_argument_is_named(trained_run, words, said):
    with pytest.raises(UserError, match=said):
        main([str(trained_run), *words])


def test_damaged_checkpoint_is_skipped(damaged_run, type_command):
    done = type_command("evaluate.py", damaged_run)
    assert done.returncode == 0
    assert "(step 8)" in done.stdout
    assert "the same bits" in done.stdout
    assert done.stderr.count("skipped: ") == 1


def test_relative_checkpoint_path_finds_dataset_beside_the_run(
    tiny_corpus, tiny_dataset, tmp_path, monkeypatch, capsys
):
    beside, run_dir = tmp_path / "data" / "some", tmp_path / "alone"
    shutil.copytree(tiny_dataset, beside)
    run_dir.mkdir()
    small = [
        "model.n_layer=1",
        "model.n_head=1",
        "model.n_embd=8",
        "model.block_size=8",
        "train.max_steps=2",
    ]
    train(
        load_experiment(None, [f"data.corpus={tiny_corpus}", "data.tokenizer=char", *small]),
        RunFolder(run_dir),
        beside,
        Worker(),
    )
    monkeypatch.chdir(run_dir / "checkpoints")
    assert main(["step-00000002"]) == 0
    assert str(beside) in table_of(capsys)["split"]
