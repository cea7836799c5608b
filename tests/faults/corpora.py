"""Kinds of faults of a corpus: one entry of `CORPORA` each.

An entry writes files and returns the documents that a preparation must have read, or None if it
must refuse them. Both are checked: a preparation that ends with status 0 has exactly these
documents, and one that is refused prints one line and leaves no dataset.
"""

import gzip
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = [
    "It was a dark and stormy night.\n" * 40,
    "中文 😀 and the rain fell.\n" * 30,
    "x y z\n" * 50,
]


@dataclass
class Corpus:
    """What a kind has written.

    Attributes:
        entries: `data.corpus`.
        documents: The texts, in order; None: it must be refused.
        may_refuse: A refusal is right, too.
        change: Called by the preparation between its two passes over the files.
        then: Called before the same command is started again; what must be read then.
    """

    entries: list[str]
    documents: list[str] | None
    may_refuse: bool = False
    change: tuple[str, str] | None = None
    then: Callable[[], list[str]] | None = None


Kind = Callable[[Path, random.Random], Corpus]


def _texts(folder: Path, names: str = "abc") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.txt" for name in names]
    for file, text in zip(files, TEXTS, strict=False):
        file.write_text(text, "utf-8")
    return files


def _lines(texts: list[str] = TEXTS) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def _all(path: Path, documents: list[str] | None, **more: Any) -> Corpus:
    return Corpus([str(path)], documents, **more)


def json_of_lines(path: Path, rng: random.Random) -> Corpus:
    file = path / "data.json"
    file.write_text(_lines(), "utf-8")
    return _all(file, TEXTS)


def jl_of_lines(path: Path, rng: random.Random) -> Corpus:
    file = path / "data.jl"
    file.write_text(_lines(), "utf-8")
    return _all(file, TEXTS)


def gzip_of_lines(path: Path, rng: random.Random) -> Corpus:
    file = path / "data.jsonl.gz"
    file.write_bytes(gzip.compress(_lines().encode()))
    return _all(file, TEXTS, may_refuse=True)


def json_array(path: Path, rng: random.Random) -> Corpus:
    file = path / "data.json"
    file.write_text(json.dumps([{"text": text} for text in TEXTS]), "utf-8")
    return _all(file, TEXTS, may_refuse=True)


def csv_file(path: Path, rng: random.Random) -> Corpus:
    file = path / "data.csv"
    file.write_text('id,text\n1,"one, two"\n2,"three"\n' * 20, "utf-8")
    return _all(file, ["one, two", "three"] * 20, may_refuse=True)


def lfs_pointer(path: Path, rng: random.Random) -> Corpus:
    _texts(path / "c")
    (path / "c" / "d.txt").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 12345\n"
    )
    return _all(path / "c", None)


def dangling_link(path: Path, rng: random.Random) -> Corpus:
    _texts(path / "c")
    (path / "c" / "d.txt").symlink_to(path / "missing.txt")
    return _all(path / "c", None)


def loop_of_links(path: Path, rng: random.Random) -> Corpus:
    _texts(path / "c")
    (path / "c" / "again").symlink_to(path / "c", target_is_directory=True)
    entry = rng.choice([path / "c", path / "c" / "**" / "*.txt"])
    return _all(entry, TEXTS)


def linked_folder(path: Path, rng: random.Random) -> Corpus:
    _texts(path / "elsewhere")
    (path / "c").mkdir()
    (path / "c" / "sub").symlink_to(path / "elsewhere", target_is_directory=True)
    return _all(rng.choice([path / "c", path / "c" / "**" / "*"]), TEXTS)


def file_and_its_link(path: Path, rng: random.Random) -> Corpus:
    _texts(path / "c")
    (path / "c" / "z.txt").symlink_to(path / "c" / "a.txt")
    return _all(path / "c", TEXTS)


def beside_parquet(path: Path, rng: random.Random) -> Corpus:
    (path / "c").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), path / "c" / "part-0.parquet")
    for name in ("README.md", "dataset_info.json", "_SUCCESS"):
        (path / "c" / name).write_text('{"about": "this folder"}\n')
    return _all(path / "c", TEXTS)


def null_text(path: Path, rng: random.Random) -> Corpus:
    pq.write_table(pa.table({"text": [*TEXTS, None]}), path / "c.parquet")
    return _all(path / "c.parquet", None)


def binary_column(path: Path, rng: random.Random) -> Corpus:
    column = pa.array([text.encode() for text in TEXTS], pa.binary())
    pq.write_table(pa.table({"text": column}), path / "c.parquet")
    return _all(path / "c.parquet", TEXTS, may_refuse=True)


def utf16(path: Path, rng: random.Random) -> Corpus:
    (path / "c.txt").write_bytes(TEXTS[0].encode("utf-16-le"))
    return _all(path / "c.txt", None)


def invalid_utf8(path: Path, rng: random.Random) -> Corpus:
    content = TEXTS[0].encode()
    place = rng.randrange(len(content))
    (path / "c.txt").write_bytes(content[:place] + b"\xff" + content[place:])
    return _all(path / "c.txt", None)


def other_scheme(path: Path, rng: random.Random) -> Corpus:
    return Corpus([rng.choice(["s3://B/c.txt", "abfs://b/c", "hdfs://n/c"])], None)


def number_sign(path: Path, rng: random.Random) -> Corpus:
    _texts(path, "a")
    file = path / "a.txt #c.txt"
    file.write_text(TEXTS[1], "utf-8")
    return _all(file, [TEXTS[1]])


def brackets(path: Path, rng: random.Random) -> Corpus:
    _texts(path / "d[x]")
    return _all(path / "d[x]" / "*.txt", TEXTS)


def same_name_and_size(path: Path, rng: random.Random) -> Corpus:
    for name, text in (("raw", "ABC def\n" * 50), ("lower", "abc def\n" * 50)):
        (path / name).mkdir()
        (path / name / "corpus.txt").write_text(text)
    found = _all(path / "raw" / "corpus.txt", ["ABC def\n" * 50])

    def then() -> list[str]:
        found.entries = [str(path / "lower" / "corpus.txt")]
        return ["abc def\n" * 50]

    found.then = then
    return found


def same_size_and_older(path: Path, rng: random.Random) -> Corpus:
    file = path / "c.txt"
    file.write_text("ABC def\n" * 50)

    def then() -> list[str]:
        file.write_text("abc def\n" * 50)
        os.utime(file, (1e9, 1e9))
        return ["abc def\n" * 50]

    return _all(file, ["ABC def\n" * 50], then=then)


def swapped_entries(path: Path, rng: random.Random) -> Corpus:
    texts = ["one two\n" * 60, "two one\n" * 60]
    for name, text in zip("AB", texts, strict=True):
        (path / name).mkdir()
        (path / name / "c").write_text(text)
    found = Corpus([str(path / "A" / "c"), str(path / "B" / "c")], texts)

    def then() -> list[str]:
        found.entries.reverse()
        return texts[::-1]

    found.then = then
    return found


def _changes(how: str) -> Kind:
    """Return a kind whose first file is changed while it is read."""

    def write(path: Path, rng: random.Random) -> Corpus:
        file = path / rng.choice(["c.jsonl", "c.txt"])
        file.write_text(_lines(TEXTS * 8) if file.suffix == ".jsonl" else "".join(TEXTS))
        return _all(file, None, change=(how, str(file)))

    return write


def change_file(how: str, name: str) -> None:
    """Change a file of the corpus; called in the process that reads it."""
    file = Path(name)
    size = file.stat().st_size
    if how == "shrinks":
        os.truncate(file, size // 2)
    elif how == "grows":
        with open(file, "a") as opened:
            opened.write('{"text": "more"}\n')
    elif how == "deleted":
        file.unlink()
    else:
        content = file.read_bytes()
        replacement = file.with_name("other")
        replacement.write_bytes(content.replace(b"rain", b"snow"))
        os.replace(replacement, file)


CORPORA: dict[str, tuple[str, Kind]] = {
    "json": ("JSON lines in .json", json_of_lines),
    "jl": ("JSON lines in .jl", jl_of_lines),
    "jsonl-gz": ("compressed JSON lines", gzip_of_lines),
    "json-array": ("a JSON array", json_array),
    "csv": ("a CSV file", csv_file),
    "lfs": ("a Git-LFS pointer", lfs_pointer),
    "dangling": ("a dangling link", dangling_link),
    "loop": ("a loop of links", loop_of_links),
    "linked-folder": ("a linked folder", linked_folder),
    "link-twice": ("a file and a link to it", file_and_its_link),
    "beside-parquet": ("other files beside Parquet", beside_parquet),
    "null": ("null as a text", null_text),
    "binary": ("a binary column", binary_column),
    "utf-16": ("UTF-16 without a mark", utf16),
    "utf-8": ("invalid UTF-8", invalid_utf8),
    "scheme": ("an address of an object store", other_scheme),
    "number-sign": ("a path with ' #'", number_sign),
    "brackets": ("a folder with brackets and a pattern", brackets),
    "same-name": ("another file of the same name and size", same_name_and_size),
    "same-size": ("another text of the same size, with an older time", same_size_and_older),
    "swapped": ("two entries swapped", swapped_entries),
    "shrinks": ("a file that shrinks while it is read", _changes("shrinks")),
    "grows": ("a file that grows while it is read", _changes("grows")),
    "deleted": ("a file that is deleted while it is read", _changes("deleted")),
    "replaced": ("a file that is replaced while it is read", _changes("replaced")),
}
