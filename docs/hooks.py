"""Hooks of MkDocs: they make the site of what the repository holds already, so that no fact has a second copy.

README, changelog and CONTRIBUTING become pages. A file outside `docs/` that a page links to is copied into the site, or
the build fails. `<!-- options -->` becomes the options of the command that the page is named after, and
`<!-- api -->` one section for each public name, for mkdocstrings to fill.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from pathlib import Path
from typing import Any

import griffe
import typer.main
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import ligerexport as lx
from ligerexport.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Documents of the root and their places in the site."""
TARGET = re.compile(r"(?<=\]\()(?![a-z+]+:|#)([^)#\s]+)")

log = logging.getLogger("mkdocs.hooks")


def home(page: str) -> Path:
    """Return the directory in the repository of the document that a page is made of."""
    origin = next((name for name, place in PAGES.items() if place == page), None)
    return ROOT if origin else (ROOT / page if page.startswith("benchmarks/") else ROOT / "docs" / page).parent


def place(page: str, target: str) -> str:
    """Return where a link's target has its place in the site."""
    path = Path(os.path.normpath(home(page) / target)).relative_to(ROOT).as_posix()
    return PAGES.get(path) or path.removeprefix("docs/")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents of the root, and every file outside `docs/` that a page links to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        page = waiting.pop()
        for target in TARGET.findall(page.content_string):
            path = place(page.src_uri, target)
            if files.get_file_from_path(path) or not (ROOT / path).is_file():
                continue  # a link that leads nowhere is reported by MkDocs
            new = File(path, str(ROOT), config.site_dir, use_directory_urls=True, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(new)
            if new.is_documentation_page():
                waiting.append(new)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links from the repository's places to the site's, and fill in what is made from the code."""
    here = os.path.dirname(page.file.src_uri)
    markdown = TARGET.sub(lambda found: os.path.relpath(place(page.file.src_uri, found[1]), here or "."), markdown)
    if "<!-- options -->" in markdown:
        markdown = markdown.replace("<!-- options -->", options(Path(page.file.src_uri).stem))
    return markdown.replace("<!-- api -->", api())


def options(verb: str) -> str:
    """Return a command's arguments and options as a table of Markdown."""
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    records = [x.get_help_record(typer.Context(command)) for x in command.params]
    rows = [f"| `{name}` | {' '.join(said.split())} |" for name, said in filter(None, records)]
    return "\n".join(["| option | what it does |", "|---|---|", *rows])


def api() -> str:
    """Return a section for each public name, as mkdocstrings wants it."""
    sections = []
    for name in sorted(lx.__all__):
        thing: Any = getattr(lx, name)
        if callable(thing):
            owner = inspect.unwrap(thing)
            sections.append(f"::: {owner.__module__}.{owner.__qualname__}")
    return "\n\n".join(sections)


class Rooms(griffe.Extension):
    """Shows griffe, which mkdocstrings reads code with, the rooms: directories without an `__init__.py`."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_: Any) -> None:
        """Add the modules of a package that griffe has passed over."""
        for file in sorted((ROOT / pkg.name).rglob("*.py")):
            node, (*rooms, name) = pkg, file.relative_to(ROOT / pkg.name).with_suffix("").parts
            for room in rooms:
                if room not in node.members:
                    node.set_member(room, griffe.Module(room, filepath=file.parent, parent=node))
                node = node.members[room]
            if name not in (*node.members, "__init__"):
                node.set_member(name, griffe.visit(
                    name, filepath=file, code=file.read_text(encoding="utf-8"), parent=node,
                    extensions=loader.extensions, docstring_parser=loader.docstring_parser,
                    docstring_options=loader.docstring_options, lines_collection=loader.lines_collection,
                    modules_collection=loader.modules_collection,
                ))  # fmt: skip
