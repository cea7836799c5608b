"""A user's own model or optimizer: one Python file that `model.kind` or `optim.kind` names.

The user gives `path/to/file.py:Name`. The resolved experiment has `path/to/file.py:Name@HASH`, with
the SHA-256 of the file. Such a kind stands for exact code: it becomes a key of `MODELS` or
`OPTIMIZERS`, and other modules need not know where its code comes from.

Only this module runs such files. `own_files` finds them; workers get them from the driver.
"""

import ast
import contextlib
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from model.models import MODELS, ModelKind
from model.optim import GROUPS, OPTIMIZERS, OptimizerKind, allow_without_compiler
from orchestrator.errors import UserError

TABLES: dict[str, dict[str, Any]] = {"model": MODELS, "optim": OPTIMIZERS}  # by section
_PATH = r"(?P<path>[^\0-\x1f\x7f]{1,500}\.py)"  # it is shown in messages
_KIND = re.compile(_PATH + r":(?P<name>[A-Za-z_]\w{0,99})(?:@(?P<hash>[0-9a-f]{32}))?")


def is_own(kind: str) -> bool:
    """Return whether a kind names a user's file."""
    return _KIND.fullmatch(kind) is not None


def parts(kind: str) -> dict[str, str]:
    """Return `path`, `name` and `hash` of a kind that names a user's file."""
    match = _KIND.fullmatch(kind)
    assert match is not None, kind
    return match.groupdict()


def plain(kind: str) -> str:
    """Return a kind as it is compared: `file.py:Name` for a user's file, without folder and hash.

    >>> plain("my/gru.py:GRU@00112233445566778899aabbccddeeff"), plain("gpt2")
    ('gru.py:GRU', 'gpt2')
    """
    return f"{Path(parts(kind)['path']).name}:{parts(kind)['name']}" if is_own(kind) else kind


@dataclass(frozen=True)
class Source:
    """A file, and what of it is used.

    Attributes:
        section: "model" or "optim".
        kind: `path/to/file.py:Name@HASH`.
        content: The bytes that are compiled.
        file: Absolute path, for error messages.
    """

    section: str
    kind: str
    content: bytes
    file: str

    @property
    def name(self) -> str:
        """Name of the class or function."""
        return parts(self.kind)["name"]

    @property
    def module(self) -> str:
        """Name of the module that the file becomes."""
        return f"own_{hashlib.sha256(self.content + self.file.encode()).hexdigest()}"


_sources: dict[tuple[str, str], Source] = {}  # by section and kind


def sources() -> list[Source]:
    """Return the files that this process has loaded, for `register` in a worker process."""
    return list(_sources.values())


def contents(model: str, optimizer: str) -> dict[str, bytes]:
    """Return the content of the files that two kinds name, by field and name."""
    return {
        f"{section}.kind={plain(kind)}": _sources[section, kind].content
        for section, kind in (("model", model), ("optim", optimizer))
        if is_own(kind)
    }


def register(found: Iterable[Source]) -> None:
    """Make entries of `MODELS` and `OPTIMIZERS` from files, whose code is run.

    Raises:
        UserError: A file cannot be used; one line with the file and the line in it.
    """
    for source in found:
        table = TABLES[source.section]
        if source.kind in table:
            continue
        _sources[source.section, source.kind] = source
        try:
            make = _model_kind if source.section == "model" else _optimizer_kind
            table[source.kind] = make(source, _value(source))
            if source.section == "optim":
                from orchestrator.own_optimizer import moments_of

                table[source.kind] = replace(table[source.kind], moments=moments_of(source.kind))
        except BaseException:
            table.pop(source.kind, None)
            del _sources[source.section, source.kind]
            raise


def _value(source: Source) -> Any:
    """Return the class or function of a file."""
    module = _module(source)
    if hasattr(module, source.name):
        return getattr(module, source.name)
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == source.module]
    has = f"it has {', '.join(own)}" if own else "it has no class and no function"
    raise error(source.section, source.kind, f"has no {source.name}; {has}")


def _module(source: Source) -> ModuleType:
    """Run the content of a file once in this process."""
    if source.module in sys.modules:
        return sys.modules[source.module]
    module = ModuleType(source.module)
    module.__file__ = source.file
    sys.modules[source.module] = module  # dataclasses look their module up
    try:
        _refuse_siblings(source)
        code = compile(source.content, source.file, "exec", dont_inherit=True)
        exec(code, vars(module))
    except BaseException as problem:
        del sys.modules[source.module]
        if isinstance(problem, (UserError, KeyboardInterrupt)):
            raise
        raise failure(source.section, source.kind, problem) from None
    return module


def _imports(source: Source) -> list[tuple[int, str]]:
    """Return line and name of each import; a relative one begins with a dot."""
    found = []
    for node in ast.walk(ast.parse(source.content, source.file)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.lineno, "." * node.level + (node.module or "")))
    return found


def _refuse_siblings(source: Source) -> None:
    """Refuse imports of files that neither the hash nor the copy would contain."""
    folder = Path(source.file).parent
    for line, name in _imports(source):
        top = name.partition(".")[0]
        if top in ("", "orchestrator", "pipelines") or (top != "model" and _is_local(top, folder)):
            raise UserError(
                f"{shown(source.file)}:{line}: imports {name}, which is not an installed library; "
                "only this one file is kept with a run, so move the code into it"
            )


def _is_local(top: str, folder: Path) -> bool:
    """Return whether a module is a file that is not of an installed library."""
    if top in sys.stdlib_module_names:
        return False
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(top)
        if spec is not None:
            places = [spec.origin or "", *(spec.submodule_search_locations or [])]
            return not any(re.search("/(site|dist)-packages/", place) for place in places)
    return (folder / f"{top}.py").exists() or (folder / top).is_dir()


def _used_files(source: Source) -> tuple[str, ...]:
    """Return the files of `model/` if a user's file imports one: they then decide its bits."""
    if all(name.partition(".")[0] != "model" for _, name in _imports(source)):
        return ()
    ours = Path(__file__).resolve().parents[1].glob("model/*.py")
    return tuple(sorted(f"model/{file.name}" for file in ours))


# ---- the entries of the tables ----


def _model_kind(source: Source, cls: Any) -> ModelKind:
    from torch import nn

    config: Any = getattr(cls, "Config", None)
    is_frozen = getattr(getattr(config, "__dataclass_params__", None), "frozen", False)
    names = {field.name for field in fields(config)} if is_frozen else set()
    problem = None
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        problem = "is not a class that inherits from torch.nn.Module"
    elif not is_frozen:
        problem = "needs a class Config with @dataclass(frozen=True)"
    elif not {"block_size", "vocab_size"} <= names:
        problem = "needs block_size and vocab_size in its Config"
    if problem is not None:
        raise error("model", source.kind, f"{source.name} {problem}", source.name)

    def build(config: Any) -> Any:
        try:
            model = cls(config)
        except (RuntimeError, MemoryError):  # torch's: a shape, or too little memory
            raise
        except (Exception, SystemExit) as problem:
            raise failure("model", source.kind, problem, source.name) from problem
        model.config = config
        return model

    return ModelKind(config, build, "a user's file", _used_files(source))


def _optimizer_kind(source: Source, factory: Any) -> OptimizerKind:
    from torch.optim import Optimizer

    def build(groups: Any, settings: Any) -> Optimizer:
        allow_without_compiler()
        try:
            optimizer = factory(groups, settings)
        except (Exception, SystemExit) as problem:
            raise failure("optim", source.kind, problem, source.name) from problem
        if not isinstance(optimizer, Optimizer):
            made = f"{source.name} returns {type(optimizer).__name__}"
            raise error("optim", source.kind, f"{made}, no torch.optim.Optimizer", source.name)
        if any(
            not {"lr_scale", "weight_decay"} <= group.keys() for group in optimizer.param_groups
        ):
            lost = f"{source.name}: a group has no lr_scale or weight_decay; give it on as it is"
            raise error("optim", source.kind, lost, source.name)
        return optimizer

    if not callable(factory):
        raise error("optim", source.kind, f"{source.name} is not a function", source.name)
    moments = dict.fromkeys(GROUPS, 2)
    return OptimizerKind(build, "a user's file", moments, files=_used_files(source))


# ---- errors ----


def shown(file: str) -> str:
    """Return the path of a file, relative to the current folder if it is in it."""
    return file.removeprefix(f"{os.getcwd()}/")


def error(section: str, kind: str, problem: str, *names: str) -> UserError:
    """Return an error at the definition of something in the file of a kind.

    `names` are a class or function, and one or a field in it; the last one that is found counts.
    """
    source = _sources[section, kind]
    line = 1
    body = ast.parse(source.content).body
    for name in names:
        for node in body:
            target = getattr(node, "target", None) or (getattr(node, "targets", None) or [None])[0]
            if name in (getattr(node, "name", None), getattr(target, "id", None)):
                line = node.lineno
                body = getattr(node, "body", [])
                break
    return UserError(f"{shown(source.file)}:{line}: {problem}")


def failure(section: str, kind: str, problem: BaseException, *names: str) -> UserError:
    """Return an error at the line of the file of a kind that raised an exception.

    If the exception comes from elsewhere, the line is that of `names`; see `error`.
    """
    source = _sources[section, kind]
    text = " ".join(str(getattr(problem, "msg", problem)).split())[:400]
    words = f"{type(problem).__name__}: {text}".removesuffix(": ")
    line = problem.lineno if isinstance(problem, SyntaxError) else None
    trace = problem.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == source.file:
            line = trace.tb_lineno
        trace = trace.tb_next
    if line is None and names:
        return error(section, kind, words, *names)
    return UserError(f"{shown(source.file)}:{line or 1}: {words}")
