"""Check the links of every Markdown file of the repository, as GitHub shows them; other sites only by their syntax."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
_REPOSITORY = re.compile(r"https://github\.com/seqbuild/seqbuild/(?:blob|tree)/main/")
_HOST = re.compile(r"([a-z0-9-]+\.)+[a-z]{2,}", re.IGNORECASE)
_OWN_ANCHOR = re.compile(r"""<a\s[^>]*\b(?:id|name)=["']([^"']+)""")


def documents(root: Path = ROOT) -> list[Path]:
    """Return the Markdown files of the repository."""
    return sorted(
        path for part in ("*.md", "docs/**/*.md", "demo/*.md", "seqbuild/**/*.md") for path in root.glob(part)
    )


def broken(document: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield one line for each broken link of a document."""
    for token in _inline(_tokens(document)):
        href = token.attrGet("href" if token.type == "link_open" else "src")
        problem = _problem(str(href), document, root) if href is not None else ""
        if problem:
            yield f"{document.relative_to(root)}: {href}: {problem}"


def _problem(href: str, document: Path, root: Path) -> str:
    """Say what is wrong with the target of a link; empty if nothing is."""
    own = _REPOSITORY.match(href)
    if own is None and urlsplit(href).scheme:
        return _syntax(href)
    path, _, fragment = (href[own.end() :] if own else href).partition("#")
    target = document if not path and own is None else ((root if own else document.parent) / unquote(path)).resolve()
    if not target.is_relative_to(root.resolve()):
        return "the target is outside of the repository"
    if not target.exists():
        return f"{target.relative_to(root.resolve())} does not exist"
    if fragment and target.suffix == ".md" and fragment not in anchors(target):
        return f"{target.relative_to(root.resolve())} has no heading with this anchor"
    return ""


def _syntax(href: str) -> str:
    parts = urlsplit(href)
    if parts.scheme == "mailto":
        return "" if "@" in parts.path else "the address has no @"
    if parts.scheme not in ("http", "https"):
        return f"the scheme {parts.scheme} is not http, https or mailto"
    return "" if _HOST.fullmatch(parts.hostname or "") else f"{parts.hostname!r} is not the name of a host"


@cache
def anchors(document: Path) -> frozenset[str]:
    """Return the anchors of a document: those that GitHub makes of its headings, and explicit ones."""
    found: dict[str, None] = {}
    tokens = _tokens(document)
    for opening, content in pairwise(tokens):
        if opening.type == "heading_open":
            name = _slug("".join(child.content for child in content.children or ()))
            number = next(number for number in range(len(tokens)) if _numbered(name, number) not in found)
            found[_numbered(name, number)] = None
    return frozenset(found) | set(_OWN_ANCHOR.findall(document.read_text(encoding="utf-8")))


def _numbered(name: str, number: int) -> str:
    return f"{name}-{number}" if number else name


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _tokens(document: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(document.read_text(encoding="utf-8"))


def _inline(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield from (child for child in token.children or () if child.type in ("link_open", "image"))


if __name__ == "__main__":
    problems = [line for document in documents() for line in broken(document)]
    for line in problems:
        print(line)
    sys.exit(bool(problems))
