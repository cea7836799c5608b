"""The request to stop, a file in the run folder."""

import pytest

from orchestrator.runs import stop
from tests.helpers.wait import wait_until


def test_listener_finds_a_request(folder):
    stop.clear(folder)
    listener = stop.Listener(folder)
    assert not listener()
    assert stop.requested(folder) is None
    stop.request(folder, "SIGTERM")
    wait_until(listener)
    assert stop.requested(folder) == "SIGTERM"
    stop.clear(folder)
    assert stop.requested(folder) is None
    assert listener(), "the listener must remember the request"


@pytest.mark.parametrize("text", ["1", "{}", "[]", "{", "[" * 100_000])
def test_file_with_other_content_is_also_a_request(folder, text):
    folder.stop_request_file.write_text(text)
    wait_until(stop.Listener(folder))
    assert stop.requested(folder) == "asked to stop"


def test_request_file_always_has_the_same_size(folder):
    # On a full disk, bytes can be overwritten but none can be added.
    stop.clear(folder)
    size = folder.stop_request_file.stat().st_size
    stop.request(folder, "the node node-with-a-long-name is drained")
    assert folder.stop_request_file.stat().st_size == size
