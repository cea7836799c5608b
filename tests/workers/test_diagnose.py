"""Each fault has the same diagnosis in a lone run and in a stage of a sweep."""

import json
import socket
from pathlib import Path

import pytest

from orchestrator.cluster.layout import Layout
from orchestrator.config.experiment import load_experiment
from orchestrator.data.dataset import load_manifest
from orchestrator.errors import NoRoomError, UnreadableError, UserError
from orchestrator.files import NotPlainFileError
from orchestrator.mirror.manifest import DamagedCopyError
from orchestrator.objects.store import StoreAwayError
from orchestrator.runs import events, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import RunFolder, SweepFolder
from orchestrator.train.numerics import Worker
from orchestrator.workers import attempts, fitting, memory
from orchestrator.workers.diagnose import advise, diagnose
from orchestrator.workers.fitting import Fit

DIED = RuntimeError("a worker died")
CUDA = """CUDA error: out of memory
CUDA kernel errors might be asynchronously reported at some other API call.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""
# As torch names it, without the import of its compiler. tests/own/test_compile.py has a real one.
InductorError = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
NOT_COMPILED = """InvalidCxxCompiler: No working C++ compiler found

from user code:
   File "/mine/conv.py", line 48, in forward
    x = self.blocks(tokens)
"""
FAULTS = {
    "a model that cannot be compiled": (
        InductorError(NOT_COMPILED),
        (
            "user",
            "exception",
            "train.compile: torch cannot compile the model: /mine/conv.py:48: InvalidCxxCompiler: "
            "No working C++ compiler found; set train.compile=false",
        ),
    ),
    "too little memory to compile": (
        InductorError("RuntimeError: CUDA out of memory"),
        ("user", "out_of_memory", "CUDA out of memory"),
    ),
    "CUDA out of memory, as torch words it first": (
        RuntimeError(CUDA),
        ("user", "out_of_memory", "CUDA error: out of memory"),
    ),
    "a failed allocation on the CPU": (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        ("user", "out_of_memory", "can't allocate memory"),
    ),
    "a failed allocation of Python": (MemoryError(), ("user", "out_of_memory", "MemoryError")),
    "a full disk": (
        OSError(28, "No space left on device"),
        ("user", "disk_full", "Free some room there"),
    ),
    "no room for the last checkpoint": (
        NoRoomError("/run/checkpoints: no room"),
        ("user", "disk_full", "the disk is full: /run/checkpoints: no room"),
    ),
    "a full quota": (OSError(122, "Disk quota exceeded"), ("user", "disk_full", "quota")),
    "a read-only file system": (
        OSError(30, "Read-only file system"),
        ("user", "disk_full", "Make it writable"),
    ),
    "a broken disk": (
        OSError(5, "Input/output error"),
        ("user", "disk_error", "the file system has an error"),
    ),
    "a checkpoint that cannot be read at the moment": (
        UnreadableError("step-00000010: cannot be read"),
        ("again", "exception", "step-00000010: cannot be read"),
    ),
    "tokens in a store that does not answer": (
        StoreAwayError("s3://b: the store does not answer"),
        ("again", "store_away", "s3://b: the store does not answer"),
    ),
    "tokens that are damaged in a store": (
        DamagedCopyError("s3://b/x: its content has changed"),
        ("user", "exception", "s3://b/x: its content has changed"),
    ),
    "a mistake of the user": (
        UserError("model.n_embd: 3\nlower it"),
        ("user", "exception", "model.n_embd: 3\nlower it"),
    ),
    "a planted symlink": (NotPlainFileError("run.json: a symlink"), ("user", "exception", "run.j")),
    "a bug": (KeyError("step"), ("failed", "exception", "KeyError: 'step'")),
}


@pytest.fixture(params=["run", "stage"])
def folder(request, tmp_path) -> RunFolder:
    found = SweepFolder(tmp_path).stage("a")
    if request.param == "run":
        found = RunFolder(tmp_path / "small")
    found.path.mkdir(parents=True)
    return found


def fail(folder: RunFolder, rank: int, error: Exception) -> None:
    """Write the traceback that a rank writes when it raises `error`."""
    try:
        raise error
    except Exception as raised:
        attempts.record_failure(folder, Worker(rank, 2), raised)


@pytest.mark.parametrize("name", FAULTS)
def test_exception_of_a_rank(folder, name):
    error, (kind, cause, words) = FAULTS[name]
    fail(folder, 1, error)
    fail(folder, 0, ConnectionError("rank 1 closed the connection"))
    ending = diagnose(folder, DIED, 2)
    assert (ending.kind, ending.cause) == (kind, cause)
    assert words in ending.reason
    assert ending.may_be_transient == (cause in ("disk_error", "store_away"))
    is_final = kind in ("user", "again") and not ending.may_be_transient
    assert folder.ending_file.exists() == is_final, "no attempt may follow"
    if kind == "failed":
        assert "in fail" in ending.facts["traceback"]


def test_only_the_last_exception_of_a_chain_counts(folder):
    try:
        raise UserError("not this one")
    except UserError:
        fail(folder, 0, KeyError("this one"))
    assert diagnose(folder, DIED).reason == "KeyError: 'this one'"


def test_workers_that_returned_are_done(folder):
    assert diagnose(folder) == Ending("done")


def test_recorded_ending_wins_and_names_the_stop_request(folder):
    fail(folder, 0, KeyError("step"))
    folder.write_ending(Ending("again", "asked to stop after step 7", {"step": 7}))
    stop.request(folder, "the node n is drained")
    ending = diagnose(folder, DIED)
    assert ending.kind == "again"
    assert ending.reason == "the node n is drained: asked to stop after step 7"
    assert ending.facts == {"step": 7}


def test_worker_that_died_without_a_traceback_may_be_started_again(folder):
    ending = diagnose(folder, DIED)
    assert (ending.kind, ending.cause, ending.may_be_transient) == ("failed", "kill", True)
    assert "a worker died" in ending.reason


@pytest.mark.parametrize(
    "message",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:301] Write error: Broken pipe",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.29",
    ],
)
def test_rank_that_lost_another_one_is_not_the_cause(folder, message):
    fail(folder, 0, RuntimeError(message))
    assert diagnose(folder, DIED, workers=2).cause == "kill"
    assert diagnose(folder, DIED).cause == "exception", "a lone worker has no other one to lose"


def test_error_of_a_connection_that_a_model_has_is_the_cause(folder):
    fail(folder, 0, ConnectionResetError(104, "Connection reset by peer"))
    ending = diagnose(folder, DIED, workers=2)
    assert ending.cause == "exception" and "ConnectionResetError" in ending.reason


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(5, "Input/output error"), "user", "the file system has an error"),
        (KeyError("step"), "failed", "3 attempts in a row failed between step 0 and the next"),
        (RuntimeError("Connection reset by peer"), "failed", "workers died without a traceback"),
    ],
)
def test_attempts_that_fail_alike_end_with_the_cause(folder, error, kind, words):
    for _ in range(attempts.PATIENCE):
        attempts.start_workers_attempt(folder, "launch", 2)
        fail(folder, 0, error)
    with pytest.raises(RuntimeError, match="3 attempts in a row"):
        attempts.start_workers_attempt(folder, "launch", 2)
    ending = folder.read_ending()
    assert ending.kind == kind and words in ending.reason
    assert ("Traceback" in ending.reason) == isinstance(error, KeyError)


def mark(folder: RunFolder, rank: int, phase: str, oom_kills: int) -> None:
    folder.rank_marks.mkdir(exist_ok=True)
    stored = {
        "rank": rank,
        "attempt": 1,
        "pid": 10 + rank,
        "born": "1",
        "host": socket.gethostname(),
        "node": "",
        "step": 5,
        "phase": phase,
        "number": 1,
        "limit": 30.0,
        "oom_kills": oom_kills,
    }
    (folder.rank_marks / f"rank-{rank}").write_text(json.dumps(stored))


@pytest.fixture
def kernel(monkeypatch) -> None:
    """Pretend that the kernel has ended three processes of this machine."""
    monkeypatch.setattr(memory, "oom_kills", lambda: 3)


def test_hang_is_named_and_noted(folder, kernel):
    mark(folder, 0, "exchange", oom_kills=2)
    mark(folder, 1, "gradient", oom_kills=2)
    folder.hang_file(1).write_text("stacks")
    fail(folder, 0, ConnectionError("rank 1 closed the connection"))
    ending = diagnose(folder, DIED, 2)
    assert (ending.kind, ending.cause, ending.may_be_transient) == ("failed", "hang", True)
    assert ending.reason.startswith("rank 1 (process 11 on ")
    assert [event["kind"] for event in events.read(folder)] == ["hang"]


def test_kill_by_the_kernel_wins_over_its_consequences(folder, kernel):
    mark(folder, 0, "failed", oom_kills=2)
    mark(folder, 1, "gradient", oom_kills=2)
    fail(folder, 0, ConnectionError("rank 1 closed the connection"))
    ending = diagnose(folder, DIED, 2)
    assert (ending.kind, ending.cause) == ("user", "out_of_memory")
    assert "the kernel ended a worker" in ending.reason


def test_kill_of_another_process_is_not_ours(folder, kernel):
    mark(folder, 0, "gradient", oom_kills=3)
    assert diagnose(folder, DIED).cause == "kill"


def test_kill_of_the_process_that_leads_the_workers(folder):
    ending = diagnose(folder, RuntimeError("killed due to the node running low on memory"), 2)
    assert (ending.kind, ending.cause) == ("user", "out_of_memory")


@pytest.fixture
def experiment():
    words = [f"model.{name}=32" for name in ("n_embd", "block_size")]
    words += ["model.n_layer=1", "model.n_head=1"]
    return load_experiment(None, [*words, "train.micro_batch_size=8", "train.global_batch_size=8"])


def test_advice_names_a_micro_batch_that_fits(
    folder, experiment, tiny_dataset, monkeypatch, capsys
):
    monkeypatch.setattr(fitting, "largest_fitting", lambda *_: Fit(4, 2**29))
    fail(folder, 0, MemoryError())
    ending = diagnose(folder, DIED)
    dataset = load_manifest(tiny_dataset)
    advised = advise(ending, folder, experiment, dataset, Layout(1, 1, False))
    assert "looking for a micro-batch that fits" in capsys.readouterr().out
    assert (
        "with train.micro_batch_size=8: MemoryError. train.micro_batch_size=4 fits "
        in advised.reason
    )
    assert (advised.kind, advised.cause) == ("user", "out_of_memory")
    [event] = events.read(folder)
    assert (event["kind"], event["message"]) == ("out_of_memory", advised.reason)
    again = advise(advised, folder, experiment, dataset, Layout(1, 1, False))
    assert again == advised, "it was measured twice"


def test_other_endings_need_no_advice(tmp_path, experiment, tiny_dataset):
    ending = Ending("failed", "a bug", cause="exception")
    dataset = load_manifest(Path(tiny_dataset))
    assert advise(ending, RunFolder(tmp_path), experiment, dataset, Layout(1, 1, False)) == ending
    assert events.read(RunFolder(tmp_path)) == []


@pytest.mark.parametrize(
    ("event", "step", "cause"),
    [
        (None, 0, "a worker died"),
        ("node_lost", 0, "node2 is lost"),
        ("resize", 0, "node2 is lost"),
        ("node_back", 5, "a worker died"),  # there was a checkpoint since
        ("sample", 0, "a worker died"),
    ],
)
def test_restart_says_why(folder, event, step, cause):
    attempts.start_workers_attempt(folder, "launch", 2)
    if event is not None:
        events.note(folder, event, "node2 is lost", step=step)
    attempts.start_workers_attempt(folder, "launch", 1)
    restart = events.read(folder)[-1]["message"]
    assert restart == f"attempt 2 begins at step 0 on 1 worker(s), because {cause}"
