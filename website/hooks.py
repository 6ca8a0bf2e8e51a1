"""Hooks of mkdocs: pages that are made at build time, and links from pages to files of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.structure.files import File

from website import command_reference, python_reference

ROOT = Path(__file__).resolve().parents[1]
FILES = "https://github.com/seqbuild/seqbuild/blob/main/"
# Files of the repository that are pages of the site.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_BY_FILE_NAME = re.compile(r"\[(?P<name>[\w-]+\.md)\]\((?P<target>(?P=name)(#[^)\s]*)?)\)")
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)(?P<rest>(#[^)\s]*)?\))")


def on_files(files: Any, config: Any) -> Any:
    """Add the reference, and the pages that are outside of docs/."""
    made = {f"reference/{name}.md": command_reference.page(name) for name in command_reference.PROGRAMS}
    made |= {f"reference/{name}.md": python_reference.page(name) for name in python_reference.PAGES}
    made["assets/site.css"] = (Path(__file__).parent / "site.css").read_text(encoding="utf-8")
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files outside of docs/ into links to a page of the site, or to the repository.

    A link that shows the name of a page's file, which is right on GitHub, shows the page's title here.
    """
    source = {made: name for name, made in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    folder = (ROOT / source).parent

    def replaced(found: re.Match[str]) -> str:
        target = (folder / found["path"]).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            return found[0]  # mkdocs reports it
        name = target.relative_to(ROOT).as_posix()
        inside = PAGES.get(name) or (name.removeprefix("docs/") if name.startswith("docs/") else None)
        if inside is None:
            return f"{FILES}{name}{found['rest']}"
        return relpath(inside, start=str(Path(page.file.src_uri).parent)) + found["rest"]

    return _LINK.sub(replaced, _BY_FILE_NAME.sub(_titled, markdown))


def _titled(found: re.Match[str]) -> str:
    path = ROOT / "docs" / found["name"]
    title = _TITLE.search(path.read_text(encoding="utf-8")) if path.is_file() else None
    return f"[{title[1]}]({found['target']})" if title else found[0]
