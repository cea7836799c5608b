"""Small checkpoints for tests: written, compared, damaged."""

import json
from pathlib import Path

import torch

from orchestrator.checkpoint import store, tensor_file
from orchestrator.checkpoint.format import MANIFEST, manifest_text
from tests.helpers.facts import FACTS


def tensors(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "model": {"wte": draw(5, 3), "ln": draw(3)},
        "optimizer": {"wte/exp_avg": draw(5, 3), "wte/step": torch.tensor(7.0)},
    }


def save(
    directory: Path,
    step: int,
    groups: dict[str, dict[str, torch.Tensor]],
    texts: dict[str, str],
    facts: dict,
) -> Path:
    """Write a checkpoint of these tensors, by name of their file and their own name."""
    directory.parent.mkdir(parents=True, exist_ok=True)  # the run folder
    parts = store.parts_of(tensor_file.fill({}, groups), texts)
    return store.commit(directory, step, parts, facts)


def commit(directory: Path, step: int, seed: int | None = None, loss: float | None = None) -> Path:
    """Write a checkpoint whose tensors depend on `seed` (None: on the step)."""
    texts = {"state.json": json.dumps({"step": step}), "experiment.yaml": "name: schön\n"}
    facts = {"metrics": {} if loss is None else {"val/loss": loss}, **FACTS}
    return save(directory, step, tensors(step if seed is None else seed), texts, facts)


def holds(path: Path, seed: int) -> bool:
    """Return whether a checkpoint has the tensors of `seed`."""
    store.verify(path)
    for group, expected in tensors(seed).items():
        loaded = store.load_tensors(path, group)
        if not all(torch.equal(loaded[name], value) for name, value in expected.items()):
            return False
    return True


def written_by_one(path: Path, name: str) -> bytes:
    """Return a file of a checkpoint as one rank writes it, also if several ranks wrote it."""
    group = name.removesuffix(".safetensors")
    if group == name or (path / name).is_file():
        return (path / name).read_bytes()
    [file] = tensor_file.fill({}, {group: store.load_tensors(path, group)}).values()
    return bytes(file.data)


def flip(content: bytes, position: int, bit: int = 0) -> bytes:
    """Return `content` with one bit changed."""
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


def rewrite_manifest(path: Path, manifest: dict) -> None:
    """Replace the manifest of a checkpoint by a valid one."""
    own = ("format", "step", "parts")
    facts = {key: value for key, value in manifest.items() if key not in own}
    text = manifest_text(manifest["step"], manifest["parts"], facts)
    (path / MANIFEST).write_text(text, "utf-8")


def damage(path: Path, part: str = "model.safetensors") -> None:
    """Change the last byte of a part."""
    content = (path / part).read_bytes()
    (path / part).write_bytes(flip(content, len(content) - 1))


def hidden(directory: Path) -> list[str]:
    """Return the names of hidden folders, which an incomplete commit leaves."""
    return sorted(path.name for path in directory.glob(".*"))
