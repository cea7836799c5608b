"""Where a worker finds the run and its tokens, also on a node that does not share the storage.

Then the storage is in a bucket: the driver's machine has the folder of the run, and copies it to
the mirror. Rank 0 is there. Other nodes copy the tokens from the mirror, and send to rank 0 what
they would write.
"""

import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.cluster import nodes
from orchestrator.errors import UserError
from orchestrator.folders import make_folder
from orchestrator.mirror import remote
from orchestrator.mirror.state import State
from orchestrator.objects import cache
from orchestrator.objects.address import Address, parse
from orchestrator.runs.folder import RunFolder
from orchestrator.runs.storage import scratch_of


@dataclass(frozen=True)
class Places:
    """Folders of a worker.

    Attributes:
        folder: Folder of the run, or one of this node for the state of its workers.
        data_dir: Folder of the tokens.
        is_shared: It is the folder of the run.
    """

    folder: RunFolder
    data_dir: Path
    is_shared: bool = True


def of_driver(folder: RunFolder, data_dir: Path, mirror: Address | None) -> dict[str, Any]:
    """Return what `find` needs to know.

    Args:
        folder: Folder of the run.
        data_dir: Folder of the tokens.
        mirror: Where nodes find what they do not share; None: they share everything.
    """
    config: dict[str, Any] = {
        "folder": str(folder.path),
        "data_dir": str(data_dir),
        "key": (folder.read_record() or {}).get("key"),
    }
    if mirror is not None:
        token = State.read(folder, str(mirror / folder.name)).token
        config |= {"mirror": str(mirror), "token": token}
    return config


def find(config: dict[str, Any], rank: int) -> Places:
    """Return the folders of a rank; copy the tokens if its node does not have them.

    The error ends all ranks: one that only returned would let the others wait. If the folder was
    removed or moved, the driver reports that instead.

    Raises:
        UserError: The storage is not in a bucket, and this node does not share it; or it is, and
            rank 0 is not on the driver's machine.
    """
    folder = RunFolder(config["folder"])
    data_dir = Path(config["data_dir"])
    mirror = parse("mirror", config["mirror"]) if config.get("mirror") else None
    if mirror is None and (folder.read_record() or {}).get("key") != config["key"]:
        raise UserError(nodes.not_shared(socket.gethostname(), folder.path, "has no run in"))
    if mirror is None or has_folder(config):
        return Places(folder, data_dir)
    if rank == 0:
        raise UserError(
            f"storage: {mirror} on several nodes needs a worker on the machine of the command, and "
            f"all are on others, such as {socket.gethostname()}; set compute.num_workers to more, "
            f"or storage=… to a folder that all nodes share, and mirror={mirror}"
        )
    own = RunFolder(cache.use("ranks", mirror / folder.name) / folder.name)
    make_folder(own.path)
    return Places(own, tokens(config, data_dir), is_shared=False)


def has_folder(config: dict[str, Any]) -> bool:
    """Return whether this node has the folder of this driver, and not that of another one."""
    folder = RunFolder(config["folder"])
    if not config.get("mirror"):
        return True
    mirror = parse("mirror", config["mirror"])
    mine = RunFolder(scratch_of(mirror) / folder.name)
    state = State.read(mine, str(mirror / folder.name))
    return mine.path == folder.path and state.token == config["token"]


def tokens(config: dict[str, Any], data_dir: Path) -> Path:
    """Return the folder of the tokens on a node without the storage.

    Tokens that are in the storage are copied from the mirror. Others, of `data.dir`, are at the
    same path on each node.
    """
    if data_dir.parent != Path(config["folder"]).parent / "data":
        return data_dir
    return remote.dataset(parse("mirror", config["mirror"]), data_dir.name)


def of_process(config: dict[str, Any]) -> Path:
    """Return a folder for this process alone, on a node without the storage."""
    mirror = parse("mirror", config["mirror"])
    return cache.use("stages", mirror / Path(config["folder"]).name / uuid.uuid4().hex)
