#!/usr/bin/env python3
"""Print the size of the code, by package: lines, tokens, files, longest function.

    benchmarks/size.py [FOLDER]

Tokens are those of Python's `tokenize` without comments, docstrings, newlines and indentation. A
code line is a line that has at least one such token. Tokens per code line tell how dense the code
is.
"""

import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("model", "orchestrator", "pipelines")
NOT_COUNTED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


@dataclass
class Size:
    """Size of a set of files.

    Attributes:
        lines: All lines, blank lines and comments included.
        code_lines: Lines with at least one counted token.
        tokens: Counted tokens.
        files: Number of files.
        longest: Lines and name of the longest function.
    """

    lines: int = 0
    code_lines: int = 0
    tokens: int = 0
    files: int = 0
    longest: tuple[int, str] = (0, "")

    def __add__(self, other: "Size") -> "Size":
        return Size(
            self.lines + other.lines,
            self.code_lines + other.code_lines,
            self.tokens + other.tokens,
            self.files + other.files,
            max(self.longest, other.longest),
        )


def size_of(file: Path) -> Size:
    """Return the size of one file."""
    source = file.read_text("utf-8")
    tree = ast.parse(source)
    docstrings = _docstring_lines(tree)
    tokens = 0
    code_lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in NOT_COUNTED or token.start[0] in docstrings:
            continue
        tokens += 1
        code_lines |= set(range(token.start[0], token.end[0] + 1))
    return Size(len(source.splitlines()), len(code_lines), tokens, 1, _longest_function(tree))


def _docstring_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            lines |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def _longest_function(tree: ast.AST) -> tuple[int, str]:
    functions = [
        ((node.end_lineno or node.lineno) - node.lineno + 1, node.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return max(functions, default=(0, ""))


def package_of(file: Path, root: Path) -> str:
    """Return `orchestrator/train` for orchestrator/train/loop.py, `model` for model/gpt.py."""
    folder = file.relative_to(root).parent
    return "/".join(folder.parts[:2])


def main(root: Path) -> None:
    """Print one row per package and the total."""
    packages: dict[str, Size] = {}
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            package = package_of(file, root)
            packages[package] = packages.get(package, Size()) + size_of(file)
    packages["total"] = sum(packages.values(), Size())

    print("| package | lines | tokens | tokens a code line | files | longest function |")
    print("|---|---|---|---|---|---|")
    for name, size in packages.items():
        density = size.tokens / max(1, size.code_lines)
        lines, function = size.longest
        print(
            f"| {name} | {size.lines:,} | {size.tokens:,} | {density:.1f} | {size.files} "
            f"| {function}, {lines} lines |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
