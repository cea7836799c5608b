"""What a node says of the storage and of its software, and the lines about it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from orchestrator.cluster import nodes
from orchestrator.cluster.nodes import Answer, Software
from orchestrator.errors import UnreadableError, UserError


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """Return the answer of a node that sees this file of the driver."""
    monkeypatch.setattr(nodes, "SEEN_S", 0.0)

    def of(driver_file):
        return nodes._answer(driver_file, driver_file.with_name("reply"))

    return of


def test_node_that_shares_the_folder_leaves_a_file(tmp_path, answer):
    (tmp_path / "mine").touch()
    assert answer(tmp_path / "mine").problem is None
    assert (tmp_path / "reply").exists()


def test_node_without_the_folder_or_with_another_one_says_so(tmp_path, answer):
    assert answer(tmp_path / "missing" / "mine").problem == "does not have"
    assert answer(tmp_path / "mine").problem == "has another folder at"
    assert not (tmp_path / "reply").exists()


def test_node_without_the_file_says_so_and_the_file_stays_as_it_is(tmp_path, answer):
    (tmp_path / "mine").touch()
    before = (tmp_path / "mine").stat().st_mtime_ns
    assert nodes._answer(tmp_path / "mine", tmp_path / "mine").problem is None
    assert (tmp_path / "mine").stat().st_mtime_ns == before
    (tmp_path / "mine").unlink()
    assert nodes._answer(tmp_path / "mine", tmp_path / "mine").problem == "has another folder at"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, []),
        (
            {"problem": "does not have"},
            ["storage: node2 does not have /mnt; mount the same folder"],
        ),
        (
            {"software": Software("2.11.0", "same")},
            ["node2 has torch 2.11.0 and this machine 2.13.0"],
        ),
        (
            {"software": Software("2.13.0", "other")},
            ["node2 has another version of this project than this machine; use the same"],
        ),
    ],
)
def test_node_that_differs_is_named(tmp_path, answer, change, says):
    expected = Answer(None, Software("2.13.0", "same"))
    lines = list(nodes._differences("node2", "/mnt", replace(expected, **change), expected))
    assert len(lines) == len(says)
    assert all(line.startswith(start) for line, start in zip(lines, says, strict=True))


def test_node_that_joined_with_other_software_is_refused_by_its_worker():
    own = nodes.software()
    nodes.require_software("node1", own)
    with pytest.raises(UserError, match=rf"has torch {own.torch} and node1 1\.0; install"):
        nodes.require_software("node1", replace(own, torch="1.0"))


def test_storage_must_be_absolute_on_several_nodes(monkeypatch, tmp_path):
    storage = "runs"
    monkeypatch.setattr(nodes, "check_shared", lambda folder: None)
    monkeypatch.setattr(nodes, "has_several_nodes", lambda: False)
    nodes.check_nodes(storage, tmp_path)
    monkeypatch.setattr(nodes, "has_several_nodes", lambda: True)
    nodes.check_nodes("/shared/runs", tmp_path)
    with pytest.raises(UserError, match=f"storage: '{storage}' is relative"):
        nodes.check_nodes(storage, tmp_path)


@pytest.fixture
def asked(monkeypatch):
    """A Ray of three nodes whose outcomes are values: an error, or what the node answers.

    None is no answer, "late" one in the second wait, and `away` are hosts that do not answer.
    """
    import ray

    class Asked:
        def __init__(self) -> None:
            self.outcomes: dict[str, object] = {}
            self.away: set[str] = set()
            self.cancelled: list[str] = []
            self.waits = 0

        def nodes(self) -> list[dict]:
            common = {"Alive": True, "Resources": {"CPU": 1}, "NodeManagerPort": 1}
            names = ("NodeManagerHostname", "NodeManagerAddress")
            return [
                common | dict.fromkeys(names, host) | {"NodeID": f"{host[-1]:0>56}"}
                for host in self.outcomes
            ]

        def options(self, num_cpus: int, scheduling_strategy) -> SimpleNamespace:
            def remote(mine, reply) -> str:
                if reply != mine:
                    reply.touch()
                return f"node{scheduling_strategy.node_id[-1]}"

            return SimpleNamespace(remote=remote)

        def wait(self, references: list, num_returns: int, timeout: float) -> tuple[list, list]:
            self.waits += 1
            silent = (None, "late") if self.waits == 1 else (None,)
            waiting = [one for one in references if self.outcomes[one] in silent]
            return [one for one in references if one not in waiting], waiting

        def get(self, reference: str) -> Answer:
            outcome = self.outcomes[reference]
            if isinstance(outcome, Exception):
                raise outcome
            problem = outcome if outcome != "late" else ""
            return Answer(problem or None, Software("2.11.0", "same"))

    found = Asked()
    monkeypatch.setattr(nodes, "has_several_nodes", lambda: True)
    monkeypatch.setattr(nodes, "_answer", lambda *_: Answer(None, Software("2.11.0", "same")))
    monkeypatch.setattr(nodes, "answers", lambda places: places.keys() - found.away)
    for name in ("nodes", "wait", "get"):
        monkeypatch.setattr(ray, name, getattr(found, name))
    monkeypatch.setattr(ray, "remote", lambda task: found)
    monkeypatch.setattr(ray, "cancel", lambda one, force: found.cancelled.append(one))
    return found


def test_nodes_that_share_the_folder_are_fine_also_if_one_is_slow(asked, tmp_path, capsys):
    asked.outcomes = {"node1": "", "node2": "late"}
    nodes.check_shared(tmp_path)
    assert capsys.readouterr().err == ""
    assert (asked.cancelled, list(tmp_path.iterdir())) == ([], [])


def test_node_that_answers_too_late_leaves_no_file(tmp_path, monkeypatch):
    mine = tmp_path / ".node-1"

    def seen_and_removed(file):
        file.touch()
        file.unlink()
        return True

    monkeypatch.setattr(nodes, "_appears", seen_and_removed)
    assert nodes._answer(mine, tmp_path / ".node-1-2").problem is None
    assert list(tmp_path.iterdir()) == []


def test_file_that_a_node_does_not_have_is_refused_without_writing(asked, tmp_path):
    (tmp_path / "mine").touch()
    asked.outcomes = {"node1": "", "node2": "does not have"}
    with pytest.raises(UserError, match=f"storage: node2 does not have {tmp_path}; mount"):
        nodes.check_has(tmp_path / "mine")
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_node_that_is_there_and_does_not_answer_is_refused(asked, tmp_path):
    asked.outcomes = {"node1": "", "node2": None}
    line = f"storage: node2 did not answer for 60 s and was not checked; {tmp_path} may hang there"
    with pytest.raises(UnreadableError) as error:
        nodes.check_shared(tmp_path)
    assert (str(error.value), asked.cancelled) == (line, ["node2"])
    asked.waits, asked.outcomes["node1"] = 0, "does not have"
    with pytest.raises(UserError) as error:
        nodes.check_shared(tmp_path)
    assert not isinstance(error.value, UnreadableError), "the same command would be refused again"
    assert "node1 does not have" in str(error.value) and line in str(error.value)


def test_node_on_which_no_process_lives_is_refused(asked, tmp_path):
    from ray.exceptions import WorkerCrashedError

    asked.outcomes = {"node1": "", "node2": WorkerCrashedError()}
    with pytest.raises(UserError, match="^node2: each process that Ray starts there dies at once"):
        nodes.check_shared(tmp_path)


def test_node_that_could_not_be_checked_is_named_and_the_run_goes_on(asked, tmp_path, capsys):
    from ray.exceptions import NodeDiedError, RuntimeEnvSetupError

    asked.outcomes = {
        "node1": NodeDiedError("x"),
        "node2": RuntimeEnvSetupError("x"),
        "node3": None,
    }
    asked.away = {"node3"}
    nodes.check_shared(tmp_path)
    assert sorted(capsys.readouterr().err.splitlines()) == [
        "storage: node1 was not checked (NodeDiedError)",
        "storage: node2 was not checked (RuntimeEnvSetupError)",
        "storage: node3 was not checked (it does not answer)",
    ]
    assert asked.cancelled == ["node3"]
