"""`pipelines/sweep.py`: every trial equals its own run, also after kills on a real cluster."""

import contextlib
import csv
import io
import itertools
import json
import os
import signal
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from model.schedule import learning_rate
from orchestrator.checkpoint import store as checkpoint
from orchestrator.config.experiment import load_experiment
from orchestrator.data.prepared import dataset_dir
from orchestrator.errors import EXIT_DONE, EXIT_FAILED, UserError
from orchestrator.runs import events, journal
from orchestrator.runs.folder import RunFolder
from orchestrator.sweep.report.files import SweepFiles
from orchestrator.sweep.space.expand import load_sweep
from orchestrator.train.loop import train
from orchestrator.train.numerics import Worker
from orchestrator.workers import fitting
from tests.helpers import warm
from tests.helpers.curves import exact_part
from tests.helpers.local_job import LocalSweepJob, without_ray
from tests.helpers.small_run import misleading_folder
from tests.helpers.tiny import TINY
from tests.helpers.wait import wait_until

REPO = Path(__file__).resolve().parent.parent.parent
SMALL = REPO / "tests" / "helpers" / "small.yaml"
CPUS = 2  # the Ray head has four, so two stages run at the same time
BASE = [
    *TINY,
    "train.max_steps=20",
    "train.log_interval=3",
    "train.eval_interval=5",
    "train.eval_tokens=400",
    "train.checkpoint_interval=100",
    "schedule.kind=wsd",
    "schedule.warmup_steps=4",
    "schedule.max_lr=1e-2",
    f"compute.cpus_per_worker={CPUS}",
]
PEAKS, HORIZONS, SHAPES = ["0.01"], ["20", "30"], ["linear", "cosine"]
WRITERS = "stages/*/.writer"  # lock of the process that trains a stage
NAMED = {
    "cosine": ["schedule.kind=cosine", "train.max_steps=30"],
    "other": ["optim.weight_decay=0.3"],
}
MORE_PEAKS, MORE_HORIZONS = [*PEAKS, "0.03"], [*HORIZONS, "25"]
# Steps that run again for the old peak. A trial of 30 steps has checkpoints at step 17, where
# the trial of 20 steps branched off, and at its end. The trial of 25 steps branches off at step 21.
AGAIN = 4


def space(peaks=PEAKS, horizons=HORIZONS) -> list[str]:
    """Return the overrides of a sweep: a grid of wsd schedules, and the trials of `NAMED`."""
    named = [f"sweep.trials.{name}.{word}" for name, words in NAMED.items() for word in words]
    return [
        f"sweep.grid.schedule.max_lr=[{', '.join(peaks)}]",
        f"sweep.grid.train.max_steps=[{', '.join(horizons)}]",
        f"sweep.grid.schedule.decay_shape=[{', '.join(SHAPES)}]",
        *named,
    ]


def trials(peaks=PEAKS, horizons=HORIZONS) -> dict[str, list[str]]:
    """Return the overrides of each trial of `space`, without the code of the sweep."""
    grid = {
        f"decay_shape-{shape}_max_lr-{peak}_max_steps-{steps}": [
            f"schedule.decay_shape={shape}",
            f"schedule.max_lr={peak}",
            f"train.max_steps={steps}",
        ]
        for peak, steps, shape in itertools.product(peaks, horizons, SHAPES)
    }
    return grid | NAMED


def count_steps(asked: dict[str, list[str]]) -> int:
    """Count the distinct steps by brute force: prefixes of learning rates, by weight decay."""
    prefixes = set()
    for words in asked.values():
        e = load_experiment(SMALL, [*BASE, *words])
        rates = np.array(
            [learning_rate(e.lr_schedule(), step) for step in range(e.train.max_steps)]
        ).tobytes()
        prefixes |= {
            (e.optim.weight_decay, rates[: 8 * (step + 1)]) for step in range(e.train.max_steps)
        }
    return len(prefixes)


# ---- running it ----
def command(storage: Path, corpus: Path, *words: str) -> list[str]:
    return [
        sys.executable,
        str(REPO / "pipelines" / "sweep.py"),
        str(SMALL),
        f"storage={storage}",
        f"data.corpus={corpus}",
        "name=mixed",
        *BASE,
        *words,
    ]


def run_here(storage: Path, corpus: Path, *words: str) -> int:
    """Do the sweep of `command` in this process, without Ray. Return the exit status."""
    file, *words = command(storage, corpus, *words)[2:]
    with without_ray(cpus=2 * CPUS):
        return LocalSweepJob(load_sweep(Path(file), words)).run()


def begin(ray_head, storage: Path, corpus: Path, *words: str) -> warm.Process:
    return warm.Process(command(storage, corpus, *words)[1:], ray_head.env, misleading_folder())


# ---- results ----
def read(path: Path):
    return json.loads(path.read_text())


def results(sweep: Path) -> dict[str, tuple[int, bytes]]:
    """Return the time and content of each result.json."""
    return {
        file.parent.name: (file.stat().st_mtime_ns, file.read_bytes())
        for file in sweep.glob("stages/*/result.json")
    }


def exact(run_dir: Path) -> list[dict]:
    """Return the exact metrics of a run."""
    return [exact_part(r) for r in journal.read(RunFolder(run_dir))]


def outcome(trial: Path) -> tuple[str, list[dict]]:
    return read(trial / "summary.json")["weights_sha256"], exact(trial)


def ranking(text: str) -> list[str]:
    """Return the lines of the printed comparison."""
    lines = text.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("rank "))
    return lines[first : lines.index("", first)]


def outcomes(sweep: Path) -> dict[str, tuple[str, list[dict]]]:
    """Return the outcomes of all trials that ended."""
    return {file.parent.name: outcome(file.parent) for file in sweep.glob("trials/*/summary.json")}


def mlflow_runs(storage: Path) -> dict[str, tuple[str, str, str | None]]:
    """Return `{name: (run id, status, id of the parent)}` from the MLflow store."""
    query = (
        "select name, r.run_uuid, status, t.value from runs r left join tags t "
        "on t.run_uuid = r.run_uuid and t.key = 'mlflow.parentRunId'"
    )
    with sqlite3.connect(storage / "mlflow" / "mlflow.db") as db:
        rows = db.execute(query).fetchall()
    assert len({row[0] for row in rows}) == len(rows), "a trial has two runs"
    return {name: tuple(rest) for name, *rest in rows}


def points(storage: Path, run_id: str) -> list[tuple[int, float]]:
    with sqlite3.connect(storage / "mlflow" / "mlflow.db") as db:
        query = (
            "select step, value from metrics where key = 'train/loss' and run_uuid = ? "
            "order by step"
        )
        return db.execute(query, [run_id]).fetchall()


def assert_tracked(storage: Path, statuses: dict[str, str], whole: str) -> None:
    """Check in MLflow: the sweep, its trials and their statuses, and each curve from step 0 on."""
    runs = mlflow_runs(storage)
    parent, status, _ = runs.pop("mixed")
    assert status == whole
    assert {name: status for name, (_, status, _) in runs.items()} == statuses
    assert {above for _, _, above in runs.values()} == {parent}
    for name, (run_id, _, _) in runs.items():
        curve = journal.read(RunFolder(storage / "mixed" / "trials" / name))
        assert points(storage, run_id) == [
            (r["step"], r["train/loss"]) for r in curve if "train/loss" in r
        ], name


@pytest.fixture(scope="module")
def golden(tiny_corpus, tmp_path_factory) -> SimpleNamespace:
    """An undisturbed sweep in this process: its output and results. A later test extends it."""
    storage = tmp_path_factory.mktemp("golden")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run_here(storage, tiny_corpus, *space()) == EXIT_DONE
    sweep, data = (
        storage / "mixed",
        load_experiment(None, [f"data.corpus={tiny_corpus}", "data.tokenizer=char"]).data,
    )
    return SimpleNamespace(
        storage=storage,
        sweep=sweep,
        text=out.getvalue(),
        summary=read(sweep / "summary.json"),
        outcomes=outcomes(sweep),
        results=results(sweep),
        data=dataset_dir(data, storage),
    )


@pytest.fixture(scope="module")
def alone(golden, tmp_path_factory):
    """Return a function that trains one trial as a run of its own, in this process."""
    folder, known = tmp_path_factory.mktemp("alone"), {}

    def one(words: list[str]) -> tuple[str, list[dict]]:
        key = " ".join(words)
        if key not in known:
            run_dir = folder / str(len(known))
            run_dir.mkdir()
            train(
                load_experiment(SMALL, [*BASE, *words]),
                RunFolder(run_dir),
                golden.data,
                Worker(cpus=CPUS),
            )
            last = checkpoint.latest_valid(run_dir / "checkpoints")
            known[key] = (
                checkpoint.weights_sha256(checkpoint.load_tensors(last, "model")),
                exact(run_dir),
            )
        return known[key]

    return one


# ---- undisturbed ----
def test_every_trial_equals_its_own_run_and_no_step_runs_twice(golden, alone):
    asked = trials()
    assert set(golden.outcomes) == set(asked)
    for name, words in asked.items():
        assert golden.outcomes[name] == alone(words), name
    s = golden.summary
    assert (s["status"], s["trials"], s["done"]) == ("FINISHED", len(asked), len(asked))
    assert (
        s["steps_run"]
        == s["steps_in_tree"]
        == count_steps(asked)
        < s["steps_asked"]
        == 2 * 20 + 2 * 30 + 30 + 20
    )
    assert (
        sum(json.loads(text)["steps_run"] for _, text in golden.results.values()) == s["steps_run"]
    )
    assert s["stages_run"] == len(golden.results)


def test_output_ranks_trials_and_names_the_best(golden):
    losses = {name: curve[-1]["val/loss"] for name, (_, curve) in golden.outcomes.items()}
    best = min(losses, key=losses.get)
    assert (golden.summary["best_trial"], golden.summary["best_value"]) == (best, losses[best])
    for words in (
        "2 stage(s) at a time",
        f"pipelines/sample.py {golden.sweep}/trials/{best}",
        *losses,
    ):
        assert words in golden.text
    assert Path(golden.summary["best_checkpoint"]).is_dir()
    assert {"comparison.csv", "plan.txt", "sweep.yaml"} <= {
        file.name for file in golden.sweep.iterdir()
    }
    assert [file.name for file in golden.sweep.glob("figures/*")] == ["tree.png"]


def test_mlflow_has_every_trial_with_its_whole_curve(golden):
    assert_tracked(golden.storage, dict.fromkeys(golden.outcomes, "FINISHED"), "FINISHED")


def test_finished_sweep_runs_nothing_and_prints_ranking_again(golden, tiny_corpus, capsys):
    assert run_here(golden.storage, tiny_corpus, *space()) == EXIT_DONE
    again = capsys.readouterr().out
    assert "is finished" in again
    assert ranking(again) == ranking(golden.text)
    assert len(ranking(golden.text)) >= 1 + len(golden.outcomes)
    assert results(golden.sweep) == golden.results
    assert read(golden.sweep / "summary.json") == golden.summary


# ---- extended and killed ----
KILLED = [(signal.SIGKILL, -9)]
ALSO_STOPPED = [*KILLED, (signal.SIGTERM, 75), (signal.SIGINT, 130)]


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param(KILLED, id="killed"),
        pytest.param(ALSO_STOPPED, id="killed, terminated, Ctrl-C", marks=pytest.mark.slow),
    ],
)
def test_extended_sweep_runs_only_new_steps_after_any_kill(
    golden, alone, ray_head, tiny_corpus, ends, capsys
):
    """Kill a worker, and end the driver by each signal. Finished stages stay as they are.

    The sweep ends in this process.
    """
    words, sweep, stood = space(MORE_PEAKS, MORE_HORIZONS), golden.sweep, golden.results
    for number, (how, status) in enumerate(ends):
        process, enough = begin(ray_head, golden.storage, tiny_corpus, *words), len(stood) + 2
        if number == 0:
            kill_first_worker(process, sweep)
        wait_until(lambda n=enough: len(results(sweep)) >= n, process)
        stood = results(sweep)
        process.send_signal(how)
        out, err = process.communicate(timeout=120)
        assert process.returncode == status, out + err
        assert out.count("; the stage starts once more") == (number == 0)
        ended = (sweep / "summary.json").exists() and read(sweep / "summary.json")["status"]
        assert ended == (False if how == signal.SIGKILL else "KILLED")
        found = outcomes(sweep)
        assert {name: found[name] for name in golden.outcomes} == golden.outcomes, (
            "a finished trial was touched"
        )
    assert run_here(golden.storage, tiny_corpus, *words) == EXIT_DONE
    capsys.readouterr()

    asked, after, found = trials(MORE_PEAKS, MORE_HORIZONS), results(sweep), outcomes(sweep)
    assert {stage: after[stage] for stage in stood} == stood
    new = [json.loads(text) for stage, (_, text) in after.items() if stage not in golden.results]
    assert (
        sum(result["stop"] - result["start"] for result in new)
        == count_steps(asked) - count_steps(trials()) + AGAIN
    )
    assert set(found) == set(asked)
    for name in asked:
        expected = golden.outcomes.get(name) or "linear" in name and alone(asked[name])
        assert not expected or found[name] == expected, name
    with open(sweep / "comparison.csv") as file:
        finals = {row["trial"]: float(row["final"]) for row in csv.DictReader(file)}
    assert finals == {name: curve[-1]["val/loss"] for name, (_, curve) in found.items()}
    assert_tracked(golden.storage, dict.fromkeys(asked, "FINISHED"), "FINISHED")

    # With the former grid, the sweep is still finished, and its files have the former trials.
    assert run_here(golden.storage, tiny_corpus, *space()) == EXIT_DONE
    shrunk = capsys.readouterr().out
    assert "is finished" in shrunk and results(sweep) == after
    with open(sweep / "comparison.csv") as file:
        assert {row["trial"] for row in csv.DictReader(file)} == set(golden.outcomes)
    assert read(sweep / "summary.json")["trials"] == len(golden.outcomes)
    assert ranking(shrunk) == ranking(golden.text)


def kill_first_worker(process: warm.Process, sweep: Path) -> None:
    """Kill the first process that starts a stage, and wait until the stage starts once more."""
    marks = {f: f.stat().st_mtime_ns for f in sweep.glob(WRITERS)}

    def begun() -> Path | None:
        return next(
            (
                f
                for f in sweep.glob(WRITERS)
                if f.stat().st_mtime_ns != marks.get(f) and f.read_text()
            ),
            None,
        )

    _, pid, *_ = wait_until(begun, process).read_text().split()  # "process PID on host"
    os.kill(int(pid), signal.SIGKILL)
    wait_until(lambda: events.read(RunFolder(sweep)), process)


# ---- failing trials ----
FAILING = [
    "sweep.trials.first.train.max_steps=20",
    "sweep.trials.last.train.max_steps=30",
    "sweep.trials.hot={schedule.max_lr: 1e38, optim.max_grad_norm: null}",
    f"sweep.trials.huge.model.pad_vocab_to={2**42}",  # an embedding larger than the address space
    f"sweep.trials.huge-too={{model.pad_vocab_to: {2**42}, schedule.decay_shape: cosine}}",
]


def test_failed_and_diverged_trials_do_not_stop_others_and_are_reported(
    golden, tiny_corpus, tmp_path, capsys, monkeypatch
):
    # The search for a micro-batch that fits, and the figure, take seconds and have their own tests.
    monkeypatch.setattr(fitting, "advice", lambda fault, *_: f"{fault.by}: no memory")
    monkeypatch.setattr(SweepFiles, "write_figure", lambda self: None)
    assert run_here(tmp_path, tiny_corpus, *FAILING, f"data.dir={golden.data}") == EXIT_FAILED
    text = capsys.readouterr().out
    sweep = tmp_path / "mixed"
    states = {
        "first": "done",
        "last": "done",
        "hot": "diverged",
        "huge": "failed",
        "huge-too": "failed",
    }
    summary = read(sweep / "summary.json")
    assert {key: summary.get(key) for key in ("status", "done", "failed", "diverged")} == {
        "status": "FAILED",
        "done": 2,
        "failed": 2,
        "diverged": 1,
    }
    assert {
        name: read(sweep / "trials" / name / "summary.json")["state"] for name in states
    } == states
    told = [line.split()[:2] for line in text[text.index("not ranked:") :].splitlines()]
    assert all([name, state] in told for name, state in states.items() if state != "done")
    assert len(ranking(text)) >= 1 + 2
    assert "not finite" in read(sweep / "trials" / "hot" / "summary.json")["reason"]
    assert "memory" in read(sweep / "trials" / "huge" / "summary.json")["reason"]
    for name, steps in (("first", 20), ("last", 30)):
        assert (
            outcome(sweep / "trials" / name)
            == golden.outcomes[f"decay_shape-linear_max_lr-0.01_max_steps-{steps}"]
        )
    assert_tracked(
        tmp_path, {n: "FINISHED" if s == "done" else "FAILED" for n, s in states.items()}, "FAILED"
    )


# ---- user errors ----
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["sweep.gird.schedule.max_lr=[1]"],
            ["sweep.gird: no such field; did you mean sweep.grid?"],
        ),
        (
            ["sweep.grid.schedule.max_rl=[1]"],
            ["sweep.grid.schedule.max_rl: no such field; did you mean schedule.max_lr?"],
        ),
        ([], ["sweep: no field to vary"]),
        (
            [
                "sweep.grid.schedule.max_lr=[1e-3, -1, fast]",
                "sweep.grid.compute.num_workers=[1, 2]",
                "sweep.probe_step=3",
            ],
            [
                "sweep.grid.schedule.max_lr: -1",
                'sweep.grid.schedule.max_lr: "fast"',
                "sweep.grid.compute.num_workers: cannot be swept",
                "sweep.probe_step: 3 is only for sweep.stop=anneal_probe",
            ],
        ),
        (
            ["sweep.grid.schedule.warmup_steps=[4, 25]", "sweep.grid.train.max_steps=[10, 20, 40]"],
            [
                "2 of 6 trials cannot be run",
                "trial warmup_steps-25_max_steps-10: ",
                "trial warmup_steps-25_max_steps-20: ",
            ],
        ),
        (
            [
                "sweep.trials.a.train.init_from=/no/such/a",
                "sweep.trials.b.train.init_from=/no/such/b",
            ],
            [
                "trial a: train.init_from: '/no/such/a' does not exist",
                "trial b: train.init_from: '/no/such/b' does not exist",
            ],
        ),
        (
            ["sweep.trials.a.train.max_steps=15", "sweep.from=nothing@5"],
            ["sweep.from: 'nothing': there is no run"],
        ),
    ],
)
def test_each_user_error_is_one_line_with_status_2_and_writes_nothing(
    typed, tiny_corpus, tmp_path, words, says
):
    status, text = typed("sweep.py", *command(tmp_path / "storage", tiny_corpus, *words)[2:])
    assert status == 2, text
    lines = text.strip().splitlines()
    assert len(lines) == len(says), text
    assert all(what in line for what, line in zip(says, lines, strict=True)), text
    assert not (tmp_path / "storage").exists()


def test_train_refuses_sweep_file(typed, tmp_path):
    file = tmp_path / "peaks.yaml"
    file.write_text("sweep:\n  grid:\n    schedule.max_lr: [1e-3, 2e-3]\n")
    status, text = typed("train.py", str(file), f"storage={tmp_path / 'storage'}")
    assert (status, len(text.strip().splitlines())) == (2, 1)
    assert "run pipelines/sweep.py with it" in text
    assert not (tmp_path / "storage").exists()


def test_request_beyond_the_cluster_is_refused_before_training(tiny_corpus, tmp_path):
    words = [*space(), "compute.num_workers=4", "compute.cpus_per_worker=64"]
    with pytest.raises(UserError, match=r"found 4 CPU\(s\)"):
        run_here(tmp_path / "storage", tiny_corpus, *words)
    assert not (tmp_path / "storage").exists()
