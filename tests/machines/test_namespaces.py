"""The machines of `tests/helpers/machines.py`, without Ray: what they share, and what not."""

import subprocess
import sys

import pytest

from tests.helpers import machines as helper
from tests.helpers.wait import wait_until

GET = "import urllib.request as u; u.urlopen('http://{}:8000', timeout=1)"


def test_machines_have_their_own_names_and_processes(pair):
    for number in range(2):
        assert pair.run(number, ["hostname"]) == f"node{number}\n"
        assert pair.run(number, ["cat", "/proc/1/comm"]) == "sh\n"
        name = pair.run(number, ["getent", "hosts", f"node{number}"]).split()[0]
        assert name == "127.0.1.1", "as on Debian"


def test_orphan_that_has_ended_leaves_no_process(pair):
    orphan = pair.run(0, ["sh", "-c", "sleep 0.1 > /dev/null & echo $!"]).strip()
    wait_until(lambda: orphan not in pair.run(0, ["ps", "-A", "-o", "pid="]).split())


@pytest.mark.parametrize(
    ("folder", "is_shared"), [("shared", True), ("private", False), ("/tmp", False)]
)
def test_folder_is_shared_or_private(pair, folder, is_shared):
    place = pair.base / folder
    pair.run(0, ["touch", f"{place}/of-node0"])
    assert ("of-node0" in pair.run(1, ["ls", str(place)])) == is_shared


def test_machine_that_is_cut_off_or_killed_does_not_answer(pair, tmp_path):
    address = pair.nodes[1].address

    def answers() -> bool:
        command = pair.nodes[0].enter([sys.executable, "-c", GET.format(address)])
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0

    serve = [sys.executable, "-m", "http.server", "8000"]
    server = pair.popen(1, serve, tmp_path / "server.log")
    wait_until(answers, server)
    pair.cut(1)
    assert not answers()
    pair.mend(1)
    wait_until(answers, server)
    pair.kill(1)
    assert server.wait(60) != 0
    pair.nodes[1].boot(pair.switch)
    assert pair.run(1, ["hostname"]) == "node1\n"


def test_machine_that_ended_by_itself_can_be_ended(pair):
    holder = pair.nodes[1].holder
    holder.kill()
    holder.wait()
    pair.nodes[1].kill()
    pair.nodes[1].boot(pair.switch)


def test_system_that_lacks_a_need_is_named(monkeypatch):
    assert helper.reason_to_skip() is None
    monkeypatch.setattr(helper, "PROBE", helper.PROBE + "ip link add dummy type no-such-kind")
    assert "no-such-kind" in helper.reason_to_skip() or "type" in helper.reason_to_skip()
