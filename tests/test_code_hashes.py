"""Which modules decide the bits, and which edits of them change a key."""

import ast
import shutil
import textwrap
from fnmatch import fnmatch
from pathlib import Path

import pytest

from model.models import MODELS
from model.optim import OPTIMIZERS
from orchestrator import code_hashes as code

NAMES = (*code.MODULES, *MODELS["gpt2"].files, *OPTIMIZERS["muon"].files)
REPO = Path(__file__).resolve().parents[1]

# Most of Python's syntax. Versions of Python differ in what they store about strings, and in the
# number of fields of a node.
SAMPLE = '''
"""Docstring."""
import os.path as p, sys
from x import (a as b, c)
@decor(1)
async def f(a, /, b: int = 1, *args: str, c, d=2, **kw) -> list[int]:
    """Docstring."""
    async with x as y, z: pass
    async for i in y: yield i
    return await g
class A(B, metaclass=M):
    "docstring"
    x: int = 3
    def m(self): ...
def g():
    global q
    x = 1e-3; y = 10**6; z = 0x1f; s = 'a' "b" f"{x!r:>{y}} {x=} {{}}"
    t = f'{a}' f"b{c:.3f}" u'k'
    try: raise E from e
    except* (A, B) as err: pass
    try: ...
    except X: del a[1:2, ..., ::3]
    finally: pass
    while (n := x) and not y or z: break
    else: continue
    match v:
        case {"k": [1, *r], **rest} if r: pass
        case A(x=1) | None: pass
        case _: pass
    l = lambda x, *y: {**x, 'a': {*y}, 1: [i async for i in z if i if j]}
    assert x < y <= z != w is not None not in q, "m"
    a @= b; a //= -c ** ~d
    with open(x) as f, (yield): h = 1j
    return x if y else (1,), True, None, ..., 1.0, b"b"
'''


def file_of(module: str) -> str | None:
    """Return the file of a module of this project, relative to the repository."""
    path = module.replace(".", "/")
    for name in (f"{path}.py", f"{path}/__init__.py"):
        if module.split(".")[0] in ("model", "orchestrator") and (REPO / name).exists():
            return name
    return None


def imports(file: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((REPO / file).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {file_of(name) for name in names}
    return {name for name in found if name is not None and not name.endswith("__init__.py")}


def imported_by(file: str) -> set[str]:
    found: set[str] = set()
    waiting = [file]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imports(name)
    return found


def has_no_effect(file: str) -> bool:
    return any(
        file.startswith(f"{name}/") or (fnmatch(file, name) and file.count("/") == name.count("/"))
        for name in code.WITHOUT_EFFECT
    )


def test_every_module_that_the_training_loop_imports_is_listed():
    used = imported_by("orchestrator/train/loop.py")
    kinds = (*MODELS.values(), *OPTIMIZERS.values())
    listed = {*code.MODULES, *(file for kind in kinds for file in kind.files)}
    forgotten = {name for name in used - listed if not has_no_effect(name)}
    assert not forgotten, "add them to code.MODULES, or with a reason to code.WITHOUT_EFFECT"
    assert listed <= used, "modules that the loop does not import"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the listed modules, whose hashes are computed anew."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / name, tmp_path / name)
    monkeypatch.setattr(code, "REPOSITORY", tmp_path)
    yield tmp_path
    code.module_hashes.cache_clear()


def hashes() -> dict[str, str]:
    code.module_hashes.cache_clear()
    return code.module_hashes("gpt2", "muon")


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_changes_the_hash_of_its_module_and_comments_do_not(copy, name):
    before = hashes()
    source = (copy / name).read_text()
    (copy / name).write_text(source.replace("\n\n", "\n\n# a comment\n\n"))
    assert hashes() == before
    (copy / name).write_text(source + "\nZERO = 0\n")
    assert {key for key, value in hashes().items() if before[key] != value} == {name}


def test_hash_is_the_same_on_all_versions_of_python():
    assert code.source_hash(SAMPLE) == "d1342cb1e47a484b"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = a + b", "x = a - b"),
        ("x = a < b", "x = a <= b"),
        ("f(a, b)", "f(b, a)"),
        ("x = 'a'", "x = b'a'"),
        ("def f(): return None", "def f(): return 0"),
        ("x = 0.1", "x = 0.10000000000000002"),
    ],
)
def test_small_edits_change_the_hash(before, after):
    assert code.source_hash(before) != code.source_hash(after)


def test_layout_comments_and_docstrings_do_not_change_the_hash():
    plain = "class A:\n    def f(self, a):\n        return g(a, 'b')\n"
    other = textwrap.dedent('''
        """A module."""
        class A:  # a comment
            """A class."""

            def f(
                self, a
            ):
                """Return something."""
                return g(
                    a,
                    "b",
                )
    ''')
    assert code.source_hash(plain) == code.source_hash(other)
