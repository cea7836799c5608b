"""Which of a folder and its copy is newer, and what becomes of the other."""

import json
import shutil

import pytest

from orchestrator.errors import UserError
from orchestrator.runs.folder import SweepFolder
from tests.helpers.mirrored import add_checkpoint, content, copy, elsewhere, mirrored
from tests.mirror.test_runs import Machine

pytestmark = pytest.mark.usefixtures("fast")


def test_older_folder_is_set_aside_and_the_newer_copy_taken(run, bucket, tmp_path):
    copy(run, bucket)
    other = elsewhere(run, tmp_path)
    with mirrored(other, bucket) as uploader:
        add_checkpoint(other, 8)
        assert uploader.finish(20)
    run.journal_file.write_text("only here\n")
    copy(run, bucket)
    assert run.checkpoint_steps() == [4, 8]
    assert (run.path / "before-0001" / run.journal_file.name).read_text() == "only here\n"
    assert not [key for key in bucket.names() if "before-" in key]


def test_copy_of_another_run_is_not_overwritten(run, bucket, tmp_path):
    copy(run, bucket)
    other = elsewhere(run, tmp_path)
    other.path.mkdir(parents=True)
    other.run_file.write_text(json.dumps({"key": "other"}))
    with pytest.raises(UserError, match="has another run of this name"):
        copy(other, bucket)


def test_lost_checkpoints_of_a_folder_come_back(run, bucket):
    add_checkpoint(run, 8)
    copy(run, bucket)
    shutil.rmtree(run.checkpoints)
    run.journal_file.write_text("newer\n")
    copy(run, bucket)
    assert run.checkpoint_steps() == [4, 8]
    assert run.journal_file.read_text() == "newer\n"


def test_folder_that_loses_all_checkpoints_does_not_take_them_from_the_copy(run, bucket):
    with mirrored(run, bucket) as uploader:
        uploader.sync()
        shutil.rmtree(run.checkpoints)
        with pytest.raises(UserError, match="has lost all checkpoints; the copy keeps its own"):
            uploader.sync()
        run.run_file.write_text(json.dumps({"key": "begun again"}))
        uploader.sync()
    assert not bucket.names("m/run/checkpoints/")


@pytest.mark.parametrize("is_first", [True, False])
def test_manifest_whose_answer_was_lost_is_known_again(run, bucket, monkeypatch, is_first):
    with mirrored(run, bucket) as uploader:
        if not is_first:
            uploader.sync()
        put_if = uploader.store.put_if

        def lost(*arguments):
            put_if(*arguments)
            raise UserError("no answer")

        monkeypatch.setattr(uploader.store, "put_if", lost)
        add_checkpoint(run, 8)
        with pytest.raises(UserError, match="no answer"):
            uploader.sync()
        monkeypatch.undo()
        add_checkpoint(run, 12)
        uploader.sync()
    assert [path for path in uploader.last.files if "step-00000012" in path]


def test_folder_that_has_trained_further_than_another_mirror_is_kept(run, bucket):
    copy(run, bucket)
    add_checkpoint(run, 8)
    copy(run, bucket, "m2")
    add_checkpoint(run, 12)
    copy(run, bucket)
    assert run.checkpoint_steps() == [4, 8, 12]
    assert not list(run.path.glob("before-*"))
    assert [name for name in bucket.names("m/run/") if "step-00000012" in name]


def test_folder_whose_state_is_lost_is_kept_with_its_newer_checkpoint(run, bucket):
    copy(run, bucket)
    add_checkpoint(run, 8)
    run.mirror_file.write_text("")  # as after a power failure
    with mirrored(run, bucket) as uploader:
        assert run.checkpoint_steps() == [4, 8]
        assert uploader.state.was_restored, "MLflow may have values of another folder"
        assert uploader.finish(20)
    assert not list(run.path.glob("before-*"))


def add_stages(run, steps: dict[str, int], done: str) -> None:
    for name, step in steps.items():
        stage = SweepFolder(run).stage(name)
        stage.checkpoints.mkdir(parents=True, exist_ok=True)
        add_checkpoint(stage, step)
        if name in done:
            stage.result_file.write_text("{}")


def test_sweep_that_has_trained_further_than_its_copy_is_kept(run, bucket):
    add_stages(run, {"a": 4, "b": 4}, done="")
    copy(run, bucket)
    add_stages(run, {"b": 8}, done="b")
    shutil.rmtree(SweepFolder(run).stage("b").checkpoints)  # no other stage needs them
    run.mirror_file.unlink()
    copy(run, bucket)
    assert not list(run.path.glob("before-*"))
    assert [name for name in bucket.names("m/run/stages/b/") if "result.json" in name]


def test_sweep_and_copy_that_each_have_steps_of_their_own_are_refused(run, bucket, tmp_path):
    add_stages(run, {"a": 4, "b": 4}, done="")
    copy(run, bucket)
    other = elsewhere(run, tmp_path)
    with mirrored(other, bucket) as uploader:
        add_stages(other, {"a": 8}, done="a")
        assert uploader.finish(20)
    add_stages(run, {"b": 8}, done="b")
    before = content(run.path)
    with pytest.raises(UserError, match="each have steps that the other has not; use another") as e:
        copy(run, bucket)
    assert "\n" not in str(e.value)
    assert content(run.path) == before


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("how", ["changed", "removed"])
def test_damaged_checkpoint_of_a_copy_is_left_out_if_there_is_another(
    run, bucket, tmp_path, capsys, step, how
):
    add_checkpoint(run, 8)
    copy(run, bucket)
    [key] = [key for key in bucket.names() if f"{step:08}/model.safetensors" in key]
    bucket.delete(key)
    if how == "changed":
        bucket.put(key, b"x")
    other = elsewhere(run, tmp_path)
    copy(other, bucket)
    assert other.checkpoint_steps() == [12 - step]
    [line] = capsys.readouterr().err.splitlines()
    assert key in line and f"step-{step:08} is left out" in line
    copy(elsewhere(run, tmp_path / "third"), bucket)  # the copy names it no longer
    assert not capsys.readouterr().err


def test_damaged_tokens_of_a_copy_are_made_again(bucket, tmp_path, tiny_corpus):
    machine = Machine(tmp_path, bucket, "prepare", tiny_corpus)
    machine.run()
    made = sorted(machine.folder.path.parent.glob("data/*/*"))
    contents = [path.read_bytes() for path in made]
    for damaged in ("train-00000", "manifest.json@", "mirror.json"):
        [key, *_] = [key for key in bucket.names() if f"/{damaged}" in key]
        kept = bucket.get(key)
        bucket.put(key, b"x")
        machine.lose()
        ended = machine.run()
        assert ended.status == 0 or damaged == "mirror.json", ended
        assert "the tokens are made again" in ended.err
        assert [path.read_bytes() for path in made] == contents
        bucket.put(key, kept)


def test_copy_that_breaks_off_goes_on_with_the_files_that_it_has(run, bucket, tmp_path):
    copy(run, bucket)
    other = elsewhere(run, tmp_path)
    bucket.proxy.decide = lambda _, method, path: (
        "403 AccessDenied" if "MANIFEST.json" in path else ""
    )
    with pytest.raises(UserError):
        copy(other, bucket)
    bucket.proxy.decide = lambda *_: ""
    asked = len(bucket.proxy.requests)
    copy(other, bucket)
    assert content(other.checkpoint(4)) == content(run.checkpoint(4))
    assert not any("model.safetensors" in path for _, path in bucket.proxy.requests[asked:])
