"""Files of a user's model or optimizer: where it is, and its copy in the folder of a run.

`resolve` loads the files that a command or its YAML file names. `store` copies them to the folder
`code` of a run. `load_copies` loads them from there: they may be a stranger's, so only code that
this user has run before is run without `--trust-code`. The same holds for what a YAML file names
outside of the current folder.
"""

import contextlib
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from orchestrator import files
from orchestrator.errors import UserError
from orchestrator.folders import make_folder
from orchestrator.hashes import private_folder
from orchestrator.own_code import TABLES, Source, is_own, parts, plain, register, sources
from orchestrator.paths import cache_folder, local_path

MAX_BYTES = 1 << 20
MAX_NAME_BYTES = 180  # without .py: the name of the copy also has the hash
_named: list[tuple[str, str]] = []  # section and kind that the user gave to this process


def resolve(tree: Mapping[str, Any], origin: str | os.PathLike[str] | None = None) -> None:
    """Load the files that the kinds in a configuration name, and add their hashes to the kinds.

    Only for what the user gives to a command. In a stored configuration, see `load_copies`.

    Args:
        tree: The configuration.
        origin: The YAML file that names the files; None if the user names them on the command line.

    Raises:
        UserError: A file cannot be used, or this user does not trust it yet; one line with the
            file and the line in it.
    """
    for section in TABLES:
        _resolve_entry(tree.get(section), "kind", section, origin)
    sweep = tree.get("sweep")
    if isinstance(sweep, dict):
        trials = sweep.get("trials")
        named = list(trials.values()) if isinstance(trials, dict) else []
        for place in (sweep.get("grid"), sweep.get("space"), *named):
            _resolve_entry(place, "optim.kind", "optim", origin)


def _resolve_entry(
    place: Any, key: str, section: str, origin: str | os.PathLike[str] | None
) -> None:
    value = place.get(key) if isinstance(place, dict) else None
    if isinstance(value, list):
        place[key] = [_requested(section, kind, origin) for kind in value]
    elif value is not None:
        place[key] = _requested(section, value, origin)


def _requested(section: str, kind: Any, origin: str | os.PathLike[str] | None) -> Any:
    if not isinstance(kind, str) or not is_own(kind):
        return kind
    if kind in TABLES[section]:
        _named.append((section, kind))
        return kind
    words = parts(kind)
    path = local_path(f"{section}.kind", words["path"])
    _check_name(section, path)
    real = Path(os.path.realpath(path))
    content = _read(real, f"{section}.kind")
    found = _hash(content)
    if words["hash"] not in (None, found):
        raise UserError(
            f"{section}.kind: {path} has the hash {found}, not {words['hash']}; leave out "
            f"@{words['hash']} to use the file as it is"
        )
    if origin is not None and not (_is_trusted(found) or _is_users(Path(origin), real)):
        raise UserError(
            f"{origin}: {section}.kind={plain(kind)}: {path} has code with the hash {found}, which "
            "you have not run before, and it or the YAML file may be a stranger's; read it, and "
            "give --trust-code to run it"
        )
    full = f"{words['path']}:{words['name']}@{found}"
    register([Source(section, full, content, os.path.abspath(path))])
    _remember(found)
    _named.append((section, full))
    return full


def _check_name(section: str, path: Path) -> None:
    """Raise UserError if the copy of a file in a run, or its object in a mirror, gets no name."""
    if not str(path).isprintable():
        raise UserError(
            f"{section}.kind: {ascii(str(path))} has a character that cannot be printed; rename it"
        )
    size = len(path.stem.encode())
    if size > MAX_NAME_BYTES:
        raise UserError(
            f"{section}.kind: the name of {path} has {size} bytes before .py; a copy of the file "
            f"is stored with each run, so give it a name of at most {MAX_NAME_BYTES}"
        )


def present(section: str, kind: str) -> str:
    """Return the kind that the user named last in place of a stored one; else the stored one.

    Its file has the same path, or else the same name. A copy that was loaded does not count: the
    user may have edited the file since.
    """
    alike = [
        known for place, known in _named[::-1] if place == section and plain(known) == plain(kind)
    ]
    return max(alike, key=lambda known: known[:-32] == kind[:-32], default=kind)


def _is_users(origin: Path, file: Path) -> bool:
    """Return whether a file is in the current folder, and neither it nor its YAML file in a run."""
    folders = {*Path(os.path.realpath(origin)).parents, *file.parents}
    return Path.cwd() in file.parents and not any(map(_is_of_run, folders))


def _is_of_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, a sweep, a checkpoint or an exported model."""
    has_settings = any(os.path.exists(folder / name) for name in ("experiment.yaml", "sweep.yaml"))
    parts_of_run = ("code", "checkpoints", "trials", "stages", "model.json")
    return has_settings and any(os.path.exists(folder / name) for name in parts_of_run)


def _read(path: Path, field: str) -> bytes:
    try:
        with open(path, "rb", opener=files.opener) as file:
            content = file.read(MAX_BYTES + 1)
    except files.NotPlainFileError:
        raise
    except OSError as error:
        raise UserError(
            f"{field}: {path} cannot be read ({error.strerror}); give the path of a Python file "
            "and a name in it, as path/to/file.py:Name"
        ) from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{field}: {path} has more than {MAX_BYTES:,} bytes; give a Python file")
    return content


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


# ---- copies in the folder of a run ----


def store(folder: Path, kinds: Collection[str]) -> None:
    """Write the files of some kinds to the folder `code` of a run."""
    for source in sources():
        if source.kind in kinds:
            make_folder(folder)
            copy = folder / copy_name(source.kind)
            if not files.is_plain(copy) or files.read_bytes(copy) != source.content:
                files.write_atomically(copy, source.content)


def copy_name(kind: str) -> str:
    """Return the name of the copy of a file that a kind with a hash names."""
    return f"{Path(parts(kind)['path']).stem}-{parts(kind)['hash']}.py"


def load_copies(tree: Any, folder: Path) -> None:
    """Load the files that a stored configuration names, from the copies of its run.

    Args:
        tree: The configuration.
        folder: Folder of a run, a trial, a stage or a checkpoint.

    Raises:
        UserError: A copy is missing or damaged, or this user does not trust it yet.
    """
    for section, table in TABLES.items():
        place = tree.get(section) if isinstance(tree, dict) else None
        kind = place.get("kind") if isinstance(place, dict) else None
        if isinstance(kind, str) and is_own(kind) and kind not in table:
            source = _trusted_copy(section, kind, folder.absolute())
            register([source])
            _remember(parts(kind)["hash"])


def _trusted_copy(section: str, kind: str, folder: Path) -> Source:
    words = parts(kind)
    if words["hash"] is None:
        raise UserError(f"{folder}: {section}.kind={kind} has no hash; restore experiment.yaml")
    name = copy_name(kind)
    places = [place / "code" / name for place in (folder, *list(folder.parents)[:4])]
    copy = next((place for place in places if os.path.lexists(place)), None)
    if copy is None:
        raise UserError(
            f"{folder}: the code of {section}.kind={plain(kind)} is missing; restore code/{name} "
            "in the folder of the run, or put it beside the checkpoint"
        )
    content = _read(copy, f"{section}.kind")
    found = _hash(content)
    if found != words["hash"]:
        raise UserError(f"{copy}: was changed, its hash is now {found}; restore the file")
    if not _is_trusted(found):
        raise UserError(
            f"{copy}: code with the hash {found}, which you have not run before; read it, and give "
            "--trust-code to run it"
        )
    return Source(section, kind, content, str(copy))


# ---- trust ----

_trusts_all = False


def trust_copies() -> None:
    """Let this process run any code that a configuration names, as `--trust-code` says."""
    global _trusts_all
    _trusts_all = True


def _is_trusted(found: str) -> bool:
    """Return whether the user has run a file before, or in this process."""
    if _trusts_all or any(parts(source.kind)["hash"] == found for source in sources()):
        return True
    with contextlib.suppress(OSError, UserError):
        return (_cache() / found).is_file()
    return False


def _remember(found: str) -> None:
    """Record that this user has run a file. If the cache cannot be written, only for now."""
    with contextlib.suppress(OSError, UserError):
        (_cache() / found).touch()


def _cache() -> Path:
    """Return the folder with one empty file for each hash; no other user can write to it."""
    return private_folder(cache_folder() / "code")
