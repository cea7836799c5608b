"""A process group over two machines whose host names are names of their loopback address."""

import sys

import pytest

from orchestrator.workers import process_group

SUM = """
import os, sys, torch, torch.distributed as dist
from orchestrator.cluster.layout import Layout
from orchestrator.workers import process_group
rank = int(sys.argv[1])
process_group.join(sys.argv[2], rank, Layout(2, 1, False))
both = torch.tensor([1.0 + rank])
dist.all_reduce(both)
print(both.item(), os.environ["GLOO_SOCKET_IFNAME"])
process_group.leave()  # gloo can abort a process that ends in its group
"""


def test_ranks_on_two_machines_find_each_other(pair, tmp_path):
    address = f"tcp://{pair.nodes[0].address}:29500"
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = [
        pair.popen(rank, [sys.executable, "-c", SUM, str(rank), address], log)
        for rank, log in enumerate(logs)
    ]
    for rank, log in zip(ranks, logs, strict=True):
        assert rank.wait(120) == 0, log.read_text()
        assert log.read_text().split()[-2:] == ["3.0", "eth0"]


@pytest.mark.parametrize(("chosen", "used"), [(None, "lo"), ("eth7", "eth7")])
def test_interface_that_the_user_chose_stays(monkeypatch, chosen, used):
    environment = {} if chosen is None else {"GLOO_SOCKET_IFNAME": chosen}
    monkeypatch.setattr(process_group.os, "environ", environment)
    process_group._choose_interface("tcp://127.0.0.1:29500")
    assert environment["GLOO_SOCKET_IFNAME"] == used
