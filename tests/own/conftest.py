"""Fixtures of tests of a user's own files."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import own_code, own_files
from tests.helpers.threads import one_thread  # noqa: F401 - used by all tests here


@pytest.fixture(scope="session")
def tokens(tiny_corpus, tiny_dataset) -> list[str]:
    """The overrides that name the prepared tokens."""
    return [f"data.corpus={tiny_corpus}", f"data.dir={tiny_dataset}"]


@pytest.fixture
def working_tree(tmp_path, monkeypatch) -> Path:
    """The current folder, with the two files in its folder `mine`."""
    tree = tmp_path / "tree"
    (tree / "mine").mkdir(parents=True)
    for name in ("conv.py", "lion.py"):
        shutil.copyfile(Path(__file__).parent / name, tree / "mine" / name)
    monkeypatch.chdir(tree)
    return tree


@pytest.fixture
def forget(monkeypatch) -> Callable[[], None]:
    """Return a function that makes this process one that has loaded no file of a user."""

    def forget_all() -> None:
        monkeypatch.setattr(own_files, "_trusts_all", False)
        monkeypatch.setattr(own_files, "_named", [])
        for section, table in own_code.TABLES.items():
            for kind in [kind for kind in table if own_code.is_own(kind)]:
                del table[kind]
                own_code._sources.pop((section, kind), None)
        for name in [name for name in sys.modules if name.startswith("own_")]:
            del sys.modules[name]

    forget_all()
    return forget_all


@pytest.fixture
def stranger(forget, tmp_path, monkeypatch) -> Callable[[], None]:
    """Return a function that forgets all loaded files and all hashes of files that have run."""
    numbers = iter(range(100))

    def become() -> None:
        forget()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{next(numbers)}"))

    return become
