"""A hook of mkdocs: every Markdown page of the repository is a page of the site; a list of modules.

Pages link to each other as they lie in the repository, so that they read there, too. Pages and
pictures outside of docs/ come into the site under the path they have; all other links lead to the
repository.
"""

import ast
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
HOME = "README.md"  # of the repository: on the site its place is taken by the one of docs/
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"(?ms)(^ *```.*?^ *```|`[^`\n]+`)")


def on_config(config: MkDocsConfig) -> None:
    """The operators are those that there are."""
    for section in config.nav:
        for entry in section.get("Understand", ()):
            if "Operators" in entry:
                pages = sorted((ROOT / "kernels").glob("*/README.md"))
                titles = (page.parent.name.replace("_", " ").capitalize() for page in pages)
                found = zip(titles, pages, strict=True)
                entry["Operators"][:0] = [{t: str(page.relative_to(ROOT))} for t, page in found]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    kinds = ("*.md", "assets/*.jpg", "assets/*.png", "benchmarks/*.svg")
    listing = ("git", "ls-files", "-co", "--exclude-standard", *kinds)
    for name in subprocess.check_output(listing, cwd=ROOT, text=True).split("\n"):
        if name and name != HOME and not name.startswith(("docs/", ".github/")):
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "reference/modules.md", content=modules()))
    files.append(File.generated(config, "reference/cli.md", content=commands()))
    return files


def commands() -> str:
    """Every command with its options, as typer writes them down."""
    command = (sys.executable, "-m", "typer", "dit_accel.cli.main", "utils", "docs")
    command += ("--name", "dit-accel", "--title", "Command line")
    text = subprocess.check_output(command, cwd=ROOT, text=True)
    return re.sub(r"\*\*Commands\*\*:\n.*?(?=\n## )", "", text, flags=re.DOTALL)  # in the margin


def modules() -> str:
    """A table for each room: module, first line of its docstring."""
    rooms: dict[str, list[str]] = {}
    folders = (ROOT / name for name in ("dit_accel", "kernels", "pipelines"))
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        name = path.relative_to(ROOT).with_suffix("")
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        row = f"| `{name.name}` | {' '.join(doc.split(chr(10) * 2)[0].split())} |"
        rooms.setdefault(str(name.parent), []).append(row)
    tables = (
        "\n".join([f"## {room}/", "", "| module | |", "|---|---|", *rows])
        for room, rows in sorted(rooms.items())
    )
    return "\n\n".join(["# Modules", *tables])


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = posixpath.dirname(page.file.src_uri)
    folder = here if page.file.generated_by else posixpath.join("docs", here)

    def site(link: re.Match) -> str:
        target, hash_, anchor = link[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = "README.md" if path == HOME else path.removeprefix("docs/")
        if files.get_file_from_path(uri):
            new = posixpath.relpath(uri, here or ".")
        elif not (ROOT / path).exists():
            return link[0]  # for mkdocs to complain of
        else:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            new = f"{config.repo_url}/{kind}/main/{path}"
        return f"{link[1]}{new}{hash_}{anchor}{link[3]}"

    parts = CODE.split(markdown)  # prose, code, prose, …
    return "".join(part if i % 2 else LINK.sub(site, part) for i, part in enumerate(parts))
