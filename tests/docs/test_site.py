"""`make docs` builds the documentation, every warning an error; nothing comes from another host."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import griffe
import pytest

ROOT = Path(__file__).resolve().parents[2]
API = {
    "verbs": ("accelerate", "restore", "accelerated", "attention", "Schedule", "TokenPruning"),
    "methods": ("TopK", "Pooled", "Rectified", "Rettention", "SharedResidual", "SLA"),
    "operators": ("block_table", "block_sparse_attention", "sparse_linear_attention"),
    "adapters": ("Adapter", "Geometry", "SpanSite"),
    "tools": ("load_pipeline", "generate", "compare", "run", "evaluate", "finetune"),
}


class Fetched(HTMLParser):
    """What a browser fetches to show a page; links that a reader follows are none of it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        shown = tag in ("script", "img", "iframe", "source", "video")
        url = found.get("src") if shown else found.get("href") if tag == "link" else None
        if url and found.get("rel") != "canonical":
            self.urls.append(url)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_nothing_comes_from_another_host(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    urls = {url for page in pages for url in Fetched(page).urls}
    assert [url for url in urls if "//" in url] == []
    assert any(url.endswith(".css") for url in urls)


def test_the_api_is_described(site):
    api = {page: (site / "reference/api" / page / "index.html").read_text() for page in API}
    for page, names in API.items():
        for name in names:
            assert re.search(rf'<h2 id="[\w.]+\.{name}"', api[page]), (page, name)
    assert "Make <code>pipe</code>" in api["verbs"]


def functions(module: griffe.Module | griffe.Class) -> Iterator[tuple[griffe.Object, set[str]]]:
    """Every function and class of a module with the names it may describe as arguments."""
    for member in module.members.values():
        if member.is_alias:
            continue
        if member.is_class:
            fields = {name for name, m in member.all_members.items() if m.is_attribute}
            start = member.all_members.get("__init__")
            yield member, fields | ({p.name for p in start.parameters} if start else set())
            yield from functions(member)
        elif member.is_function:
            yield member, {p.name for p in member.parameters}
        elif member.is_module:
            yield from functions(member)


@pytest.mark.parametrize("package", ["dit_accel", "kernels", "pipelines"])
def test_docstrings_name_arguments_that_exist(package):
    """One line may describe several: `start, end: …`."""
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    seen = 0
    for member, known in functions(loader.load(package)):
        text = member.docstring.value if member.docstring else ""
        found = re.search(r"\nArgs:\n((?:    .*\n?|\n)+)", text + "\n")
        for line in re.findall(r"(?m)^    (\w[\w, ]*):", found[1] if found else ""):
            names = {name.strip() for name in line.split(",")}
            assert names <= known, (member.path, names - known)
            seen += 1
    assert seen > 10
