"""A run folder and its mirror in a bucket, without training."""

import os
from pathlib import Path

from orchestrator.mirror import session
from orchestrator.objects.address import parse
from orchestrator.runs.folder import RunFolder


def add_checkpoint(folder: RunFolder, step: int, content: str = "") -> None:
    temporary = folder.checkpoints / ".writing"
    temporary.mkdir()
    (temporary / "model.safetensors").write_text(content or f"weights of {step} " * 100)
    (temporary / "MANIFEST.json").write_text(str(step))
    temporary.rename(folder.checkpoint(step))


def mirrored(folder: RunFolder, bucket, name: str = "m"):
    return session.mirrored(folder, parse("mirror", f"{bucket.address}/{name}"), folder.path.parent)


def copy(folder: RunFolder, bucket, name: str = "m") -> None:
    """Mirror the folder as it is."""
    with mirrored(folder, bucket, name) as uploader:
        assert uploader.finish(20), uploader.problem


def content(folder: Path) -> dict[str, str]:
    """Return all files and links that a mirror has."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes().decode("latin-1")
        for path in folder.rglob("*")
        if path.is_symlink() or (path.is_file() and not path.name.startswith("."))
    }


def elsewhere(folder: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "elsewhere" / folder.name)
