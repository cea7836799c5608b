"""Malicious files are refused in one line; nothing is executed, memory and time are bounded."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from model.gpt import GPT
from model.gpt_config import GPTConfig
from orchestrator.config.experiment import load_experiment
from orchestrator.data.tokenizer import load_tokenizer
from tests.helpers import checkpoints
from tests.helpers.facts import FACTS

REPO = Path(__file__).resolve().parent.parent.parent
SHAPE = GPTConfig(16, 61, 2, 2, 8, bias=True)
SECONDS = 20  # for one file, on average; then the process is killed and the test fails
BYTES = 400 << 20  # limit of memory for one file


class Canary:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Opener:
    """A process that opens files, and is started again if it dies."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen | None = None

    def __call__(self, cases: dict[str, tuple[str, Path]]) -> dict[str, tuple[str, str]]:
        """Open `{label: (kind, path)}`; return `{label: (outcome, message)}`."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        limit = threading.Timer(SECONDS * len(cases) + 60, self.process.kill)
        limit.start()
        found = {}
        for label, (kind, path) in cases.items():
            print(json.dumps([kind, str(path)]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
            assert answer, (label, self.log.read_text()[-2000:])
            outcome, message, size = json.loads(answer)
            assert size <= BYTES, label
            found[label] = (outcome, message)
        limit.cancel()
        return found

    def _start(self) -> None:
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(REPO / "tests" / "helpers" / "open_files.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=REPO,
                env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
            )


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    opener = Opener(tmp_path_factory.mktemp("opener") / "log")
    yield opener
    opener.process.kill()
    opener.process.wait()


def refuses(results: dict[str, tuple[str, str]]) -> None:
    """Assert that every file was refused in one line of bounded length."""
    for label, (outcome, message) in results.items():
        assert outcome == "refused", label
        assert "\n" not in message, label
        assert len(message) <= 1500, label


def header(content: bytes, length: int | None = None) -> bytes:
    """Return a safetensors file that has only a header."""
    return struct.pack("<Q", len(content) if length is None else length) + content


def bad_tensors(canary: Path) -> dict[str, bytes]:
    def one(shape: list[int], *offsets: int) -> bytes:
        return header(
            json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
        )

    good, same = save({"a": torch.ones(4)}), {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return {
        "a pickle": pickle.dumps(Canary(canary)),
        "a header of 2^63 bytes": header(b"{}", 2**63),
        "a header of 2^64-1 bytes": header(b"{}", 2**64 - 1),
        "a header of 90 MB": header(b" " * 90_000_000),
        "a header beyond the file": header(b"{}", 10_000),
        "a deep header": header(b"[" * 200_000),
        "a deep object": header(b'{"a":' * 200_000),
        "no JSON": header(b"\xff" * 16),
        "offsets beyond the file": one([2**40], 0, 2**42),
        "offsets that overflow": one([2**63, 2], 0, 0),
        "negative offsets": one([1], -4, 0),
        "overlapping": header(json.dumps({"a": same, "b": same}).encode()) + bytes(4),
        "cut": good[:-3],
        "one byte": b"\x01",
        "empty": b"",
    }


@pytest.fixture
def saved(tmp_path):
    """Call `saved(label)` for a new checkpoint of a small model in its own folder."""

    def make(label: str) -> Path:
        load_tokenizer("byte").save(tmp_path)
        words = [
            "data.tokenizer=byte",
            "model.n_layer=2",
            "model.n_head=2",
            "model.n_embd=8",
            "model.block_size=16",
        ]
        texts = {
            "model.json": json.dumps(asdict(SHAPE)),
            "experiment.yaml": load_experiment(None, words).to_yaml(),
            "tokenizer.json": (tmp_path / "tokenizer.json").read_text(),
        }
        return checkpoints.save(
            tmp_path / label / "checkpoints",
            5,
            {"model": dict(GPT(SHAPE).state_dict())},
            texts,
            FACTS,
        )

    return make


def test_good_files_are_opened(opened, saved, tmp_path, tiny_dataset):
    """The refusals below then have no other reason."""
    (tmp_path / "good.yaml").write_text("name: good")
    (tmp_path / "good.jsonl").write_text('{"text": "a"}')
    cases = {
        "weights": saved("good"),
        "checkpoint": saved("good"),
        "trained": saved("good"),
        "latest": saved("good").parent,
        "dataset": tiny_dataset,
        "tokenizer": tiny_dataset,
        "experiment": tmp_path / "good.yaml",
        "lines": tmp_path / "good.jsonl",
    }
    results = opened({kind: (kind, path) for kind, path in cases.items()})
    assert set(results.values()) == {("opened", "")}


def test_pickles_in_nanogpt_checkpoints(opened, tmp_path):
    canary, cases = tmp_path / "canary", {}

    def case(label: str, data: bytes) -> None:
        file = tmp_path / f"{len(cases)}.pt"
        file.write_bytes(data)
        cases[label] = ("weights", file)

    for protocol in range(6):
        case(
            f"protocol {protocol}",
            pickle.dumps({"model": {"a": Canary(canary)}, "model_args": {}}, protocol),
        )
    torch.save({"model": {"a": Canary(canary)}, "model_args": {}}, tmp_path / "z.pt")
    case("torch's zip", (tmp_path / "z.pt").read_bytes())
    torch.save({"model": Canary(canary)}, tmp_path / "z.pt", _use_new_zipfile_serialization=False)
    case("torch's old format", (tmp_path / "z.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../canary", "out of the folder")
        archive.writestr("archive/data.pkl", pickle.dumps(Canary(canary)))
    case("a zip with a way out", (tmp_path / "z.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 30))
    case("a zip bomb", (tmp_path / "z.pt").read_bytes())
    case("globals by name", b"cos\nmkdir\n(V" + str(canary).encode() + b"\ntR.")
    case("a deep pickle", b"(" * 200_000 + b".")
    case("a long of 2^31 bytes", b"\x80\x02\x8b\xff\xff\xff\x7f.")
    torch.save(
        {"model": {}, "model_args": {**dict.fromkeys(asdict(SHAPE), 10**15)}}, tmp_path / "z.pt"
    )
    case("an enormous shape", (tmp_path / "z.pt").read_bytes())
    refuses(opened(cases))
    assert not canary.exists()
    # Without our checks, unpickling creates the folder.
    pickle.loads(cases["protocol 2"][1].read_bytes())
    assert canary.exists()


def test_safetensors_of_hugging_face_folders(opened, tmp_path):
    canary, cases = tmp_path / "canary", {}
    config = {
        "model_type": "gpt2",
        "n_positions": 16,
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
        "vocab_size": 61,
        "activation_function": "gelu",
    }

    def folder(label: str) -> Path:
        made = tmp_path / str(len(cases))
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config))
        cases[label] = ("weights", made)
        return made

    for label, data in bad_tensors(canary).items():
        (folder(label) / "model.safetensors").write_bytes(data)
    for label, text in (
        ("deep", "[" * 200_000),
        ("a huge number", '{"n_layer": ' + "9" * 100_000 + "}"),
        ("an enormous shape", json.dumps({**config, "n_layer": 10**12, "n_embd": 10**12})),
    ):
        made = folder(f"{label} configuration")
        (made / "config.json").write_text(text)
        (made / "model.safetensors").write_bytes(save({"a": torch.ones(1)}))
    refuses(opened(cases))
    assert not canary.exists()


def test_malicious_datasets_and_tokenizers(opened, tiny_dataset, tmp_path):
    cases = {}

    def case(label: str, kind: str = "dataset") -> Path:
        folder = Path(shutil.copytree(tiny_dataset, tmp_path / str(len(cases))))
        cases[label] = (kind, folder)
        return folder

    for label, text in (
        ("deep", "[" * 200_000),
        ("huge number", '{"format_version": ' + "9" * 100_000 + "}"),
        ("lines", json.dumps({"format_version": "a\nb" * 10_000})),
    ):
        (case(f"manifest: {label}") / "manifest.json").write_text(text)
    stored = json.loads((tiny_dataset / "tokenizer.json").read_bytes())
    for label, change in (
        ("every field huge", dict.fromkeys(stored, "x" * 5000000)),
        ("a huge name", {"name": "x" * 1_000_000}),
        ("lines", {"name": "a\nb"}),
        ("characters are a list", {"characters": [["a"]]}),
        ("half a pair", {"characters": "\ud800"}),
        ("a hash that is a number", {"sha256": 3}),
        ("characters of 15 MB", {"characters": "ab" * 7_000_000}),
    ):
        (case(f"tokenizer: {label}", "tokenizer") / "tokenizer.json").write_text(
            json.dumps({**stored, **change})
        )
    (case("tokenizer: deep", "tokenizer") / "tokenizer.json").write_text("[" * 200_000)
    refuses(opened(cases))


def test_malicious_yaml_and_json_lines(opened, tmp_path):
    canary, cases = tmp_path / "canary", {}
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    laugh = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in pairs
    )
    documents = {
        "a tag that calls": f"name: !!python/object/apply:os.mkdir ['{canary}']",
        "a tag that makes": f"name: !!python/object/new:os.mkdir ['{canary}']",
        "a tag that imports": "name: !!python/module:os",
        "a tag that names": "name: !!python/name:os.mkdir",
        "a billion laughs": laugh,
        "an alias": "name: &n a\ndata: {dir: *n}",
        "an alias of itself": "a: &a [*a]",
        "deep lists": "a: " + "[" * 300_000,
        "deep mappings": "{a: " * 200_000,
        "deep blocks": "\n".join(" " * i + "a:" for i in range(1200)),
        "a key twice": "name: a\nname: b",
        "a key twice below": "train: {seed: 1, seed: 2}",
        "a huge number": "train: {seed: " + "9" * 500_000 + "}",
        "a huge hexadecimal": "train: {seed: 0x" + "f" * 500_000 + "}",
        "a huge exponent": "train: {seed: 1e" + "9" * 400 + "}",
        "many keys": "\n".join(f"k{i}: 1" for i in range(8_000)),
        "a huge text": "name: " + "x" * 90_000,
        "too much": "# " + "x" * 3_000_000,
        "NUL": "name: a\0",
        "binary": "name: !!binary '####'",
        "a list as key": "? [a]\n: 1",
        "merge": "<<: [[]]",
        "two documents": "name: a\n---\nname: b",
        "no day": "name: 2024-99-99",
    }
    for number, (label, text) in enumerate(documents.items()):
        (tmp_path / f"{number}.yaml").write_text(text)
        cases[f"YAML: {label}"] = ("experiment", tmp_path / f"{number}.yaml")
    lines = {
        "deep": '{"text": ' + "[" * 200_000,
        "a huge number": '{"text": ' + "9" * 100_000 + "}",
        "a deep object": '{"a":' * 200_000,
        "a list": "[" + "1," * 1000 + "1]",
    }
    for number, (label, text) in enumerate(lines.items()):
        (tmp_path / f"{number}.jsonl").write_text(text)
        cases[f"JSON: {label}"] = ("lines", tmp_path / f"{number}.jsonl")
    results = opened(cases)
    many = "YAML: many keys"  # a mistake each
    assert results[many][0] == "refused"
    refuses({label: result for label, result in results.items() if label != many})
    assert not canary.exists()


def test_command_refuses_a_malicious_file_with_one_line_and_status_2(tmp_path):
    (tmp_path / "bad.yaml").write_text(
        f"name: !!python/object/apply:os.mkdir ['{tmp_path}/canary']"
    )
    done = subprocess.run(
        [sys.executable, str(REPO / "pipelines" / "train.py"), str(tmp_path / "bad.yaml")],
        text=True,
        capture_output=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "constructor for the tag" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bad.yaml"]
