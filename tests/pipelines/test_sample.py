"""sample.py prints what `generate` draws from the given checkpoint, or one line of error."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from model.generate import generate
from model.gpt import GPT
from model.gpt_config import GPTConfig
from orchestrator.checkpoint import store as checkpoint
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.errors import UserError
from orchestrator.train import state
from pipelines.sample import main
from tests.helpers.checkpoints import save
from tests.helpers.huggingface import config_to_huggingface, to_huggingface


def written(capsys, *args) -> list[str]:
    """Run the command and return the text of each sample."""
    assert main([str(a) for a in args]) == 0
    output = capsys.readouterr().out
    parts = output.split("\n──── sample ")[1:]
    return [part.split("────\n", 1)[1].removesuffix("\n") for part in parts]


def drawn(folder, prompt: str, n: int, **how) -> str:
    tokenizer = load_tokenizer("char", folder)
    ids = torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None]
    model = state.load_model(checkpoint.Content(folder))
    return tokenizer.decode(generate(model, ids, n, n_vocab=tokenizer.n_vocab, **how)[0].tolist())


def test_greedy_output_equals_generate(trained_run, capsys):
    args = [trained_run, "--prompt", "the cat", "--temperature", "0", "--max-new-tokens", "50"]
    first = written(capsys, *args)
    last = checkpoint.path_of(trained_run / "checkpoints", 12)
    assert first == written(capsys, *args) == [drawn(last, "the cat", 50, temperature=0)]


def test_every_option_reaches_generate(trained_run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("a dog\n", "utf-8")
    folder = checkpoint.path_of(trained_run / "checkpoints", 8)
    texts = written(
        capsys,
        folder,
        "--prompt-file",
        tmp_path / "prompt.txt",
        "--max-new-tokens",
        "40",
        "--temperature",
        "1.5",
        "--top-k",
        "5",
        "--seed",
        "7",
        "--num-samples",
        "2",
    )
    assert texts == [
        drawn(folder, "a dog\n", 40, temperature=1.5, top_k=5, seed=seed) for seed in (7, 8)
    ]
    assert texts[0] != texts[1]


def test_default_prompt_is_a_line_break(trained_run, capsys):
    [text] = written(capsys, trained_run, "--max-new-tokens", "5")
    assert text.startswith("\n")
    assert len(text) == 6


def test_run_name_is_found_in_storage(trained_run, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPALIER_STORAGE", str(trained_run.parent))
    main(["tiny", "--max-new-tokens", "1"])
    assert "step 12" in capsys.readouterr().out


def test_best_has_the_lowest_val_loss(trained_run, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    last = checkpoint.path_of(run / "checkpoints", 12)
    tensors = {"model": checkpoint.load_tensors(last, "model")}
    texts = {
        name: (last / name).read_text("utf-8")
        for name in ("experiment.yaml", "model.json", "tokenizer.json")
    }
    facts = {
        "metrics": {"val/loss": 99.0},
        "fingerprints": checkpoint.read_manifest(last)["fingerprints"],
    }
    save(run / "checkpoints", 16, tensors, texts, facts)
    for words, step in (["--best"], 12), ([], 16):
        main([str(run), "--max-new-tokens", "1", *words])
        assert f"step {step}:" in capsys.readouterr().out


def test_damaged_checkpoint_is_skipped_with_a_message(damaged_run, capsys):
    main([str(damaged_run), "--max-new-tokens", "1"])
    out, err = capsys.readouterr()
    assert "step-00000008, step 8:" in out
    assert "skipped: " in err
    assert "step-00000012/model.safetensors" in err


def test_damaged_checkpoint_given_by_path_is_refused(damaged_run):
    with pytest.raises(UserError, match="SHA-256"):
        main([str(damaged_run / "checkpoints" / "step-00000012")])


def test_hugging_face_folder_is_sampled(tmp_path, gpt2_ranks, capsys):
    torch.manual_seed(0)
    shape = {
        "block_size": 16,
        "vocab_size": 50257,
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
        "activation": "gelu_tanh",
    }
    model = GPT(GPTConfig(**shape)).eval()
    tensors = {k: v.contiguous() for k, v in to_huggingface(model.state_dict()).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config_to_huggingface(model.config)), "utf-8")
    tokenizer = load_tokenizer("gpt2")
    ids = torch.from_numpy(tokenizer.encode("Hello").astype("int64"))[None]
    expected = tokenizer.decode(generate(model, ids, 10, temperature=0)[0].tolist())
    assert written(
        capsys, tmp_path, "--prompt", "Hello", "--temperature", "0", "--max-new-tokens", "10"
    ) == [expected]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "-1"], "'-1' is not a number of at least 0"),
        (["--temperature", "nan"], "'nan' is not a number"),
        (["--top-k", "0"], "'0' is not a whole number of at least 1"),
        (["--max-new-tokens", "many"], "'many' is not a whole number"),
        (["--temprature", "1"], "unrecognized arguments: --temprature"),
        (["--prompt", ""], "--prompt: is empty"),
        (["--prompt-file", "/nowhere/prompt.txt"], "/nowhere/prompt.txt cannot be read"),
        (["--device", "abacus"], "'abacus' cannot be used here"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with argument"),
    ],
)
def test_wrong_option_is_named(trained_run, words, said):
    with pytest.raises(UserError, match=said):
        main([str(trained_run), *words])


def test_missing_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPALIER_STORAGE", str(tmp_path))
    with pytest.raises(UserError, match=f"no-such-run or {tmp_path}/no-such-run"):
        main(["no-such-run"])
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="this run has no checkpoint yet"):
        main(["empty"])


def test_character_outside_the_vocabulary_is_refused(trained_run, type_command):
    done = type_command("sample.py", trained_run, "--prompt", "the β")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "'β'" in done.stderr
