"""Private functions of Ray, torch and tiktoken. A failure shows what an upgrade broke."""

import asyncio
import contextlib
import functools
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray.train

from orchestrator import lines
from orchestrator.cluster import connection, private, train_here
from orchestrator.cluster.layout import Layout
from orchestrator.cluster.room import Room
from orchestrator.errors import UserError
from orchestrator.workers.diagnose import diagnose
from orchestrator.workers.same_error import SameErrorLimit
from tests.helpers import forked, stuck
from tests.helpers.wait import wait_until


def test_local_cluster_starts_without_the_api_server_and_in_sessions_of_its_own():
    from ray._private import node, services

    originals = services.start_api_server, services.ConsolePopen
    with private.local_processes(lambda: None):
        assert services.start_api_server(include_dashboard=False) == (None, None)
        sleep = services.start_ray_process(["sleep", "60"], "raylet", fate_share=True).process
        assert os.getsid(sleep.pid) == sleep.pid, "Ray starts its processes in another way"
        sleep.kill()
    assert (services.start_api_server, services.ConsolePopen) == originals
    call = "ray._private.services.start_api_server("
    assert call in Path(node.__file__).read_text("utf-8"), (
        "Ray starts its API server in another way: it would call the metadata addresses of clouds"
    )


@pytest.mark.parametrize("leader_is_dead", [False, True])
def test_workers_end_with_the_processes_that_started_them(monkeypatch, tmp_path, leader_is_dead):
    from ray._private import worker

    started = tmp_path / "worker"
    script = f"sleep 60 & echo $! > {started}.new; mv {started}.new {started}; wait"
    leader = subprocess.Popen(["sh", "-c", script], start_new_session=True)
    child = int(wait_until(lambda: started.exists() and started.read_text()))
    if leader_is_dead:
        leader.kill()
        leader.wait()
    node = SimpleNamespace(all_processes={"raylet": [SimpleNamespace(process=leader)]})
    monkeypatch.setattr(worker, "_global_node", node)
    private.kill_local_processes()
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie")
    assert leader.wait(60) == -signal.SIGKILL


def test_only_the_line_with_the_words_is_kept_from_standard_error(capfd):
    with private.without_line("LEVEL"):
        os.write(2, b"one\nset LEVEL\ntwo\n")
    assert capfd.readouterr().err == "one\ntwo\n"


def test_messages_of_ray_are_cut_to_their_first_sentence(capsys, monkeypatch):
    from ray._private import worker

    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    private.shorten_messages()
    private.shorten_messages()
    lines = ["Raylet is terminated. Its log:\n  [state-dump]"]
    worker.print_to_stdstream(
        {"lines": lines, "pid": "raylet", "is_err": False}, ignore_prefix=False
    )
    # The cluster of other tests may print a message at this moment, too.
    [printed] = [line for line in capsys.readouterr().out.splitlines() if "is terminated" in line]
    assert "log" not in printed


def test_own_ray_without_processes_is_not_dead(ray_cluster):
    assert private.dead_process() is None, "this process has joined a cluster"


def test_raylet_of_a_joined_cluster_has_died_if_its_socket_is_closed(tmp_path, monkeypatch):
    from ray._private import worker

    path = str(tmp_path / "raylet")
    node = SimpleNamespace(all_processes={}, raylet_socket_name=path, dead_processes=list)
    monkeypatch.setattr(worker, "_global_node", node)
    with socket.socket(socket.AF_UNIX) as raylet:
        raylet.bind(path)
        raylet.listen(1)
        assert private.dead_process() is None  # it is stopped: it accepts nothing
        client, _ = raylet.accept()
        assert private.dead_process() is None
        client.close()
    assert private.dead_process() == "raylet"
    private._connection.cache_clear()
    assert private.dead_process() == "raylet", "it had ended before"


def test_running_head_and_its_token_are_found(ray_head, ray_cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", ray_head.env["RAY_ADDRESS"])
    port = ray_head.env["RAY_ADDRESS"].rpartition(":")[2]
    assert private.running_head().endswith(f":{port}")
    token = os.environ["RAY_AUTH_TOKEN"]
    assert private.token_metadata() == (("authorization", f"Bearer {token}"),)
    assert connection._answer(ray_head.env["RAY_ADDRESS"]) == "OK"


def test_causes_of_death_are_read_from_the_table_of_actors(ray_cluster):
    import ray

    @ray.remote
    class Actor:
        def end(self) -> None:
            sys.exit(1)

    actor = Actor.remote()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(actor.end.remote())
    assert private.oom_causes() == {}, "this actor did not run out of memory"

    from ray._private.state import actors
    from ray.core.generated.common_pb2 import ActorDeathCause

    [record] = [one for one in actors().values() if one["ActorID"] == actor._actor_id.hex()]
    assert isinstance(record["DeathCause"], ActorDeathCause)
    assert record["Address"]["NodeID"] == ray.get_runtime_context().get_node_id()
    assert isinstance(record["Pid"], int)
    fields = ActorDeathCause.DESCRIPTOR.fields_by_name["oom_context"].message_type.fields_by_name
    assert "error_message" in fields


def test_draining_nodes_are_read_from_the_state_of_the_cluster(ray_cluster):
    import ray._private.state

    assert ray._private.state.state.get_draining_nodes() == {}
    assert private.draining_nodes() == {}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Set the variables of Ray as `connect` does."""
    for name, value in connection.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def fit_here(work, tmp_path, *callbacks, note=pytest.fail) -> None:
    from ray.train import FailureConfig, RunConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    trainer = DataParallelTrainer(
        work,
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=RunConfig(
            name="x",
            storage_path=str(tmp_path),
            failure_config=FailureConfig(max_failures=9 if callbacks else 0),
            callbacks=list(callbacks),
        ),
    )
    room = Room(Layout(1, 1, False), [1], 60.0, lambda: 0, lambda: None, note)
    train_here.fit_here(trainer, room)


def alive_actors() -> set[str]:
    """Return the names of the classes of all actors that are alive."""
    from ray._private.state import actors

    return {actor["ActorClassName"] for actor in actors().values() if actor["State"] == "ALIVE"}


def note_actors(file: Path) -> None:
    file.write_text("\n".join(sorted(alive_actors())))


def test_ray_train_starts_no_process_besides_the_workers(ray_cluster, tmp_path):
    """A cleaner would wait for the API server at the end of each run."""
    before = alive_actors()
    fit_here(functools.partial(note_actors, tmp_path / "actors"), tmp_path)
    during = set((tmp_path / "actors").read_text().split("\n"))
    assert during - before == {"RayTrainWorker", "SynchronizationActor"}
    wait_until(lambda: alive_actors() == before)
    assert connection.ENVIRONMENT["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"


def wait_forever(file: Path) -> None:
    file.write_text(str(os.getpid()))
    threading.Event().wait()


def test_interrupt_of_the_driver_ends_the_workers(ray_cluster, tmp_path):
    started = tmp_path / "started"

    def interrupt() -> None:
        wait_until(lambda: started.exists() and started.read_text())
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        fit_here(functools.partial(wait_forever, started), tmp_path)
    interrupting.join()
    wait_until(lambda: not Path(f"/proc/{started.read_text()}").exists())


def test_interrupt_while_workers_start_ends_them(ray_cluster, tmp_path, monkeypatch):
    """They begin to train before the controller knows them."""
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    started = tmp_path / "started"
    start = WorkerGroup._start_impl

    def start_and_interrupt(self, builder):
        start(self, builder)
        wait_until(lambda: started.exists() and started.read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(WorkerGroup, "_start_impl", start_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit_here(functools.partial(wait_forever, started), tmp_path)
    wait_until(lambda: not Path(f"/proc/{started.read_text()}").exists())


def test_loss_of_a_node_while_workers_start_is_no_end_of_the_run(
    ray_cluster, tmp_path, monkeypatch
):
    from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

    pids = []
    start = WorkerGroup._start_impl

    def start_and_lose(self, builder):
        start(self, builder)
        pids.append(self.get_workers()[0].metadata.pid)
        if len(pids) == 1:
            raise ray.exceptions.ActorUnavailableError("its raylet is terminated", None)

    monkeypatch.setattr(WorkerGroup, "_start_impl", start_and_lose)
    noted = []
    work = functools.partial(note_actors, tmp_path / "actors")
    fit_here(work, tmp_path, note=lambda kind, message: noted.append(kind))
    assert (len(pids), noted) == (2, ["waiting"])
    wait_until(lambda: not Path(f"/proc/{pids[0]}").exists())


def test_workers_on_a_lost_node_are_waited_for_as_ray_does_by_default():
    from ray.train.v2._internal.execution.worker_group import state

    [patience_s] = state._shutdown_workers.__defaults__
    assert patience_s in (5, train_here.SHUTDOWN_S)


def fail() -> None:
    raise OSError("no such thing")


def test_error_of_a_worker_is_raised_in_the_driver(ray_cluster, tmp_path, capfd):
    with pytest.raises(ray.train.WorkerGroupError, match="no such thing"):
        fit_here(fail, tmp_path)
    assert capfd.readouterr().err == ""


def refuse(file: Path) -> None:
    lines.append(file, {})
    raise UserError("storage: node2 has no run in /mnt")


def test_mistake_that_a_worker_finds_ends_the_run_at_its_first_start(ray_cluster, folder, tmp_path):
    starts = tmp_path / "starts"
    with pytest.raises(ray.train.ControllerError) as ended:
        fit_here(functools.partial(refuse, starts), tmp_path, SameErrorLimit(folder, 3))
    assert len(lines.read(starts)) == 1
    found = diagnose(folder, ended.value)
    assert (found.kind, found.reason) == ("user", "storage: node2 has no run in /mnt")


def test_timeout_of_collectives_can_be_changed(tmp_path):
    """`tests/workers/test_watchdog.py` shows that a collective then ends."""
    [process] = forked.start(stuck.set_collective_timeout, [{"folder": str(tmp_path)}])
    process.join(60)
    assert process.exitcode == 0


def test_encodings_of_tiktoken_show_their_ranks():
    """`data/tokenizers/pairs.py` hashes them and counts the bytes of each token."""
    from tiktoken import Encoding

    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={"<end>": 256})
    assert encoding._mergeable_ranks == ranks
    assert encoding._special_tokens == {"<end>": 256}
    assert encoding._pat_str == "."


async def never_cancelled() -> None:
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)


def test_task_that_does_not_end_is_given_up_without_a_message(capfd, monkeypatch):
    monkeypatch.setattr(train_here, "TASK_S", 0.1)
    loop = asyncio.new_event_loop()
    task = loop.create_task(never_cancelled())
    loop.call_soon(loop.stop)
    loop.run_forever()
    train_here._end_task(task, loop)
    assert loop.is_closed() and not task.done()
    del task
    gc.collect()
    assert capfd.readouterr().err == ""


async def interrupted() -> None:
    raise KeyboardInterrupt


def test_interrupted_task_is_ended_without_a_message(capfd):
    loop = asyncio.new_event_loop()
    task = loop.create_task(interrupted())
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(task)
    train_here._end_task(task, loop)
    del task
    gc.collect()
    assert capfd.readouterr().err == ""


def test_rank_0_is_on_the_machine_of_the_driver(monkeypatch):
    from ray.train.v2._internal.execution.worker_group import WorkerGroup
    from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata

    def worker(node: str) -> SimpleNamespace:
        return SimpleNamespace(metadata=ActorMetadata(node, node, node, 1, {}), resources={})

    here = SimpleNamespace(get_node_id=lambda: "b")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    original = WorkerGroup._sort_workers_by_gpu_id_grouped_by_node
    with train_here._rank_0_here():
        ranks = WorkerGroup._assign_worker_ranks([worker(node) for node in "aabbc"])
    assert [one.metadata.node_id for one in ranks] == ["b", "b", "a", "a", "c"]
    assert [one.distributed_context.world_rank for one in ranks] == [0, 1, 2, 3, 4]
    assert WorkerGroup._sort_workers_by_gpu_id_grouped_by_node is original
