"""Pages name files, headings and tests that exist."""

import re
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PAGES = [*REPO.glob("*.md"), *(REPO / "docs").glob("*.md"), REPO / "benchmarks" / "RESULTS.md"]
FOLDERS = "benchmarks|configs|deploy|docs|model|orchestrator|pipelines|tests"


@cache
def known_tests() -> set[str]:
    files = (REPO / "tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text("utf-8")
    missing = []
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text)
    missing += [path for path in paths if not (REPO / path).exists()]
    missing += set(re.findall(r"`(test_\w+)`", text)) - known_tests()
    assert not missing
