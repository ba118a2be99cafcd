"""Every page that a person reads: its links lead somewhere, its lines can be read in a terminal."""

import re
import subprocess
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 120


def tracked(*patterns: str) -> list[str]:
    """Files that are committed, or about to be."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "--deduplicate", "-z", *patterns]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return sorted(name for name in found.split("\0") if name and (ROOT / name).exists())


PAGES = tracked("*.md")
FILES = {ROOT / name for name in tracked()}
FOLDERS = {folder for file in FILES for folder in file.parents}


@cache
def tokens(page: Path) -> list:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: dict[str, int] = {}
    slugs = set()
    for opening, text in zip(tokens(page), tokens(page)[1:], strict=False):
        if opening.type != "heading_open":
            continue
        title = "".join(t.content for t in text.children if t.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        slugs.add(f"{slug}-{found[slug]}" if found.setdefault(slug, 0) else slug)
        found[slug] += 1
    return slugs


def links(page: Path) -> list[str]:
    inside = [child for token in tokens(page) for child in token.children or ()]
    found = [token.attrGet("href") or token.attrGet("src") for token in inside]
    return [link for link in found if link]


def broken(page: Path) -> list[str]:
    """Links within the repository that lead nowhere."""
    found = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if target != page and target not in FILES | FOLDERS:
            found.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            found.append(f"{link}: no such heading")
    return found


def long_lines(text: str) -> list[int]:
    """Lines that are too long; rows of tables and what a script writes are nobody's to wrap."""
    text = re.sub(r"(?s)<!-- written by .*?<!-- end -->", lambda m: "\n" * m[0].count("\n"), text)
    lines = enumerate(text.split("\n"), 1)
    return [n for n, line in lines if len(line) > LONGEST and not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken(ROOT / page) == []


@pytest.mark.parametrize("page", PAGES)
def test_lines_can_be_read(page):
    assert long_lines((ROOT / page).read_text()) == []


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    here = {ROOT / page for page in PAGES if page.startswith("docs/")} - {index}
    methods = {page for page in here if page.parent.name == "methods"}  # their own page lists them
    assert here - methods <= listed and methods & listed


def test_what_is_broken_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A & B\n\n[x](y.md) [a](#a--b) [b](#a-b) [c](https://example.org/d)\n")
    assert broken(page) == ["y.md: no such file", "#a-b: no such heading"]
    assert long_lines("short\n" + "x" * 121 + "\n| " + "y" * 121) == [2]
