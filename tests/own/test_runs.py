"""Runs of a user's model and optimizer: the copy in their folder, trust, resume, sweeps."""

import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint import store
from orchestrator.config.experiment import load_experiment
from orchestrator.config.yaml_text import read_yaml, write_yaml
from orchestrator.errors import UserError
from orchestrator.own_code import plain
from orchestrator.runs import events
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep.space.expand import load_sweep
from pipelines import evaluate, replay, sample
from tests.helpers.fixtures import SMALL as SMALL_GPT
from tests.helpers.local_job import LocalSweepJob, LocalTrainJob, without_ray

REPO = Path(__file__).resolve().parents[2]
COMMAND = "    pipelines/train.py 'model={kind: tests/own/"
MODEL = (
    "model={kind: mine/conv.py:GatedConv, block_size: 16, pad_vocab_to: 1, width: 16, n_layer: 1}"
)
WORDS = [*SMALL_GPT, "compute.use_gpu=false", "train.keep=9", MODEL, "optim.kind=mine/lion.py:lion"]


def words(tree: Path, data: list[str], *more: str) -> list[str]:
    return [*WORDS, f"storage={tree / 'runs'}", *data, *more]


def start(tree: Path, data: list[str], *more: str) -> int:
    experiment = load_experiment(None, words(tree, data, "name=run", *more))
    with without_ray():
        return LocalTrainJob(experiment).run()


@pytest.fixture(scope="module")
def finished(tokens, tmp_path_factory) -> Path:
    """A working tree with `mine/` and the finished run `runs/run`."""
    tree = tmp_path_factory.mktemp("finished")
    shutil.copytree(Path(__file__).parent, tree / "mine", ignore=lambda *_: ["__pycache__"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        assert start(tree, tokens) == 0
    return tree


@pytest.fixture
def run(finished, tmp_path, monkeypatch, stranger) -> RunFolder:
    """A copy of the run in the storage of another user, whose working tree has not the files."""
    shutil.copytree(finished / "runs" / "run", tmp_path / "shared" / "run", symlinks=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    stranger()
    return RunFolder(tmp_path / "shared" / "run")


def copies(run: RunFolder) -> list[Path]:
    return sorted(run.code.iterdir())


def commands(run: RunFolder) -> list:
    """Return what the commands read a run with."""
    return [
        lambda: sample.main([str(run.path), "--max-new-tokens", "3"]),
        lambda: evaluate.main([str(run.path), "--tokens", "200"]),
        lambda: replay.main([str(run.path), "--steps", "17:20"]),
        run.read_experiment,
    ]


@pytest.mark.parametrize("page", ["README.md", "docs/own-code.md"])
def test_command_of_the_page_is_valid(page, monkeypatch):
    monkeypatch.chdir(REPO)
    [line] = [x for x in (REPO / page).read_text().split("\n") if x.startswith(COMMAND)]
    _, *overrides = shlex.split(line)
    assert load_experiment("configs/quickstart.yaml", overrides).own_kinds


# ---- trust ----


def test_code_of_a_stranger_is_refused_by_every_command(run, stranger):
    for command in commands(run):
        with pytest.raises(UserError) as refused:
            command()
        message = str(refused.value)
        copy = copies(run)[0]
        assert message.startswith(f"{copy}: code with the hash {copy.stem.partition('-')[2]}, ")
        assert message.endswith("give --trust-code to run it")
        assert "\n" not in message


def test_trusted_code_is_run_and_remembered(run, typed, forget, capsys):
    words = ("sample.py", str(run.path), "--max-new-tokens", "3")
    assert typed(*words)[0] == 2
    assert typed(*words, "--trust-code")[0] == 0
    forget()
    for command in commands(run):
        command()
    assert "weights equal" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["mine", "shared/mine", "shared/run/code"])
def test_same_file_elsewhere_is_no_reason_to_trust(place, run, finished, monkeypatch, tmp_path):
    """Who wrote the run may also have put the file there: an unpacked archive has both."""
    monkeypatch.chdir(tmp_path)
    for name in ("conv", "lion"):
        [copy] = run.code.glob(f"{name}-*")
        target = tmp_path / place / f"{name}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(copy, target)
        text = run.experiment_file.read_text()
        run.experiment_file.write_text(text.replace(f"mine/{name}.py", f"{place}/{name}.py"))
    with pytest.raises(UserError, match="give --trust-code to run it"):
        run.read_experiment()


@pytest.mark.parametrize("damage", ["edited", "link", "pipe", "missing", "without hash"])
def test_damaged_copy_is_refused_also_if_it_is_trusted(damage, run, finished, tmp_path):
    from orchestrator import own_files

    own_files.trust_copies()
    copy = copies(run)[0]
    content = copy.read_bytes()
    copy.unlink()
    message = "expected a plain file"
    if damage == "edited":
        copy.write_bytes(content + b"\n")
        message = "was changed"
    elif damage == "link":
        (tmp_path / "target.py").write_bytes(content)
        copy.symlink_to(tmp_path / "target.py")
    elif damage == "pipe":
        os.mkfifo(copy)
    elif damage == "missing":
        message = f"restore code/{copy.name}"
    else:
        text = run.experiment_file.read_text()
        run.experiment_file.write_text(text.replace(copy.stem.replace("conv-", "@"), ""))
        message = "has no hash"
    with pytest.raises(UserError, match=message) as refused:
        run.read_experiment()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "kind",
    [
        "mine/conv.py:GatedConv",
        f"{REPO}/tests/own/conv.py:GatedConv",
        f"{'x' * 100_000}.py:GatedConv@{'0' * 32}",
        f"a\x1b[2J.py:GatedConv@{'0' * 32}",
        f"../../../../etc/x.py:GatedConv@{'0' * 32}",
        f"{'x' * 400}.py:GatedConv@{'0' * 32}",
        "os.py:system",
    ],
)
def test_kind_that_a_stranger_has_written_is_refused_in_one_line(kind, run):
    tree = read_yaml(run.experiment_file.read_text(), "it")
    tree["model"]["kind"] = kind
    run.experiment_file.write_text(write_yaml(tree))
    with pytest.raises(UserError) as refused:
        run.read_experiment()
    message = str(refused.value)
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message) < 1500


def test_checkpoint_is_sampled_with_the_code_beside_it(run, tmp_path, capsys):
    from orchestrator import own_files

    own_files.trust_copies()
    shutil.copytree(run.checkpoint(20), tmp_path / "alone" / "step-00000020")
    with pytest.raises(UserError, match="beside the checkpoint"):
        sample.main([str(tmp_path / "alone" / "step-00000020")])
    shutil.copytree(run.code, tmp_path / "alone" / "code")
    assert sample.main([str(tmp_path / "alone" / "step-00000020"), "--max-new-tokens", "3"]) == 0


# ---- resume, first weights ----


def edit(tree: Path, before: str, after: str) -> None:
    file = tree / "mine" / "conv.py"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def longer(tree: Path, data: list[str], *more: str) -> int:
    return start(tree, data, "train.max_steps=24", "schedule.decay_steps=20", *more)


@pytest.fixture
def begun(finished, working_tree, forget) -> Path:
    """A working tree of the same user, with its finished run."""
    shutil.copytree(finished / "runs" / "run", working_tree / "runs" / "run", symlinks=True)
    return working_tree


def test_resume_with_an_edit_that_keeps_the_bits_is_recorded(begun, tokens):
    edit(begun, "x = self.dropout(", "x = 1 * self.dropout(")
    assert longer(begun, tokens) == 0
    run = RunFolder(begun / "runs" / "run")
    [event] = [event for event in events.read(run) if event["kind"] == "changed"]
    assert "model.kind=conv.py:GatedConv: before" in event["message"]
    # Each checkpoint has its code.
    assert len(copies(run)) == 3
    assert sample.main([str(run.checkpoint(20)), "--max-new-tokens", "3"]) == 0
    assert sample.main([str(run.checkpoint(24)), "--max-new-tokens", "3"]) == 0


def test_resume_with_an_edit_that_changes_the_bits_is_refused(begun, tokens, capsys):
    edit(begun, "x = self.dropout(", "x = 1.1 * self.dropout(")
    assert longer(begun, tokens) != 0
    message = "the next step has other bits (changed: model.kind=conv.py:GatedConv: before"
    assert message in capsys.readouterr().err
    assert longer(begun, tokens, "train.allow_drift=true") == 0


def test_random_numbers_beside_the_field_dropout_are_those_of_the_step(
    working_tree, tokens, forget
):
    edit(
        working_tree,
        "= self.head(x).float()",
        "= self.head(F.dropout(x, 0.1, self.training)).float()",
    )
    assert start(working_tree, tokens) == 0
    torch.rand(3)
    assert longer(working_tree, tokens) == 0  # else refused: the next step has other bits


def test_resume_from_another_folder_is_the_same_run(begun, tokens, monkeypatch):
    monkeypatch.chdir(begun.parent)
    absolute = [MODEL.replace("mine", f"{begun}/mine"), f"optim.kind={begun}/mine/lion.py:lion"]
    assert longer(begun, tokens, *absolute) == 0
    assert "drift" not in {e["kind"] for e in events.read(RunFolder(begun / "runs" / "run"))}


def test_weights_of_a_run_are_the_first_of_another(begun, tokens):
    source = begun / "runs" / "run"
    experiment = load_experiment(
        None,
        words(begun, tokens, "name=next", f"train.init_from={source}", "train.max_steps=5"),
    )
    with without_ray():
        assert LocalTrainJob(experiment).run() == 0
    gpt = [word for word in words(begun, tokens) if word != MODEL]
    experiment = load_experiment(None, [*gpt, "name=gpt", f"train.init_from={source}"])
    message = "model.kind: before 'conv.py:GatedConv', now 'gpt2'"
    with without_ray(), pytest.raises(UserError, match=message):
        LocalTrainJob(experiment).run()


# ---- sweeps ----


def test_sweep_branches_off_a_run_whose_file_was_edited(begun, tokens):
    edit(begun, '"""A language', '"""Comment. A language')
    more = ["name=sweep", "sweep.from=run@12", "sweep.grid.schedule.kind=[linear, cosine]"]
    sweep = load_sweep(None, words(begun, tokens, *more))
    with without_ray():
        assert LocalSweepJob(sweep).run() == 0
    for trial in (begun / "runs" / "sweep" / "trials").iterdir():
        assert sample.main([str(trial), "--max-new-tokens", "3"]) == 0


def test_sweep_of_own_files_equals_lone_runs_and_grows_after_a_comment(
    working_tree, tokens, forget, capsys
):
    grid = "sweep.grid={optim.kind: [adamw, mine/lion.py:lion], train.max_steps: [8, 12]}"
    more = ["name=sweep", "schedule.decay_steps=12", "model.width=24", grid]

    def run(*added: str) -> int:
        sweep = load_sweep(None, words(working_tree, tokens, *more, *added))
        with without_ray():
            return LocalSweepJob(sweep).run()

    assert run() == 0
    folder = working_tree / "runs" / "sweep"
    assert len(list((folder / "code").iterdir())) == 2
    [trial] = [t for t in map(RunFolder, (folder / "trials").iterdir()) if "lion" in t.name][-1:]
    experiment = trial.read_experiment()
    assert plain(experiment.optim.kind) == "lion.py:lion"
    alone = load_experiment(
        None,
        words(working_tree, tokens, "name=run", "schedule.decay_steps=12", "model.width=24")
        + [f"train.max_steps={experiment.train.max_steps}"],
    )
    with without_ray():
        assert LocalTrainJob(alone).run() == 0
    weights = [
        store.weights_sha256(store.load_tensors(store.latest_valid(folder.checkpoints), "model"))
        for folder in (trial, RunFolder(working_tree / "runs" / "run"))
    ]
    assert weights[0] == weights[1]

    stages = len(list((folder / "stages").iterdir()))
    edit(working_tree, '"""A language', '"""Comment. A language')
    forget()
    assert (
        run("sweep.grid={optim.kind: [adamw, mine/lion.py:lion], train.max_steps: [8, 12, 14]}")
        == 0
    )
    assert len(list((folder / "stages").iterdir())) == stages + 2
    assert sample.main([str(trial.path), "--max-new-tokens", "3"]) == 0
    assert replay.main([str(trial.path)]) == 0
