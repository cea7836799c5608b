"""Hashes of files: a stored one is used only for the version of the file that was hashed."""

import hashlib
import os
import time
from types import SimpleNamespace

import pytest

from orchestrator import hashes
from orchestrator.errors import UserError
from orchestrator.hashes import forget, known_sha256s, sha256s
from tests.helpers.datasets import change_in_place


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_folders", {})
    return tmp_path / "cache" / "espalier" / "sha256"


def test_files_that_change_at_once_after_they_were_hashed_are_hashed_again(cache, tmp_path):
    file = tmp_path / "text"
    for number in range(20):
        file.write_text(f"{number:09d}")
        os.utime(file, (0, 0))
        assert sha256s([str(file)]) == [hashlib.sha256(file.read_bytes()).hexdigest()]


@pytest.mark.parametrize("ahead_s", [-3600, 0, 3600])
@pytest.mark.parametrize("step_ns", [10_000_000, 1_000_000_000])
def test_every_write_changes_the_stamp_whatever_the_clock_of_the_file_server(
    cache, tmp_path, monkeypatch, ahead_s, step_ns
):
    """The file server has a clock of its own, which steps; the file is written after each read."""
    start = time.time_ns()
    now = [start]
    ctime = [0]

    def write() -> None:
        server = now[0] + ahead_s * 10**9
        ctime[0] = server - server % step_ns + (step_ns < 10**9)  # fine ones are no whole seconds

    def sleep(seconds: float) -> None:
        now[0] += int(seconds * 1e9)

    def hash_and_write(paths: list[str]) -> list[str]:
        write()
        return ["0" * 64 for _ in paths]

    monkeypatch.setattr(hashes, "time", SimpleNamespace(sleep=sleep, time_ns=lambda: now[0]))
    monkeypatch.setattr(hashes, "stamp", lambda path: hashes.Stamp(1, 0, ctime[0], 1, 1))
    write()
    sha256s([str(tmp_path / "text")], hash_and_write)
    assert known_sha256s([str(tmp_path / "text")]) == {}
    assert now[0] - start <= 2 * 10**9


def test_stored_hash_counts_only_for_its_version_of_the_file(cache, tmp_path):
    file = tmp_path / "text"
    file.write_text("some text")
    before = sha256s([str(file)])
    forget()
    assert list(known_sha256s([str(file)]).values()) == before
    change_in_place(file)
    assert known_sha256s([str(file)]) == {}
    assert sha256s([str(file)]) != before


@pytest.mark.parametrize("content", ["{", "[]", '{"text": 1}', '{"text": [[1, 2], "ab"]}', ""])
def test_damaged_cache_is_as_good_as_none(cache, tmp_path, content):
    (tmp_path / "text").write_text("some text")
    paths = [str(tmp_path / "text")]
    before = sha256s(paths)
    [stored] = cache.iterdir()
    stored.write_text(content)
    forget()
    assert sha256s(paths) == before


@pytest.mark.parametrize("planted", ["writable for all", "a link"])
def test_cache_that_others_can_write_to_is_not_used(cache, tmp_path, planted):
    (tmp_path / "text").write_text("some text")
    paths = [str(tmp_path / "text")]
    [before] = sha256s(paths)
    [stored] = cache.iterdir()
    assert (cache.stat().st_mode & 0o777, stored.stat().st_mode & 0o777) == (0o700, 0o600)
    stored.write_text(stored.read_text().replace(before, "0" * 64))
    forget()
    assert sha256s(paths) == ["0" * 64]  # as long as the folder is private
    if planted == "a link":
        cache.rename(tmp_path / "moved")
        cache.symlink_to(tmp_path / "moved")
    else:
        cache.chmod(0o777)
    forget()
    assert sha256s(paths) == [before]


def test_without_a_cache_files_are_hashed_by_each_process(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("some text")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "text"))
    before = sha256s([str(tmp_path / "text")])
    assert known_sha256s([str(tmp_path / "text")])
    forget()
    assert sha256s([str(tmp_path / "text")]) == before


def test_file_that_cannot_be_read_is_named(cache, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/none: cannot be read"):
        sha256s([str(tmp_path / "none")])
