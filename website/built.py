"""Check the built site: every link leads to an anchor or a page of it, and nothing is loaded from another host."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADS = {"script", "img", "iframe", "source", "video", "audio", "embed"}
_URL = re.compile(r"url\(\s*['\"]?(https?:|//)|@import")


class _Page(HTMLParser):
    """The anchors of a page, its links, and the addresses of what a browser loads with it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what an element points to."""
        found = {name: value for name, value in attrs if value is not None}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in _LOADS and "src" in found:
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") not in ("canonical", "prev", "next") and "href" in found:
            self.loads.append(found["href"])


@cache
def _page(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


def problems(site: Path) -> Iterator[str]:
    """Yield one line for each broken link, and for each file that a page loads from another host."""
    pages = sorted(path for path in site.rglob("*.html") if path.name != "404.html")  # its links are those of a server
    for path in pages:
        page, name = _page(path), path.relative_to(site)
        yield from (f"{name}: {href}: {text}" for href in page.links if (text := _broken(href, path, site)))
        for address in page.loads:
            if urlsplit(address).scheme not in ("", "data") or address.startswith("//"):
                yield f"{name}: {address} is loaded from another host"
            elif text := _broken(address, path, site):
                yield f"{name}: {address}: {text}"
    for path in sorted(site.rglob("*.css")):
        if _URL.search(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)} loads something from another host"


def _broken(href: str, path: Path, site: Path) -> str:
    """Say what is wrong with a link inside of the site; empty if nothing is."""
    parts = urlsplit(href)
    if parts.scheme or parts.netloc:
        return ""
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_relative_to(site.resolve()) or not target.is_file():
        return "there is no such page"
    if parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in _page(target).anchors:
        return "the page has no such anchor"
    return ""


if __name__ == "__main__":
    found = list(problems(Path(sys.argv[1]).resolve()))
    for line in found:
        print(line)
    sys.exit(bool(found))
