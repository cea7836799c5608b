"""Preparing a dataset: known tokens, bytes that depend only on the corpus, no partial dataset.

Most tests run the tasks in this process and in random order. Tests with `ray_cluster` use Ray.
"""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest

from orchestrator.cluster import lookout
from orchestrator.config.sections import Data
from orchestrator.data import parts, ray_tasks, tasks
from orchestrator.data import prepare as prepare_module
from orchestrator.data.dataset import load_manifest
from orchestrator.data.index import write_index
from orchestrator.data.prepare import prepare
from orchestrator.data.ray_tasks import RayTasks
from orchestrator.data.tokenizer import load_tokenizer
from orchestrator.data.tokenizers.plain import ByteTokenizer
from orchestrator.errors import NoRoomError, UnreadableError, UserError
from orchestrator.files import file_sha256
from orchestrator.jobs import restart
from orchestrator.runs import lock
from tests.helpers.datasets import data, hashes_of, ids_of, quiet
from tests.helpers.wait import wait_until

REPO = Path(__file__).resolve().parents[2]

TRAIN_SHA256 = "502a2bdc8210d1ac5d5674867cb74467dd31db575d25cf6dbb08c8bdbea8680f"
VAL_SHA256 = "68a53422394c26a655ebe641f5c6f49888e8f4e45fe5d6f02abda63ba3ebd65b"
TEXT_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


# ---- known tokens ----


def test_gpt2_tokens_of_shakespeare_are_known(here, shakespeare, gpt2_ranks, tmp_path):
    settings = Data(corpus=str(shakespeare), tokenizer="gpt2")
    made = prepare(settings, tmp_path / "s", progress=quiet, chunk_bytes=200_000)
    found = {name: (s.tokens, s.stream_sha256, s.bytes) for name, s in made.splits.items()}
    assert found == {
        "train": (301_966, TRAIN_SHA256, 1_003_854),
        "val": (36_059, VAL_SHA256, 111_540),
    }
    source = {"name": "tinyshakespeare.txt", "size": 1_115_394, "sha256": TEXT_SHA256}
    assert made.sources == [source]
    text = shakespeare.read_text("utf-8")[: int(0.9 * 1_115_394)]
    assert (ids_of(tmp_path / "s", "train") == load_tokenizer("gpt2").encode(text)).all()


def test_characters_of_shakespeare_are_known(here, shakespeare, tmp_path):
    settings = Data(corpus=str(shakespeare), tokenizer="char")
    made = prepare(settings, tmp_path / "s", progress=quiet, chunk_bytes=100_000)
    assert [split.tokens for split in made.splits.values()] == [1_003_854, 111_540]
    assert made.tokenizer["n_vocab"] == 65
    text = load_tokenizer("char", tmp_path / "s").decode(ids_of(tmp_path / "s", "val"))
    assert text == shakespeare.read_text("utf-8")[1_003_854:]


def test_large_text_in_chunks_has_the_tokens_of_the_whole(here, gpt2_ranks, tmp_path):
    code = Path(argparse.__file__).read_text("utf-8")
    text = code + "中文，没有空格。" * 300 + "x" * 5000 + "\r\n\r\n  end"
    (tmp_path / "large.txt").write_bytes(text.encode())
    settings = data(tmp_path / "large.txt", tokenizer="gpt2", append_eot=False, val_fraction=0.1)
    prepare(settings, tmp_path / "d", progress=quiet, chunk_bytes=1009)
    cut = int(0.9 * len(text))
    encode = load_tokenizer("gpt2").encode
    assert (ids_of(tmp_path / "d", "train") == encode(text[:cut])).all()
    assert (ids_of(tmp_path / "d", "val") == encode(text[cut:])).all()


# ---- the same bytes ----


@pytest.mark.parametrize("split", ["tail", "hash"])
@pytest.mark.parametrize(("tokenizer", "append_eot"), [("byte", True), ("char", False)])
def test_bytes_do_not_depend_on_chunks_or_order_of_tasks(
    here, mixed, tmp_path, split, tokenizer, append_eot
):
    settings = data(mixed, split=split, tokenizer=tokenizer, append_eot=append_eot)
    found = []
    for size in (137, 1000, 4096, 10**7):
        prepare(settings, tmp_path / str(size), progress=quiet, chunk_bytes=size, shard_rows=2)
        found.append(hashes_of(tmp_path / str(size)))
    assert len(found[0]) > 6  # several shards
    assert found[1:] == found[:1] * 3


@pytest.mark.parametrize(
    ("split", "process_bytes"), [("tail", 1 << 30), ("hash", 1 << 30), ("tail", 1)]
)
def test_threads_and_processes_give_the_same_bytes(
    mixed, tmp_path, monkeypatch, split, process_bytes
):
    prepare(data(mixed, split=split), tmp_path / "one", progress=quiet)
    monkeypatch.setattr(prepare_module, "MIN_CHUNK_BYTES", 300)
    monkeypatch.setattr(ray_tasks, "PROCESS_BYTES", process_bytes)
    monkeypatch.setattr(ray_tasks, "available_cpus", lambda: 3)
    prepare(data(mixed, split=split), tmp_path / "many", progress=quiet)
    assert hashes_of(tmp_path / "many") == hashes_of(tmp_path / "one")


def test_mistake_in_one_file_ends_the_threads(monkeypatch):
    done = []

    def task(number: int) -> None:
        done.append(number)
        if number == 0:
            raise UserError("a mistake")
        assert ray_tasks.tasks.interrupted.wait(60)

    monkeypatch.setattr(ray_tasks, "available_cpus", lambda: 2)
    jobs = [{"number": number} for number in range(100)]
    with pytest.raises(UserError, match="a mistake"):
        RayTasks(quiet).map("tokenizing", task, jobs, [1] * 100, here=True)
    assert len(done) <= 3  # one more in each thread


TWO = [ray_tasks.PROCESS_BYTES] * 2  # bytes of two jobs that have a process each


def test_killed_process_is_an_error_and_the_parts_stay(here, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_tasks, "available_cpus", lambda: 2)
    with pytest.raises(UnreadableError, match="was killed"):
        RayTasks(quiet).map("tokenizing", os._exit, [{"status": 9}] * 2, TWO, here=True)

    for kind in (UnreadableError, NoRoomError):

        def fail(*_, kind=kind):
            raise kind("a process was killed, or the disk is full")

        monkeypatch.setattr(prepare_module, "write_index", fail)
        with pytest.raises(kind):
            prepare(data(mixed), tmp_path / kind.__name__, progress=quiet)
        assert sidecars(tmp_path / kind.__name__)


WAITING = """
import signal
from orchestrator.data import ray_tasks
ray_tasks.available_cpus = lambda: 2
ray_tasks.RayTasks(lambda *_: None).map("", signal.pause, [{}] * 2, [1 << 30] * 2, here=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_a_killed_or_interrupted_driver(number):
    driver = psutil.Popen([sys.executable, "-c", WAITING], cwd=REPO)
    wait_until(lambda: len(driver.children()) >= 3, driver)  # and one of multiprocessing
    children = driver.children()
    driver.send_signal(number)
    driver.wait(timeout=30)
    assert psutil.wait_procs(children, timeout=30)[1] == []


def test_interrupt_ends_the_threads_inside_a_document(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "PIECE", 10)
    monkeypatch.setattr(prepare_module, "MIN_CHUNK_BYTES", 120)
    monkeypatch.setattr(ray_tasks, "available_cpus", lambda: 2)
    (tmp_path / "t.jsonl").write_text(f'{{"text": "{"so many words " * 8}"}}\n' * 2)
    pieces = []
    once = iter([True])
    encode = ByteTokenizer.encode

    def interrupt(self, text: str) -> np.ndarray:
        pieces.append(text)
        if next(once, False):
            os.kill(os.getpid(), signal.SIGINT)
        tasks.interrupted.wait(3)
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(data(tmp_path / "t.jsonl", split="hash"), tmp_path / "d", progress=quiet)
    assert len(pieces) < 8


def test_ids_of_a_packed_file_are_not_kept_in_memory(tmp_path):
    with ExitStack() as files:
        part = parts.Part(files, tmp_path, 0, "train")
        for _ in range(100):
            part.begin("document")
            part.add(np.zeros(50_000, np.uint16), "text")
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 9e6
    assert part.finish()["sha256"] == file_sha256(tmp_path / "00000000.train.bin")


def test_bytes_do_not_depend_on_ray_or_place_of_corpus(ray_cluster, mixed, tmp_path, request):
    prepare(data(mixed), tmp_path / "ray", progress=quiet, chunk_bytes=900, shard_rows=2)
    request.getfixturevalue("here")
    moved = tmp_path / "elsewhere" / "mixed"
    shutil.copytree(mixed, moved)
    prepare(data(moved), tmp_path / "here", progress=quiet, chunk_bytes=5000, shard_rows=2)
    assert hashes_of(tmp_path / "ray") == hashes_of(tmp_path / "here")
    assert "tmp" not in (tmp_path / "ray" / "manifest.json").read_text()


WITHOUT_RAY = """
import sys
from pathlib import Path
from orchestrator.data.prepare import prepare_in
from tests.helpers.datasets import data
prepare_in(data(Path(sys.argv[1])), Path(sys.argv[2]))
assert "ray" not in sys.modules, "ray was imported"
"""


def test_two_processes_prepare_a_small_corpus_at_once_without_ray(here, mixed, tmp_path):
    command = [sys.executable, "-c", WITHOUT_RAY, str(mixed), str(tmp_path / "small")]
    processes = [subprocess.Popen(command, cwd=REPO) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    [directory] = (tmp_path / "small" / "data").iterdir()
    prepare(data(mixed), tmp_path / "chunks", progress=quiet, chunk_bytes=900)
    assert hashes_of(directory) == hashes_of(tmp_path / "chunks")


# ---- interrupted ----

KILLED = """
import itertools, signal, sys
from pathlib import Path
import ray
from orchestrator.data.prepare import prepare
from orchestrator.data.ray_tasks import RayTasks
from tests.helpers.datasets import data
ray.init(log_to_driver=False)
calls = itertools.count()
def progress(*_):
    if next(calls) == 5:
        signal.pause()  # waits to be killed
prepare(data(Path(sys.argv[1])), Path(sys.argv[2]), progress=progress, chunk_bytes=100)
"""


def test_killed_preparation_leaves_no_dataset_and_keeps_its_parts(
    ray_head, mixed, tmp_path, here, monkeypatch
):
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(mixed), str(out)],
        env=ray_head.env,
        stderr=subprocess.DEVNULL,
        cwd=REPO,
    )
    wait_until(lambda: len(sidecars(out)) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(UserError, match="prepare"):
        load_manifest(out)

    before = sidecars(out)
    after = {}

    def note_sidecars(*args):
        after.update(sidecars(out))
        write_index(*args)

    monkeypatch.setattr(prepare_module, "write_index", note_sidecars)
    prepare(data(mixed), out, progress=quiet, chunk_bytes=100)
    assert sum(after.get(file) == written for file, written in before.items()) >= 5
    prepare(data(mixed), tmp_path / "fresh", progress=quiet, chunk_bytes=100)
    assert hashes_of(out) == hashes_of(tmp_path / "fresh")


def sidecars(directory: Path) -> dict[Path, int]:
    """Return the sidecars of parts, and the times when they were written."""
    files = directory.glob(".parts/*/[0-9]*.json")
    return {file: file.stat().st_mtime_ns for file in files if file.name.count(".") == 1}


@pytest.mark.parametrize(
    "change", ["00000000.train.bin", "00000000.train.json", "another text of the same size"]
)
def test_damaged_parts_and_parts_of_another_text_are_written_again(
    here, mixed, tmp_path, monkeypatch, change
):
    def full_disk(*_):
        raise OSError("disk full")

    settings = data(mixed, val_fraction=0.01)  # no file is val by its content
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_shard", full_disk)
        with pytest.raises(OSError, match="disk full"):
            prepare(settings, tmp_path / "d", progress=quiet, chunk_bytes=500)
    [*torn] = (tmp_path / "d").glob(f".parts/*/{change}")
    file = torn[0] if torn else mixed / "a.txt"
    content = file.read_bytes()
    written = file.stat().st_mtime_ns
    file.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    os.utime(file, ns=(written, written))  # only the content tells
    prepare(settings, tmp_path / "d", progress=quiet, chunk_bytes=500)
    prepare(settings, tmp_path / "fresh", progress=quiet)
    assert hashes_of(tmp_path / "d") == hashes_of(tmp_path / "fresh")
    assert not (tmp_path / "d" / ".parts").exists()


def test_no_dataset_if_the_corpus_changes_during_the_preparation(
    here, mixed, tmp_path, monkeypatch
):
    def change_corpus(*args):
        write_index(*args)
        (mixed / "a.txt").write_text("other")

    monkeypatch.setattr(prepare_module, "write_index", change_corpus)
    with pytest.raises(UserError, match="while it was prepared"):
        prepare(data(mixed), tmp_path / "d", progress=quiet)
    assert not (tmp_path / "d").exists()


def test_preparing_again_does_nothing(here, mixed, tmp_path, monkeypatch):
    first = prepare(data(mixed), tmp_path / "d", progress=quiet)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()}
    monkeypatch.setattr(prepare_module, "RayTasks", lambda: pytest.fail("Ray was started"))
    assert prepare(data(mixed), tmp_path / "d", progress=quiet) == first
    os.utime(mixed / "a.txt")  # newer than the dataset, with the same content
    assert prepare(data(mixed), tmp_path / "d", progress=quiet) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").iterdir()} == before


def test_preparation_says_what_it_takes_and_what_it_leaves_out(here, tmp_path, capsys):
    (tmp_path / "c").mkdir()
    lines = [json.dumps({"text": text}) for text in ("a" * 30, None, "b" * 30, None)]
    (tmp_path / "c" / "d.json").write_text("\n".join(lines))
    (tmp_path / "c" / "README.md").write_text("about")
    made = prepare(data(tmp_path / "c", on_null="skip"), tmp_path / "d", progress=quiet)
    assert made.settings["on_null"] == "skip"
    assert capsys.readouterr().out.splitlines() == [
        "corpus: 1 JSON lines, 115 bytes; left out: 1 text (README.md)",
        "documents: 2 train, 1 val, 60 bytes of text; left out: 2 null",
    ]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("content", "fields", "says"),
    [
        (b"one document", {"split": "hash"}, "leaves .* without a token"),
        (b"", {}, "holds no text"),
        (b"\xff", {}, "not UTF-8"),
        (b"abc", {"tokenizer": "nope"}, "unknown"),
        (b"abc", {"tokenizer": "char"}, "no end-of-text"),
    ],
)
def test_mistake_leaves_nothing(here, tmp_path, content, fields, says):
    corpus = tmp_path / "t.txt"
    corpus.write_bytes(content)
    for directory in (tmp_path / "new" / "data" / "d", tmp_path / "old"):
        if directory.name == "old":
            (directory / ".parts" / "killed").mkdir(parents=True)
            (directory / "notes").write_text("of the user")
        with pytest.raises(UserError, match=says):
            prepare(data(corpus, **fields), directory, progress=quiet)
    is_early = says in ("unknown", "holds no text")  # then the folder is not touched
    left = {path.name for path in tmp_path.rglob("*")}
    assert left == {"t.txt", "old", "notes"} | ({".parts", "killed"} if is_early else set())


def test_file_system_without_locks_leaves_nothing(here, mixed, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="has no locks"):
        prepare(data(mixed), tmp_path / "new" / "d", progress=quiet)
    with pytest.raises(UserError, match="has no locks"), lock.held(tmp_path / "new" / ".lock"):
        pytest.fail("held")
    assert not (tmp_path / "new").exists()


def test_preparation_that_waited_for_a_refused_one_makes_the_folder_again(
    here, mixed, tmp_path, capsys
):
    directory = tmp_path / "new" / "d"
    with ThreadPoolExecutor(1) as pool:
        with contextlib.suppress(UserError), prepare_module._alone(directory):
            waiting = pool.submit(prepare, data(mixed), directory, progress=quiet)
            wait_until(lambda: "waiting" in capsys.readouterr().out)
            raise UserError("refused")
        assert waiting.result(30) == load_manifest(directory)
    assert (directory / ".lock").exists()


def test_too_long_a_run_of_spaces_is_a_user_error(here, gpt2_ranks, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"some words, then " + b" " * 1_100_000 + b"and the end")
    settings = data(tmp_path / "t.txt", tokenizer="gpt2", val_fraction=0.000001)
    with pytest.raises(UserError, match=r"t\.txt: a run of whitespace too long"):
        prepare(settings, tmp_path / "d", progress=quiet)


def test_error_in_a_task_reaches_the_user_through_ray(ray_cluster, tmp_path):
    (tmp_path / "t.txt").write_bytes(b"fine so far \xff")
    with pytest.raises(UserError, match=r"t\.txt: byte 12"):
        prepare(data(tmp_path / "t.txt"), tmp_path / "d", progress=quiet, chunk_bytes=1000)


@pytest.fixture
def quick_lookout(ray_cluster, monkeypatch):
    """A lookout that says at once that no task has ended."""
    monkeypatch.setattr(lookout, "QUIET_S", 0.1)
    monkeypatch.setattr(lookout, "LOOK_S", 0.1)
    monkeypatch.setattr(lookout.connection, "is_shared", lambda: True)


@pytest.fixture
def no_free_cpu(ray_cluster, quick_lookout):
    """A cluster whose CPUs another job has."""
    others = ray_cluster.util.placement_group([{"CPU": ray_cluster.cluster_resources()["CPU"]}])
    assert others.wait(60)
    yield others
    ray_cluster.util.remove_placement_group(others)


def test_wait_for_cpus_that_others_use_is_announced(no_free_cpu, ray_cluster, capfd):
    def end_others() -> None:
        try:
            wait_until(lambda: "all CPUs are in use" in capfd.readouterr().out)
        finally:
            ray_cluster.util.remove_placement_group(no_free_cpu)

    ending = threading.Thread(target=end_others)
    ending.start()
    assert RayTasks(quiet).map("", dict, [{"x": 1}], [1]) == [{"x": 1}]
    ending.join()


def test_wait_for_a_slow_task_is_announced(quick_lookout, tmp_path, capfd):
    def wait_for(file: str) -> None:
        while not os.path.exists(file):
            time.sleep(0.01)

    def end_task() -> None:
        try:
            wait_until(lambda: "a node or its network may be slow" in capfd.readouterr().out)
        finally:
            (tmp_path / "end").touch()

    ending = threading.Thread(target=end_task, daemon=True)
    ending.start()
    RayTasks(quiet).map("", wait_for, [{"file": str(tmp_path / "end")}], [1])
    ending.join()


def test_wait_for_lost_nodes_is_announced_and_ends(no_free_cpu, monkeypatch, capfd):
    monkeypatch.setattr("orchestrator.cluster.room.alive_nodes", lambda: [])
    message = "no room for 1 worker.* run the same command again"
    with restart.watching(), pytest.raises(UnreadableError, match=message):
        RayTasks(quiet, wait_s=0.5).map("", dict, [{"x": 1}], [1])
    assert "no room for 1 worker(s) with 1 CPU(s) each" in capfd.readouterr().out


def test_full_disk_while_tokens_are_written_is_one_line():
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "train-00000.parquet")

    ray_tasks = RayTasks(quiet)
    with pytest.raises(
        NoRoomError, match=r"^the disk is full: .*train-00000.parquet.*run the same"
    ):
        ray_tasks.map("writing", full, [{}], [1], here=True)
