"""Machines for the tests of this folder."""

import subprocess

import pytest

from tests.helpers import machines as helper
from tests.helpers.machines import Machines


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two machines without Ray."""
    reason = helper.reason_to_skip()
    if reason is not None:
        pytest.skip(f"machines: {reason}")
    found = Machines(tmp_path_factory.mktemp("pair"), cpus=[0, 1])
    try:
        for node in found.nodes:
            node.boot(found.switch)
        yield found
    finally:
        found.end()
    assert not _processes_of(found), "processes of the machines are left"


def _processes_of(found: Machines) -> list[str]:
    listed = subprocess.run(["ps", "axo", "args"], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if str(found.base) in line]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Three machines with Ray: a head without CPUs, and two nodes with one CPU each."""
    with helper.machines(tmp_path_factory.mktemp("cluster"), cpus=[0, 1, 1]) as found:
        yield found
