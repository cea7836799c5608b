"""The request to stop, a file in the run folder."""

import pytest

from orchestrator.runs import stop
from tests.helpers.wait import wait_until


def test_listener_hears_a_request(folder):
    stop.clear(folder)
    listener = stop.Listener(folder)
    assert not listener()
    assert stop.requested(folder) is None
    stop.request(folder, "SIGTERM")
    wait_until(listener)
    assert stop.requested(folder) == "SIGTERM"
    stop.clear(folder)
    assert stop.requested(folder) is None
    assert listener(), "a request that was heard stays"


@pytest.mark.parametrize("text", ["1", "{}", "[]", "{", "[" * 100_000])
def test_any_other_content_is_a_request_too(folder, text):
    folder.stop_request_file.write_text(text)
    wait_until(stop.Listener(folder))
    assert stop.requested(folder) == "asked to stop"


def test_request_has_always_the_same_size(folder):
    # A full disk has room for what is written over other bytes, but not for more bytes.
    stop.clear(folder)
    size = folder.stop_request_file.stat().st_size
    stop.request(folder, "the node node-with-a-long-name is drained")
    assert folder.stop_request_file.stat().st_size == size
