"""File names of a run folder. They are a format: earlier versions used the same names."""

from pathlib import Path

from orchestrator.runs.folder import RunFolder, SweepFolder


def test_numbered_files_keep_their_names():
    folder = RunFolder("run")
    names = [
        folder.sample_file(5),
        folder.mark_file(3),
        folder.hang_file(3),
        folder.failure_file(3),
        folder.replay_file("2026-01-02T03-04-05.6"),
        folder.checkpoint(100),
        SweepFolder("run").figure_file("tree"),
        SweepFolder("run").stage("ab").path,
        SweepFolder("run").trial("lr=1").path,
    ]
    assert [str(name) for name in names] == [
        "run/samples/step-00000005.txt",
        "run/.ranks/rank-3",
        "run/hang-rank3.txt",
        "run/failure-rank3.txt",
        "run/replays/2026-01-02T03-04-05.6.json",
        "run/checkpoints/step-00000100",
        "run/figures/tree.png",
        "run/stages/ab",
        "run/trials/lr=1",
    ]


def test_listed_files_are_those_that_were_named(tmp_path):
    folder = SweepFolder(tmp_path)
    files = {
        "samples": [folder.sample_file(step) for step in (9, 10)],
        "marks": [folder.mark_file(rank) for rank in (0, 11)],
        "stacks": [folder.hang_file(rank) for rank in (0, 1)],
        "replays": [folder.replay_file(name) for name in ("a", "b")],
        "figures": [folder.figure_file(name) for name in ("a", "b")],
    }
    for file in sum(files.values(), start=[]):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert folder.sample_files() == files["samples"]
    assert sorted(folder.mark_files()) == files["marks"]
    assert folder.hang_files() == files["stacks"]
    assert folder.replay_files() == files["replays"]
    assert folder.figure_files() == files["figures"]


def test_nothing_is_listed_of_a_new_folder(tmp_path):
    folder = SweepFolder(tmp_path / "new")
    lists = [folder.sample_files(), folder.mark_files(), folder.hang_files(), folder.trials()]
    assert lists == [[], [], [], []]


def test_trial_knows_its_sweep(tmp_path):
    sweep = SweepFolder(tmp_path)
    trials = [sweep.trial(name) for name in ("a", "b")]
    for trial in trials:
        trial.path.mkdir(parents=True)
        found = trial.sweep()
        assert found is not None
        assert found.path == tmp_path
    assert [trial.path for trial in sweep.trials()] == [trial.path for trial in trials]
    assert sweep.sweep() is None
    assert sweep.stage("s").sweep() is None


def test_folders_of_hangs_are_numbered(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.new_hang_folder() == Path(folder.hangs / "0001")
    (folder.hangs / "0009").mkdir(parents=True)
    (folder.hangs / "0003-copy").mkdir()
    assert folder.new_hang_folder() == folder.hangs / "0010"
