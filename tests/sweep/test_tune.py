"""Ray Tune runs the tree: order of stages, processes, resources, faults, asha."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from orchestrator.cluster import layout as launch
from orchestrator.cluster.layout import Layout
from orchestrator.data.batches import Batches, TokenStream
from orchestrator.data.dataset import FILE, load_manifest, write_manifest
from orchestrator.objects import cache
from orchestrator.objects.address import parse
from orchestrator.runs import events, journal, stop
from orchestrator.runs.ending import Ending
from orchestrator.runs.folder import SweepFolder
from orchestrator.sweep import tune as sweep
from orchestrator.sweep.report.files import SweepFiles
from orchestrator.sweep.study import Study
from orchestrator.sweep.trials import data_key
from orchestrator.workers import marks
from orchestrator.workers.watch import Watch

NOT_HERE = parse("mirror", "s3://bucket/mirror")  # no folder here is the scratch of this storage
ONE, TWO = Layout(1, 1, False), Layout(2, 1, False)
FORK = [
    "sweep.grid.schedule.max_lr=[1e-2]",
    "sweep.grid.schedule.decay_shape=[linear, cosine]",
]  # a trunk with two ends
# Two such forks, one of which shares its warm-up with a cosine.
TREE = [
    "sweep.grid.schedule.max_lr=[1e-2, 5e-3]",
    FORK[1],
    "sweep.trials.cosine={schedule.kind: cosine, train.max_steps: 14}",
]


@pytest.fixture
def on_ray(ray_cluster) -> Callable:
    """Return a function that runs a study as `SweepJob` does, and returns what it observed."""

    def run(
        study: Study, layout: Layout, slots: int, tick: Callable = lambda: None, mirror=None
    ) -> SimpleNamespace:
        study.layout = layout
        progress = study.progress
        progress.tick = tick
        report = SweepFiles(study)
        report.write_figure = lambda: None  # it takes a second and has its own tests
        progress.on_stage_end = report.stage_ended
        report.begin()
        pids, ended = {}, progress.ended

        def with_pid(stage: str, died: bool, problem: str | None) -> None:
            (pids[stage],) = {mark.pid for mark in marks.read(progress.folder.stage(stage))} or {0}
            ended(stage, died, problem)

        if layout.num_workers == 1:
            progress.ended = with_pid
        with Watch(study.folder, progress.running):
            sweep.execute(study, slots, mirror)
        report.finish(Ending("done"), 1.0)
        assert not progress.states.pending
        return SimpleNamespace(
            progress=progress,
            pids=pids,
            states={row.trial: row.state for row in study.results()},
            reasons={row.trial: row.reason for row in study.results()},
        )

    return run


def begun(study: Study) -> dict[str, float]:
    """Time of the first line of every stage, in ms."""
    folders = study.folder.stages()
    return {folder.name: journal.read(folder)[0]["timestamp"] for folder in folders}


def ended(study: Study) -> dict[str, float]:
    return {
        f.parent.name: f.stat().st_mtime for f in study.folder.path.glob("stages/*/result.json")
    }


def assert_alone(sweeps, study: Study, names=None) -> None:
    for name in names or study.trials:
        assert sweeps.outcome(study.folder.trial(name)) == sweeps.alone(study, name), name


# ---- processes and order ----
def test_one_process_runs_all_stages_in_order_and_gives_the_bits_of_lone_runs(sweeps, on_ray):
    study = sweeps.open(*TREE)
    pids = on_ray(study, ONE, slots=1).pids
    assert (len(pids), len(set(pids.values()))) == (8, 1)
    assert_alone(sweeps, study)
    assert_order(study)
    assert_parents_first(study)


def assert_order(study: Study) -> None:
    """Check that each stage to start had the longest remaining path of those that were ready."""
    order = sorted(begun(study), key=begun(study).get)
    plan = study.tree

    def ahead(stage) -> int:
        return stage.steps + max(
            (ahead(child) for child in plan.children.get(stage.id, ())), default=0
        )

    for n, chosen in enumerate(order):
        ready = [s for s in plan.stages if s.id not in order[:n] and s.parent in (None, *order[:n])]
        assert chosen in [s.id for s in ready if ahead(s) == max(map(ahead, ready))], (
            f"stage {n} to begin"
        )


def assert_parents_first(study: Study) -> None:
    began, end = begun(study), ended(study)
    children = [stage for stage in study.tree.stages if stage.parent]
    assert children
    for stage in children:
        assert began[stage.id] >= end[stage.parent]


def test_sweep_without_a_free_cpu_says_so_and_ends(sweeps, ray_cluster, monkeypatch):
    monkeypatch.setattr(sweep, "START_S", 0.5)
    others = ray_cluster.util.placement_group([{"CPU": ray_cluster.cluster_resources()["CPU"]}])
    assert others.wait(60)
    study = sweeps.open("compute.wait_for_nodes_s=2", *FORK)
    try:
        sweep.execute(study, 1)
    finally:
        ray_cluster.util.remove_placement_group(others)
    [waiting] = [event["message"] for event in events.read(study.folder)]
    assert waiting.startswith("no room for 1 worker(s)") and "perhaps in use" in waiting
    assert "run the same command again" in stop.requested(study.folder)


# ---- two workers ----
def test_two_workers_give_the_bits_of_one_and_use_only_the_resources_of_their_stage(
    sweeps, on_ray, ray_cluster
):
    """Four stages are suggested, but the four CPUs hold two. The others wait and hold none."""
    seen = []

    def tick() -> None:
        groups = [
            g for g in ray_cluster.util.placement_group_table().values() if g["state"] == "CREATED"
        ]
        shapes = {tuple(sorted(map(str, g["bundles"].values()))) for g in groups}
        seen.append((len(groups), shapes, ray_cluster.available_resources().get("CPU", 0.0)))

    study = sweeps.open(*TREE, "sweep.trials.other.optim.weight_decay=0.3", "train.max_steps=16")
    assert launch.capacity(TWO) == 2
    on_ray(study, TWO, slots=4, tick=tick)
    assert_alone(sweeps, study)
    assert max(count for count, _, _ in seen) == 2
    assert set.union(*(shapes for _, shapes, _ in seen)) == {("{'CPU': 1.0}", "{'CPU': 1.0}")}
    # Workers outside their placement group would take more CPUs.
    assert min(free for count, _, free in seen if count == 2) == 0.0
    # Groups and free CPUs are read one after the other: only what two ticks saw alike is one state.
    steady = [now for before, now in pairwise(seen) if before == now]
    assert steady, seen
    assert min(free + 2 * count for count, _, free in steady) >= 4.0


def spoiled(dataset: Path, folder: Path, offset: int) -> Path:
    """Copy a dataset, with an invalid token at `offset` of train and a manifest that fits."""
    shutil.copytree(dataset, folder)
    raw = json.loads((folder / FILE).read_text())
    shard = raw["splits"]["train"]["shards"][0]
    place, stream = folder / shard["name"], TokenStream(dataset, "train")
    data = bytearray(place.read_bytes())
    start = bytes(data).index(stream.read(0, 1024).tobytes())
    data[start + 2 * offset : start + 2 * offset + 2] = b"\xff\xff"
    place.write_bytes(data)
    shard["sha256"] = hashlib.sha256(data).hexdigest()
    write_manifest(
        folder, {k: v for k, v in raw.items() if k not in ("format_version", "files", "sha256")}
    )
    return folder


def read_by_one_peer(study: Study, dataset: Path) -> int:
    """Return the offset of a token that only rank 1 reads, after step 3 of the second seed."""
    readers: dict[int, set] = {}
    for seed in (1, 2):
        e = next(s.experiment for s in study.sweep.trials if s.experiment.train.seed == seed)
        t = e.train
        batches = Batches(
            TokenStream(dataset, "train"),
            e.model.block_size,
            e.batch_sizes,
            t.micro_batch_size,
            seed,
        )
        for step in range(t.max_steps):
            for n, offset in enumerate(batches.offsets(step).tolist()):
                rank = n // (
                    t.global_batch_size // 2
                )  # the second worker has the second half of the micro-batches
                for token in range(offset, offset + e.model.block_size + 1):
                    readers.setdefault(token, set()).add((seed, step > 2, rank))
    return next(
        token
        for token, who in readers.items()
        if who == {(2, True, 1)} and token > e.train.eval_tokens
    )


def test_stage_runs_again_if_a_worker_is_killed_and_fails_if_a_worker_raises(
    sweeps, on_ray, ray_head, tmp_path
):
    """In both cases the other worker reports a closed connection, which is not the reason."""
    sound = sweeps.open(
        "sweep.trials.killed={train.seed: 1, train.max_steps: 90}",  # the longest one starts first
        "sweep.trials.raises={train.seed: 2}",
        "sweep.trials.raises-too={train.seed: 2, schedule.decay_shape: cosine}",
        "train.max_steps=80",
    )
    dataset = next(iter(sound.trials.values())).dataset.directory
    bad = load_manifest(spoiled(dataset, tmp_path / "bad", read_by_one_peer(sound, dataset)))
    study = Study(
        sound.sweep,
        SweepFolder(tmp_path / "sweep"),
        TWO,
        {data_key(s.experiment.data): bad for s in sound.sweep.trials},
    )
    killed, head = [], ray_head.pid  # Tune pickles what its searcher knows

    def tick() -> None:
        if not killed:
            killed.extend(
                pid for pid in descendants(head) if title(pid).startswith("ray::_Peer.run")
            )
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    seen = on_ray(study, TWO, slots=1, tick=tick)
    assert seen.states == {"killed": "done", "raises": "failed", "raises-too": "failed"}
    for name in ("raises", "raises-too"):
        assert seen.reasons[name] == "IndexError: index out of range in self"
    assert [f.name for f in study.folder.path.glob("stages/*/failure-rank*.txt")] == [
        "failure-rank1.txt"
    ]
    assert len(killed) == 1
    assert sorted(map(len, seen.progress.begun.values())) == [1, 2]  # one began again
    ours, alone = sweeps.outcome(study.folder.trial("killed")), sweeps.alone(sound, "killed")
    # state.json names the dataset
    assert (ours["weights"], ours["curve"]) == (alone["weights"], alone["curve"])


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def descendants(pid: int) -> list[int]:
    """Return the processes below a process: other Ray heads may run on this machine."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, new = [], [pid]
    while new:
        found += new
        new = [child for child, parent in parents.items() if parent in new]
    return found


# ---- processes without the folder of the sweep ----
@pytest.mark.parametrize("victims", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_that_share_no_folder_give_the_bits_also_if_one_is_lost(
    sweeps, on_ray, ray_head, victims
):
    """Two workers each. One is killed, with what its machine has written; then the desk is."""
    study = sweeps.open(*FORK, "train.max_steps=60")
    head, killed = ray_head.pid, []

    def training() -> list:
        """Return the stages that have a checkpoint of a process that still trains."""
        found = [(stage, marks.read(stage)) for stage in study.folder.stages()]
        return [
            (stage, ranks[0].pid)
            for stage, ranks in found
            if ranks and not ranks[0].is_over and stage.checkpoint_steps()
        ]

    def tick() -> None:
        if not killed and training():
            stage, pid = training()[0]
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)
            [own] = (cache.root() / "stages").glob(f"*/sweep/stages/{stage.name}/stage.json")
            shutil.rmtree(own.parents[3])
        elif len(killed) == 1 < victims and events.read(study.folder) and training():
            [desk] = [pid for pid in descendants(head) if title(pid).startswith("ray::Desk")]
            killed.append(desk)
            os.kill(desk, signal.SIGKILL)

    on_ray(study, TWO, slots=2, tick=tick, mirror=NOT_HERE)
    assert len(killed) == victims
    assert_alone(sweeps, study)
    restarts = events.read(study.folder)
    assert len(restarts) >= victims and {event["kind"] for event in restarts} == {"restart"}
    assert all("died without a traceback" in event["message"] for event in restarts)


# ---- a worker that hangs ----
@pytest.mark.slow
@pytest.mark.parametrize("layout", [pytest.param(ONE, id="rank 0"), pytest.param(TWO, id="rank 1")])
def test_stopped_worker_is_killed_and_its_stage_continues_from_its_checkpoint(
    sweeps, on_ray, layout
):
    """The events of the sweep name the rank, and the stacks are in the folder of the stage."""
    study = sweeps.open(
        "sweep.trials.only.train.max_steps=600",
        "train.eval_interval=600",
        "train.checkpoint_interval=100",
        "train.log_interval=50",
        "compute.hang_after_s=2",
    )
    (stage,), rank, victims = study.tree.stages, layout.num_workers - 1, []
    folder = study.folder.stage(stage.id)

    def tick() -> None:
        for mark in [] if victims else marks.read(folder):
            # Not near a checkpoint, where the limit is longer.
            if (
                mark.rank == rank
                and mark.step > 100
                and 10 < mark.step % 100 < 80
                and mark.limit == 2.0
            ):
                os.kill(mark.pid, signal.SIGSTOP)
                victims.append(mark.pid)

    seen = on_ray(study, layout, slots=1, tick=tick)
    assert_alone(sweeps, study)
    hang, restart = events.read(study.folder)
    assert (hang["kind"], hang["stage"]) == ("hang", stage.id)
    assert (restart["kind"], restart["stage"]) == ("restart", stage.id)
    assert hang["message"].startswith(f"rank {rank} (process {victims[0]} on ")
    assert seen.progress.wait_reasons == {
        stage.id: f"{hang['message']}; the stage starts once more"
    }
    assert sorted(f.name for f in folder.path.glob("hangs/0001/*")) == [
        f"hang-rank{r}.txt" for r in range(layout.num_workers)
    ]
    assert [*folder.path.glob("hang-rank*"), *folder.path.glob(".ranks/*")] == []
    assert json.loads(folder.result_file.read_text())["steps_run"] <= 500


# ---- asha ----
@pytest.mark.parametrize("mirror", [None, pytest.param(NOT_HERE, marks=pytest.mark.slow)])
def test_asha_stops_trials_for_good_and_does_not_change_the_others(sweeps, on_ray, mirror):
    words = [
        "sweep.grid.schedule.max_lr=[1e-2, 1e-5, 1e-6, 1e-7]",
        "train.max_steps=45",
        "sweep.stop=asha",
    ]
    study = sweeps.open(*words)
    seen = on_ray(study, ONE, slots=1, mirror=mirror)
    states = seen.states
    assert set(states.values()) == {"done", "stopped"}
    assert states["max_lr-0.01"] == "done"  # it reaches every rung first, and is the best
    assert "stopped by the scheduler after step 5" in seen.reasons["max_lr-1e-07"]
    assert_alone(sweeps, study, [name for name, state in states.items() if state == "done"])
    again = sweeps.open(*words)
    assert again.tree.to_run == frozenset()
    assert {row.trial: row.state for row in again.results()} == states
    unstopped = sweeps.open(*words[:2])
    assert {s.trials[0] for s in unstopped.tree.stages if s.id in unstopped.tree.to_run} == {
        name for name, state in states.items() if state == "stopped"
    }
