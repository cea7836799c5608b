"""Files and links with names that no copy can have are left out, and the rest is copied."""

import os

import pytest

from orchestrator.errors import UserError
from orchestrator.mirror import manifest, upload
from orchestrator.mirror.dataset import upload_dataset
from orchestrator.objects.address import parse
from orchestrator.objects.store import open_store
from orchestrator.runs import events
from tests.helpers.mirrored import content, copy, elsewhere, mirrored

pytestmark = pytest.mark.usefixtures("fast")
BAD = [
    b"Icon\r",
    b"caf\xe9.txt",
    b"turned\xe2\x80\xae.txt",
    b"n" * 240,
    (b"y" * 200 + b"/") * 5 + b"n",
]
GOOD = ["notes\u200b.txt", "code/model\u3000v2-0123.py", "n" * 235, "caf\u00e9.txt"]


def write(folder, name: bytes) -> None:
    path = os.fsencode(folder) + b"/" + name
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(b"text of " + name)


def mirror_events(run) -> list[str]:
    return [event["message"] for event in events.read(run) if event["kind"] == "mirror"]


@pytest.mark.parametrize("name", BAD)
def test_name_that_no_copy_can_have_is_left_out_with_one_event(run, bucket, tmp_path, name):
    wanted = set(content(run.path))
    write(run.path, name)
    write(run.checkpoint(4), name)
    with mirrored(run, bucket) as uploader:
        uploader.sync()
        uploader.sync()
        assert uploader.finish(20), uploader.problem
    [message] = mirror_events(run)
    assert "no copy can have these names" in message and ascii(os.fsdecode(name))[1:-1] in message
    other = elsewhere(run, tmp_path)
    copy(other, bucket)
    assert set(content(other.path)) == {*wanted, run.events_file.name}


def test_unusual_names_are_copied(run, bucket, tmp_path):
    for name in GOOD:
        write(run.path, name.encode())
    copy(run, bucket)
    other = elsewhere(run, tmp_path)
    copy(other, bucket)
    assert {*GOOD} < set(content(other.path))
    assert not mirror_events(run)


@pytest.mark.parametrize(("path", "target"), [(b"a\r", b"x"), (b"a", b"x\r"), (b"a", b"\xe9")])
def test_link_that_no_copy_can_have_is_left_out_with_one_event(run, bucket, tmp_path, path, target):
    os.symlink(target, os.fsencode(run.path) + b"/" + path)
    copy(run, bucket)
    copy(elsewhere(run, tmp_path), bucket)
    assert len(mirror_events(run)) == 1


def test_file_that_becomes_a_link_while_it_is_copied_is_tried_again(run, bucket, monkeypatch):
    (run.path / "x").write_text("a file")
    with mirrored(run, bucket) as uploader:
        with monkeypatch.context() as patched:
            patched.setattr(upload.committed, "links", lambda _: {"x": "checkpoints"})
            with pytest.raises(UserError, match="cannot be copied as it is .x: is also a folder"):
                uploader.sync()
        assert uploader.finish(20), uploader.problem


def test_dataset_with_a_strange_file_is_copied_without_a_listing(bucket, tmp_path):
    folder = tmp_path / "abc"
    folder.mkdir()
    for name in (b"manifest.json", b"Icon\r"):
        write(folder, name)
    address = parse("m", f"{bucket.address}/m/data/abc")
    store = open_store(address)
    before = len(bucket.proxy.requests)
    upload_dataset(store, address, folder)
    assert not [path for _, path in bucket.proxy.requests[before:] if "list-type" in path]
    found = manifest.read(store, address)
    assert found is not None and list(found[0].files) == ["manifest.json"]
