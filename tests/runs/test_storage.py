"""Where runs and data are stored."""

import pwd
import re
from pathlib import Path

import pytest

from orchestrator.config.experiment import Experiment, load_experiment
from orchestrator.config.sections import Data
from orchestrator.data import corpus
from orchestrator.data.prepared import dataset_dir
from orchestrator.errors import UserError
from orchestrator.folders import check_writable
from orchestrator.runs.storage import find_run, mirror_of, run_folder, storage_root


@pytest.mark.parametrize(
    ("storage", "variable", "in_job", "expected"),
    [
        (None, None, False, "CWD/runs"),
        ("x/y", None, False, "CWD/x/y"),
        ("/abs", None, False, "/abs"),
        ("~/s", None, False, "HOME/s"),
        (None, "/env", False, "/env"),
        (None, "env", False, "CWD/env"),
        ("/abs", "/env", False, "/abs"),
        (None, None, True, "HOME/espalier"),
        ("x", None, True, "HOME/espalier/x"),
        ("/abs", None, True, "/abs"),
        (None, "/env", True, "/env"),
        ("~/s", None, True, "HOME/s"),
    ],
)
def test_storage_is_absolute_and_outside_the_copy_of_a_ray_job(
    tmp_path, monkeypatch, storage, variable, in_job, expected
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if in_job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    if variable is not None:
        monkeypatch.setenv("ESPALIER_STORAGE", variable)
    wanted = expected.replace("CWD", str(tmp_path)).replace("HOME", "/home/user")
    experiment = Experiment(storage=storage, name="small")
    assert storage_root(experiment) == Path(wanted)
    assert run_folder(experiment).path == Path(wanted) / "small"


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("file:///runs", "only paths"),
        ("file:runs", "only paths"),
        ("abfs+x://a", "only paths"),
        ("hdfs:/a", "only paths"),
        ("https:/a:b@host/runs", r"'https://\[redacted\]@host/runs' is an address"),
        ("s3:/bucket/runs", "is not s3://BUCKET/KEY"),
        ("s3:bucket", "is not s3://BUCKET/KEY"),
        ("GS://bucket", "is not s3://BUCKET/KEY"),
        ("s3://bucket//runs", "has a part that is empty"),
        ("s3://bucket/../runs", "has a part that is empty"),
        ("s3://a:b@bucket/runs", "user or a password"),
        ("s3:/a:b@bucket/runs", r"//\[redacted\]@bucket/runs' contains a user or a password"),
    ],
)
def test_address_that_is_no_storage_is_refused(tmp_path, monkeypatch, address, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPALIER_STORAGE", address)
    with pytest.raises(UserError, match=f"storage: .*{reason}"):
        storage_root(Experiment())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["s3://bucket/runs", "gs://bucket", "hdfs://a", "s3:a"])
def test_tokens_and_runs_are_read_from_paths(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(address)}.*only paths"):
        dataset_dir(Data(dir=address), tmp_path)
    with pytest.raises(UserError, match=f"{re.escape(address)}.*only paths"):
        find_run(address, lambda _: True)
    assert not list(tmp_path.iterdir())


def test_storage_in_a_bucket_is_a_folder_of_this_machine_and_a_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    experiment = Experiment(storage="s3://bucket/a/b", name="small")
    assert storage_root(experiment) == tmp_path / "espalier" / "scratch" / "s3" / "bucket/a/b"
    assert str(mirror_of(experiment)) == "s3://bucket/a/b"
    local = Experiment(storage=str(tmp_path), mirror="s3://bucket")
    assert (storage_root(local), str(mirror_of(local))) == (tmp_path, "s3://bucket")
    assert mirror_of(Experiment()) is None
    with pytest.raises(UserError, match="set one of the two"):
        storage_root(Experiment(storage="s3://bucket/a", mirror="s3://bucket/b"))
    with pytest.raises(UserError, match="mirror: 'x' is not s3://"):
        mirror_of(Experiment(mirror="x"))


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ("file/runs", "/file is a file"),
        ("/proc/nothing", "/proc says: "),
        ("/proc/self/fd/x/runs", "/proc/self/fd says: "),
        ("x" * 300, "File name too long"),
    ],
)
def test_storage_that_cannot_be_made_is_refused_and_nothing_is_created(tmp_path, storage, reason):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="storage: .* cannot be written to") as caught:
        check_writable(tmp_path / storage, "storage")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    check_writable(tmp_path / "new" / "runs", "storage")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("setting", ["~no-such-user/runs", "~/runs"])
def test_home_directory_that_does_not_exist_is_refused(monkeypatch, setting):
    def unknown_user(*_):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    monkeypatch.setattr(pwd, "getpwnam", unknown_user)
    monkeypatch.delenv("HOME")
    message = "is no home directory here; give the whole path"
    with pytest.raises(UserError, match=message):
        storage_root(load_experiment(None, [f"storage={setting}"]))
    with pytest.raises(UserError, match=message):
        dataset_dir(load_experiment(None, [f"data.dir={setting}"]).data, Path("runs"))
    with pytest.raises(UserError, match=message):
        corpus.resolve(setting)
