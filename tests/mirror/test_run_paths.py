"""Every argument and field for a run takes an address in a mirror, and does the same with it."""

import hashlib
import os
import re
from pathlib import Path

import pytest

from orchestrator.errors import UserError
from orchestrator.paths import scratch_folder
from orchestrator.runs.folder import SweepFolder
from orchestrator.track.server import store_path
from pipelines import evaluate, export, inspect_batch, replay, replay_metrics, sample
from tests.faults.command import Command
from tests.faults.command_case import SMALL
from tests.faults.outcome import outcome
from tests.helpers import stores
from tests.helpers.bucket import new_bucket
from tests.helpers.tracked import rows
from tests.mirror.test_runs import STARTER, Machine

RUN = ["schedule.kind=constant", "train.max_steps=8", "train.eval_interval=4"]
TRIAL = "{schedule.kind: wsd, train.max_steps: 12, schedule.decay_fraction: 0.5}"


@pytest.fixture(scope="module")
def machine(store_proxy, store_client, tmp_path_factory, tiny_corpus):
    """A machine that has trained a run in a bucket, and still has its folder."""
    bucket = new_bucket(store_proxy, store_client)
    machine = Machine(tmp_path_factory.mktemp("machine"), bucket, "train", tiny_corpus)
    ended = machine.run(*RUN)
    assert ended.status == 0, ended
    return machine


def printed(module, *args):
    """Return a function that calls a command with a run: its status, error and other lines.

    Lines with paths of the storage and the cache are left out, and so are speeds.
    """

    def run(machine, path, folder, capsys):
        data = [f"data.corpus={machine.corpus}", f"storage={machine.folder.path.parent}"]
        words = [word.format(path=path, folder=folder) for word in args]
        try:
            status = module.main([*words, *data] if module is inspect_batch else words)
        except UserError as error:
            return 2, str(error), []
        lines = re.sub(r"[\d,]+ tok\w*/s", "", capsys.readouterr().out).splitlines()
        own = (path, str(folder), os.environ["XDG_CACHE_HOME"], str(machine.cache), "not sent")
        return status, "", [line for line in lines if not any(name in line for name in own)]

    return run


def exported(machine, path, folder, capsys):
    status, err, _ = printed(export, "{path}", "{folder}/exported")(machine, path, folder, capsys)
    file = folder / "exported" / "model.safetensors"
    return status, err, hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else ""


def registered(machine, path, folder, capsys):
    # That of a run with this storage on this machine.
    folder_here = scratch_folder() / path.replace("://", "/") if "://" in path else Path(path)
    database = store_path(folder_here.parent)
    if not database.exists():
        stores.copy_empty(database)
    words = ["{path}", "{folder}/exported", "--mlflow"]
    status, err, _ = printed(export, *words)(machine, path, folder, capsys)
    query = "SELECT name, status FROM logged_models WHERE name > ?"
    return status, err, rows(database, "", query)


def sent(machine, path, folder, capsys):
    database = folder / "mlflow.db"
    stores.copy_empty(database)
    words = ["{path}", "--uri", f"sqlite:///{database}"]
    status, err, _ = printed(replay_metrics, *words)(machine, path, folder, capsys)
    query = "SELECT key, step, value, timestamp FROM metrics WHERE run_uuid > ? ORDER BY key, step"
    return status, err, rows(database, "", query)


def trained(verb, *words):
    """Return a function that runs a command which begins with a run, and returns its results."""

    def run(machine, path, folder, _capsys):
        given = [word.replace("{path}", path) for word in words]
        given += [*SMALL, *RUN, f"data.corpus={machine.corpus}"]
        given += [f"storage={folder}", "name=next"]
        environment = {**machine.bucket.env, "XDG_CACHE_HOME": str(folder / "cache")}
        command = Command(STARTER, verb, given, folder / "texts", environment=environment)
        ended = command.wait(90)
        assert ended is not None
        made = SweepFolder(folder / "next")
        found = {each.name: outcome(each.path) for each in made.trials() or [made]}
        return ended.status, ended.err, found if ended.status == 0 else {}

    return run


COMMANDS = {
    "sample": printed(sample, "{path}", "--temperature", "0", "--device", "cpu"),
    "evaluate": printed(evaluate, "{path}", "--best", "--tokens", "400"),
    "export": exported,
    "export --mlflow": registered,
    "replay": printed(replay, "{path}"),
    "replay_metrics": sent,
    "inspect_batch": printed(inspect_batch, os.devnull, "train.init_from={path}", *SMALL),
    "train.init_from": trained("train", "train.init_from={path}"),
    "sweep.from": trained("sweep", "sweep.from={path}@4", f"sweep.trials.a={TRIAL}"),
}


@pytest.fixture(params=COMMANDS)
def command(request, machine, tmp_path, monkeypatch, capsys):
    """A function that runs a command with a run."""
    machine.bucket.use(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    if request.param == "replay":  # it sends its report
        stores.copy_empty(tmp_path / "mlflow.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")

    def run(path: str, name: str):
        folder = tmp_path / name
        folder.mkdir()
        return COMMANDS[request.param](machine, path, folder, capsys)

    return run


def test_address_of_a_run_means_what_its_folder_means(command, machine):
    here = command(str(machine.folder.path), "here")
    assert here[0] == 0, here
    assert command(f"{machine.storage}/tiny", "there") == here


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("{}-missing/mirror/tiny", "there is no such bucket"),
        ("{}/mirror/other", "has no mirrored run"),
        ("{}/mirror/tiny/checkpoints/step-00000007", "has nothing of this name"),
        ("s3://Bucket/tiny", "is not s3://BUCKET/KEY"),
    ],
)
def test_address_without_a_run_is_one_line(command, machine, address, says):
    status, err, _ = command(address.format(machine.bucket.address), "refused")
    assert status == 2, err
    [line] = [line for line in err.splitlines() if line]
    assert says in line


@pytest.mark.parametrize("word", ["/no/run", "./run", "../run", "~/no-run"])
def test_path_is_never_a_name_in_the_mirror(machine, monkeypatch, word):
    machine.bucket.use(monkeypatch)
    monkeypatch.setenv("ESPALIER_STORAGE", machine.storage)
    with pytest.raises(UserError, match="there is no run at"):
        sample.main([word])
