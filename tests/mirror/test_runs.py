"""Whole commands with a mirror, without Ray: killed at requests, continued on other machines."""

import contextlib
import json
import random
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest

from orchestrator.mirror import session
from orchestrator.objects.address import parse
from orchestrator.runs.folder import SweepFolder
from pipelines import evaluate, sample
from tests.faults.command import Command
from tests.faults.command_case import SMALL, WORDS
from tests.faults.outcome import is_in_mlflow, outcome
from tests.faults.rank import RankStarter
from tests.helpers import stores
from tests.helpers.wait import wait_until

KILLS = {"train": 8, "sweep": 4}
FAST = {
    "orchestrator.mirror.upload:POLL_S": 0.02,
    "orchestrator.mirror.lock:BEAT_S": 0.1,
    "orchestrator.mirror.lock:STALE_S": 0.4,
    "orchestrator.mirror.lock:POLL_S": 0.05,
    "orchestrator.mirror.manifest:PART_BYTES": 40_000,  # a checkpoint has several parts
}
STARTER = RankStarter("orchestrator.objects.s3")


class Machine:
    """A machine that runs one command on a storage in a bucket, and may be lost.

    Args:
        path: Its disk.
        bucket: The bucket.
        verb: "train" or "sweep".
        corpus: The corpus.
    """

    def __init__(self, path, bucket, verb, corpus):
        self.path = path
        self.bucket = bucket
        self.verb = verb
        self.corpus = corpus
        self.words = [*SMALL, *WORDS.get(verb, []), f"data.corpus={corpus}"]
        self.storage = f"{bucket.address}/mirror"
        self.cache = path / "cache"
        self.starter = STARTER
        self.starts = 0
        self.job = {}  # further facts for the command

    @property
    def folder(self):
        scratch = self.cache / "espalier" / "scratch" / self.storage.replace("://", "/")
        return SweepFolder(scratch / "tiny")

    def start(self, *words) -> Command:
        self.starts += 1
        return Command(
            self.starter,
            self.verb,
            [*self.words, f"storage={self.storage}", *words],
            self.path / f"start-{self.starts}",
            environment={"XDG_CACHE_HOME": str(self.cache), **self.bucket.env},
            **{"values": FAST, **self.job},
        )

    def run(self, *words):
        """Start the command, and return how it ended."""
        ended = self.start(*words).wait(90)
        assert ended is not None, "it hangs"
        return ended

    def run_killed(self, request: int, passed_on: bool):
        """Start the command; kill it at a request. Return whether it came to that."""
        command = self.start()
        last = self.bucket.proxy.count + request
        killed = []

        def decide(number, *_):
            if number < last:
                return ""
            command.kill()
            killed.append(number)
            return "" if passed_on and len(killed) == 1 else "reset"

        self.bucket.proxy.decide = decide
        ended = command.wait(90)
        self.bucket.proxy.decide = lambda *_: ""
        assert ended is not None, "it hangs"
        assert killed or ended.status == 0, ended
        return bool(killed)

    def kill_when(self, command, is_in_mirror: bytes):
        """Kill the command at its first request after the mirror names something."""
        there = "mirror/tiny/mirror.json"

        def decide(*_):
            if there not in self.bucket.names(there):
                return ""
            if is_in_mirror not in self.bucket.get(there):
                return ""
            command.kill()
            return "reset"

        self.bucket.proxy.decide = decide
        ended = command.wait(90)
        self.bucket.proxy.decide = lambda *_: ""
        assert ended is not None and ended.status == -signal.SIGKILL, ended

    def lose(self):
        """Lose everything on the disk."""
        shutil.rmtree(self.cache)


def outcomes(folder: SweepFolder) -> dict:
    """Return the outcome of a run, or of each trial of a sweep."""
    return {each.name: outcome(each.path) for each in folder.trials() or [folder]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_corpus):
    """The outcome of each command without a mirror."""
    path = tmp_path_factory.mktemp("undisturbed")
    found = {}
    for verb in ("train", "sweep"):
        storage = path / verb
        words = [*SMALL, *WORDS[verb], f"data.corpus={tiny_corpus}", f"storage={storage}"]
        ended = Command(STARTER, verb, words, path / f"{verb}-texts").wait(90)
        assert ended is not None and ended.status == 0, ended
        found[verb] = outcomes(SweepFolder(storage / "tiny"))
    return found


def test_run_killed_after_its_last_step_gets_its_dataset_into_the_mirror(
    bucket, tmp_path, tiny_corpus
):
    machine = Machine(tmp_path, bucket, "train", tiny_corpus)
    command = machine.start()

    def decide(_, verb, path):
        if verb != "PUT" or "/data/" not in path:
            return ""
        if (machine.folder.read_summary() or {}).get("status") == "FINISHED":
            command.kill()
        return "reset"

    bucket.proxy.decide = decide
    ended = command.wait(90)
    bucket.proxy.decide = lambda *_: ""
    assert ended is not None and ended.status == -signal.SIGKILL, ended
    for _ in range(2):
        ended = machine.run()
        assert ended.status == 0 and "is finished" in ended.out, ended
        machine.lose()


@pytest.mark.parametrize(
    ("verb", "wanted"),
    [
        *KILLS.items(),
        pytest.param("train", 100, marks=pytest.mark.slow),
        pytest.param("sweep", 100, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_request_and_lost_machines_change_no_bit(
    bucket, tmp_path, tiny_corpus, undisturbed, verb, wanted
):
    rng = random.Random(verb)
    machine = Machine(tmp_path, bucket, verb, tiny_corpus)
    kills = 0
    while kills < wanted:
        if machine.run_killed(rng.randint(1, 80), rng.random() < 0.5):
            kills += 1
        else:  # it is done: begin again, in another mirror
            assert outcomes(machine.folder) == undisturbed[verb]
            machine.storage += "-"
            machine.lose()
        if rng.random() < 0.5 and machine.cache.exists():
            machine.lose()
    ended = machine.run()
    assert ended.status == 0, ended
    assert outcomes(machine.folder) == undisturbed[verb]
    machine.lose()
    ended = machine.run()  # a finished run on a new machine: nothing is trained
    assert ended.status == 0, ended
    assert "is finished" in ended.out
    assert outcomes(machine.folder) == undisturbed[verb]


@pytest.mark.slow
def test_sampled_sweep_of_a_lost_machine_keeps_its_samples(bucket, tmp_path, tiny_corpus):
    pytest.importorskip("optuna")
    machine = Machine(tmp_path, bucket, "sweep", tiny_corpus)
    machine.words = [*SMALL, "schedule.kind=wsd", f"data.corpus={tiny_corpus}"]
    machine.words += ["sweep.sampler=optuna", "sweep.num_samples=4"]
    machine.words += ["sweep.space.train.max_steps={low: 10, high: 20}"]
    machine.kill_when(machine.start(), b"result.json")
    paths = json.loads(bucket.get("mirror/tiny/mirror.json"))["files"]
    before = {path.split("/")[1] for path in paths if path.startswith("trials/")}
    machine.lose()
    ended = machine.run()
    assert ended.status == 0, ended
    assert "restoring" in ended.out
    states = {trial.name: trial.read_summary()["state"] for trial in machine.folder.trials()}
    assert before and before <= states.keys() and [*states.values()] == ["done"] * 4


def test_ranks_that_share_no_folder_train_the_same_bits(bucket, tmp_path, tiny_corpus, undisturbed):
    """Killed; then the machine of rank 0 is lost with its folder."""
    other = tmp_path / "other-node"
    machine = Machine(tmp_path / "driver", bucket, "train", tiny_corpus)
    environments = {"1": {"XDG_CACHE_HOME": str(other)}}
    machine.job = {"world": 2, "spread": True, "environments": environments}
    machine.kill_when(machine.start(), b"checkpoints/step-")
    machine.lose()
    ended = machine.run()
    assert ended.status == 0, ended
    assert "restoring" in ended.out and "resuming tiny from step" in ended.out
    assert outcomes(machine.folder) == undisturbed["train"]
    kept = {path.name for path in other.rglob("*") if path.is_file() and path.name[0] != "."}
    assert "manifest.json" in kept and "train-00000.parquet" in kept
    assert not {"run.json", "MANIFEST.json", "metrics.jsonl"} & kept


@pytest.mark.slow
def test_metrics_reach_mlflow_once_although_the_machine_was_lost(bucket, tmp_path, tiny_corpus):
    """What MLflow has got since the last copy is not sent again with other times."""
    database = tmp_path / "mlflow.db"
    stores.copy_empty(database)
    machine = Machine(tmp_path, bucket, "train", tiny_corpus)
    machine.words.append(f"tracking.uri=sqlite:///{database}")
    machine.job = {"tracked": True, "values": FAST | {"orchestrator.mirror.upload:POLL_S": 0.6}}
    command = machine.start("train.max_steps=90")
    wait_until(lambda: len(_steps_sent(database)) > 12)
    command.kill()
    assert command.wait(90) is not None
    sent = _steps_sent(database)
    machine.lose()
    ended = machine.run("train.max_steps=90")
    assert ended.status == 0, ended
    assert "restoring" in ended.out
    assert set(sent) <= set(_steps_sent(database))
    assert is_in_mlflow(str(database), machine.folder.path, outcome(machine.folder.path)["curve"])


def _steps_sent(database) -> list[int]:
    with contextlib.closing(sqlite3.connect(database)) as db:
        return [step for (step,) in db.execute("SELECT DISTINCT step FROM metrics")]


def test_commands_read_a_run_in_a_mirror(bucket, tmp_path, tiny_corpus, capsys, monkeypatch):
    machine = Machine(tmp_path, bucket, "train", tiny_corpus)
    ended = machine.run("train.max_steps=8", "train.eval_interval=4")
    assert ended.status == 0, ended
    here = str(machine.folder.path)
    there = f"{machine.storage}/tiny"
    prompt = ["--prompt", "the cat", "--temperature", "0", "--device", "cpu"]

    def printed(main, *args) -> str:
        assert main(list(args)) == 0
        return capsys.readouterr().out

    local = printed(sample.main, here, *prompt)
    machine.lose()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "reader"))
    assert printed(sample.main, there, *prompt).split("\n")[1:] == local.split("\n")[1:]
    checkpoint = f"{there}/checkpoints/step-00000008"
    assert printed(sample.main, checkpoint, *prompt).split("\n")[1:] == local.split("\n")[1:]
    monkeypatch.setenv("ESPALIER_STORAGE", machine.storage)
    assert printed(sample.main, "tiny", *prompt).split("\n")[1:] == local.split("\n")[1:]
    Path(tiny_corpus).rename(tmp_path / "gone")
    try:
        assert "the same bits" in printed(evaluate.main, there, "--best", "--tokens", "400")
    finally:
        (tmp_path / "gone").rename(tiny_corpus)


def test_run_with_the_name_of_a_mirrored_sweep_is_refused(bucket, tmp_path, tiny_corpus):
    sweep = SweepFolder(tmp_path / "sweep" / "tiny")
    sweep.path.mkdir(parents=True)
    sweep.run_file.write_text(json.dumps({"key": "k"}))
    sweep.sweep_file.write_text("name: tiny")
    mirror = parse("mirror", f"{bucket.address}/mirror")
    with session.mirrored(sweep, mirror, sweep.path.parent) as uploader:
        assert uploader.finish(20)
    ended = Machine(tmp_path, bucket, "train", tiny_corpus).run()
    assert ended.status == 2
    assert "is the folder of a sweep" in ended.err


def test_tokens_come_from_the_mirror_on_a_new_machine(bucket, tmp_path, tiny_corpus):
    machine = Machine(tmp_path, bucket, "prepare", tiny_corpus)
    assert "tokenizing" in machine.run().out
    machine.lose()
    again = machine.run()
    assert again.status == 0, again
    assert "tokenizing" not in again.out


@pytest.mark.parametrize(
    ("phase", "number", "status"),
    [("restore", signal.SIGINT, 130), ("corpus", signal.SIGTERM, 75), ("end", signal.SIGTERM, 75)],
)
def test_signal_does_not_wait_for_a_store_that_is_away(
    bucket, tmp_path, tiny_corpus, phase, number, status
):
    machine = Machine(tmp_path, bucket, "train", tiny_corpus)
    machine.job = {"values": FAST | {"orchestrator.objects.store:PATIENCE_S": 1e9}}
    bucket.put("corpus/a.txt", Path(tiny_corpus).read_bytes())
    machine.words.append(f"data.corpus={bucket.address}/corpus/*.txt")
    if phase == "restore":
        assert machine.run("train.max_steps=8").status == 0
        machine.lose()
    away = {"restore": "/checkpoints/", "corpus": "/corpus/a.txt", "end": "/summary.json"}[phase]
    asked = []

    def decide(_number, _method, path):
        if away not in path:
            return ""
        asked.append(path)
        return "503"

    bucket.proxy.decide = decide
    command = machine.start("train.max_steps=8")
    wait_until(lambda: asked)
    command.kill(number)
    ended = command.wait(60)
    assert ended is not None, "it waits for the store"
    assert ended.status == status, ended
    [line] = ended.lines
    assert "None" not in line


@pytest.mark.parametrize(
    ("words", "fault", "status", "says"),
    [
        (["storage=s3://Bad/x"], "", 2, "is not s3://BUCKET/KEY"),
        (["storage=s3://k:secret@bucket/x"], "", 2, "contains a"),
        (["mirror=/tmp/x"], "", 2, "set one of the two"),
        (["storage={}-missing/x"], "", 2, "there is no such bucket"),
        (["storage={}" + 5 * f"/{'x' * 150}"], "", 2, "the names of files follow it"),
        (["storage={}/x\ny"], "", 2, "or a control character"),
        ([], "403 ExpiredToken", 2, "the credentials have expired"),
        ([], "403 AccessDenied", 2, "may not do this"),
        ([], "503", 75, "does not answer"),
        ([], "reset", 75, "does not answer"),
    ],
)
def test_store_that_cannot_be_used_is_one_line_and_no_folder(
    bucket, tmp_path, tiny_corpus, words, fault, status, says
):
    machine = Machine(tmp_path, bucket, "train", tiny_corpus)
    machine.job = {"values": {"orchestrator.objects.store:PATIENCE_S": 0.2}}
    bucket.proxy.decide = lambda *_: fault
    ended = machine.run(*[word.format(bucket.address) for word in words])
    assert ended.status == status, ended
    [line] = ended.lines
    assert says in line
    assert "secret" not in line
    assert not machine.folder.path.exists()
