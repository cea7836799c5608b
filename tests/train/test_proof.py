"""A run resumes only where it computes the same bits as before; what has changed is recorded."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import gpt, muon, optim
from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.errors import UserError
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.train.gradients import Gradients
from orchestrator.train.loop import Trainer, train
from orchestrator.train.numerics import Worker
from tests.helpers.checkpoints import rewrite_manifest

REPO = Path(__file__).resolve().parent.parent.parent
SMALL = [
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=32",
    "model.block_size=32",
    "model.dropout=0.1",
    "model.pad_vocab_to=1",
    "train.micro_batch_size=4",
    "train.global_batch_size=8",
    "train.max_steps=8",
    "train.log_interval=2",
    "train.eval_interval=null",
    "train.checkpoint_interval=2",
    "schedule.max_lr=1e-2",
    "optim.max_grad_norm=0.1",
]
EXPERIMENT = load_experiment(None, SMALL)
ALLOWED = EXPERIMENT.replace(train__allow_drift=True)


def interrupt(folder, dataset) -> RunFolder:
    """Train past the checkpoint of step 4 and stop without an ending, as after a kill."""
    for line in Trainer(EXPERIMENT, folder, dataset, Worker()).run():
        if line["step"] == 6:
            return folder
    raise AssertionError


def kinds(folder: RunFolder) -> list[str]:
    return [event["kind"] for event in events.read(folder)]


def run_rank(folder, dataset, words=(), rank=0, world_size=1, **env: str) -> subprocess.Popen:
    job = {
        "rank": rank,
        "world_size": world_size,
        "store": str(folder.path.parent / "rendezvous"),
        "run_dir": str(folder.path),
        "data_dir": str(dataset),
        "overrides": [*SMALL, *words],
    }
    return subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.train_rank", json.dumps(job)],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stderr=subprocess.PIPE,
        text=True,
    )


def edit_model(monkeypatch) -> None:
    """Edit our code as a user might, so that only the last bits change."""
    forward = gpt.GPT.forward

    def edited(self, *args, **kwargs):
        return forward(self, *args, **kwargs) * (1 + 2**-20)

    monkeypatch.setattr(gpt.GPT, "forward", edited)


def edit_optimizer(monkeypatch) -> None:
    def edited(groups, settings):
        betas = (settings.beta1, settings.beta2)
        return torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=1e-7, fused=True)

    kind = replace(optim.OPTIMIZERS["adamw"], build=edited)
    monkeypatch.setitem(optim.OPTIMIZERS, "adamw", kind)


def edit_clipping(monkeypatch) -> None:
    monkeypatch.setattr(Gradients, "clip", lambda self, max_norm: None)


def test_proof_leaves_the_run_as_it_was(tiny_dataset, folder):
    trainer = Trainer(EXPERIMENT, interrupt(folder, tiny_dataset), tiny_dataset, Worker())
    weights = store.weights_sha256(trainer.state.model.state_dict())
    draws = torch.get_rng_state()
    proof = trainer.step.proof(trainer.batches)
    assert trainer.step.proof(trainer.batches) == proof
    assert torch.equal(torch.get_rng_state(), draws)
    assert store.weights_sha256(trainer.state.model.state_dict()) == weights
    stored = store.read_manifest(folder.checkpoint(trainer.state.step))["fingerprints"]
    assert stored["proof"] == proof


def test_proof_covers_weights_step_and_dropout(tiny_dataset, folder):
    trainer = Trainer(EXPERIMENT, folder, tiny_dataset, Worker())
    proofs = {trainer.step.proof(trainer.batches)}
    trainer.state.step += 1  # other samples and another dropout mask
    proofs.add(trainer.step.proof(trainer.batches))
    with torch.no_grad():
        weight = trainer.state.model.transformer.ln_f.weight
        weight[0] = torch.nextafter(weight[0], torch.tensor(2.0))
    proofs.add(trainer.step.proof(trainer.batches))
    assert len(proofs) == 3


def test_proof_covers_the_kernel_of_muon_for_wide_matrices(tiny_dataset, folder, monkeypatch):
    experiment = load_experiment(None, [*SMALL, "optim.kind=muon"])
    trainer = Trainer(experiment, folder, tiny_dataset, Worker())
    proof = trainer.step.proof(trainer.batches)
    product = muon._gram_product
    monkeypatch.setattr(muon, "_gram_product", lambda *args: product(*args) * (1 + 2**-20))
    assert trainer.step.proof(trainer.batches) != proof


def test_proof_covers_which_matrices_muon_updates_together(tiny_dataset, folder, monkeypatch):
    words = ["optim.kind=muon", "model.n_layer=2", "train.reduction_slots=1"]
    trainer = Trainer(load_experiment(None, [*SMALL, *words]), folder, tiny_dataset, Worker())
    proof = trainer.step.proof(trainer.batches)
    # The lists of the matrices whose update the proof has stay as they are.
    monkeypatch.setattr(muon, "BATCH_NUMEL", 8 * 32 * 32)
    assert trainer.step.proof(trainer.batches) != proof


@pytest.mark.parametrize("edit", [edit_model, edit_optimizer, edit_clipping])
def test_changed_code_is_refused_or_recorded(tiny_dataset, folder, monkeypatch, edit):
    interrupt(folder, tiny_dataset)
    edit(monkeypatch)
    with pytest.raises(UserError, match="other bits") as refused:
        train(EXPERIMENT, folder, tiny_dataset)
    assert "\n" not in str(refused.value)
    assert "train.allow_drift=true" in str(refused.value)
    assert kinds(folder) == []
    assert train(ALLOWED, folder, tiny_dataset) == 8
    assert kinds(folder) == ["drift"]


def test_another_instruction_set_is_refused_and_named(tiny_dataset, folder):
    interrupt(folder, tiny_dataset)
    process = run_rank(folder, tiny_dataset, ATEN_CPU_CAPABILITY="default")
    _, error = process.communicate()
    assert process.returncode != 0
    [refused] = [line for line in error.splitlines() if "other bits" in line]
    assert "ATEN_CPU_CAPABILITY: before None, now 'default'" in refused


@pytest.mark.slow
def test_ranks_that_compute_other_bits_are_refused_before_the_first_step(tiny_dataset, folder):
    capabilities = ("", "default")
    ranks = [
        run_rank(folder, tiny_dataset, rank=rank, world_size=2, ATEN_CPU_CAPABILITY=capability)
        for rank, capability in enumerate(capabilities)
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert all("rank 1 computes other bits than rank 0" in error for error in errors)
    assert not folder.journal_file.exists()


def test_change_without_effect_is_recorded_and_the_run_goes_on(tiny_dataset, folder, monkeypatch):
    interrupt(folder, tiny_dataset)
    monkeypatch.setenv("MKL_CBWR", "AUTO")  # too late for this process
    assert train(EXPERIMENT, folder, tiny_dataset) == 8
    [event] = events.read(folder)
    assert (event["kind"], event["step"]) == ("changed", 4)
    assert "MKL_CBWR: before None, now 'AUTO'" in event["message"]


def test_edited_module_without_effect_is_named_and_the_run_goes_on(
    tiny_dataset, folder, monkeypatch
):
    path = interrupt(folder, tiny_dataset).checkpoint(4)
    now = store.read_manifest(path)["fingerprints"]["code"]["model/gpt.py"]
    manifest = store.read_manifest(path)
    manifest["fingerprints"]["code"]["model/gpt.py"] = "before"
    rewrite_manifest(path, manifest)
    assert train(EXPERIMENT, folder, tiny_dataset) == 8
    [event] = events.read(folder)
    assert event["kind"] == "changed"
    assert event["message"].endswith(f"model/gpt.py: before 'before', now '{now}'")


def test_checkpoint_of_an_earlier_version_without_a_proof_is_refused(tiny_dataset, folder):
    path = interrupt(folder, tiny_dataset).checkpoint(4)
    manifest = store.read_manifest(path)
    for name in ("proof", "environment", "code"):
        del manifest["fingerprints"][name]
    manifest["fingerprints"]["numerics"]["numerics"] = 2
    rewrite_manifest(path, manifest)
    with pytest.raises(UserError, match=r"other bits \(changed: numerics: before 2"):
        train(EXPERIMENT, folder, tiny_dataset)


def test_stage_starts_only_where_the_bits_of_its_parent_are_computed(
    tiny_dataset, tmp_path, monkeypatch
):
    parent, child = RunFolder(tmp_path / "parent"), RunFolder(tmp_path / "child")
    for each in (parent, child):
        each.path.mkdir()
    interrupt(parent, tiny_dataset)
    edit_model(monkeypatch)
    with pytest.raises(UserError, match="other bits"):
        Trainer(EXPERIMENT, child, tiny_dataset, Worker(), parent=parent.checkpoint(4))
    Trainer(ALLOWED, child, tiny_dataset, Worker(), parent=parent.checkpoint(4))
    assert kinds(child) == ["drift"]
