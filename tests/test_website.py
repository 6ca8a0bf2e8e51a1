"""The documentation site: every page has a place, every link leads somewhere, the reference is complete."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import runtime
import seqbuild
from seqbuild import modifiers
from website import built, command_reference, links, python_reference

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {f"reference/{name}.md" for name in (*command_reference.PROGRAMS, *python_reference.PAGES)}


class _Loader(yaml.SafeLoader):
    """mkdocs' own YAML has tags that name functions."""


_Loader.add_multi_constructor("!!python/", lambda loader, suffix, node: None)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def pages_of(entry: Any) -> Iterator[str]:
    """Yield the files of an entry of the navigation."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from pages_of(part)


@pytest.fixture(scope="module")
def navigation() -> list[str]:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)
    return list(pages_of(config["nav"]))


def test_every_page_is_in_the_navigation_once(navigation: list[str]) -> None:
    files = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(navigation) == sorted({*files, *GENERATED, "changelog.md", "contributing.md"})


def test_the_index_lists_every_page_once(navigation: list[str]) -> None:
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = [name.rpartition("/")[2].lower() for name in re.findall(r"^\| \[[^]]+\]\(([^)#]+)\)", text, re.MULTILINE)]
    assert sorted(listed) == sorted(name for name in navigation if name not in {*GENERATED, "README.md"})


@pytest.mark.parametrize("document", links.documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_link_is_broken(document: Path) -> None:
    assert list(links.broken(document)) == []


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("page.md", ""),
        ("page.md#a-heading-with-code", ""),
        ("page.md#a-heading-with-code-1", ""),
        ("page.md#given", ""),
        ("#own", ""),
        ("sub/file.py", ""),
        ("https://example.com/a?b#c", ""),
        ("mailto:someone@example.com", ""),
        ("https://github.com/seqbuild/seqbuild/blob/main/page.md#given", ""),
        ("missing.md", "missing.md does not exist"),
        ("page.md#missing", "page.md has no heading with this anchor"),
        ("#missing", "document.md has no heading with this anchor"),
        ("../outside.md", "the target is outside of the repository"),
        ("https://github.com/seqbuild/seqbuild/blob/main/missing.md", "missing.md does not exist"),
        ("https://github.com/seqbuild/seqbuild/tree/main/page.md#missing", "page.md has no heading with this anchor"),
        ("https://localhost/page", "'localhost' is not the name of a host"),
        ("ftp://example.com", "the scheme ftp is not http, https or mailto"),
        ("mailto:someone", "the address has no @"),
    ],
)
@pytest.mark.parametrize("form", ["[text]({})", "[text][name]\n\n[name]: {}", "![image]({})"])
def test_a_broken_link_is_found(link: str, problem: str, form: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.py").touch()
    page = '# Page\n\n## A heading: with `code`\n\n## A heading, with `code`\n\n<a id="given"></a>\n'
    (tmp_path / "page.md").write_text(page, encoding="utf-8")
    document = tmp_path / "document.md"
    code = "```\n[not a link](nowhere.md)\n```\n"
    document.write_text(f"# Own\n\n{code}\n{form.format(link)}\n", encoding="utf-8")
    assert list(links.broken(document, tmp_path)) == ([f"document.md: {link}: {problem}"] if problem else [])


def test_the_built_site_is_checked(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text('<h2 id="there">B</h2>', encoding="utf-8")
    (tmp_path / "ok.css").write_text("a { background: url(x.svg) }", encoding="utf-8")
    (tmp_path / "bad.css").write_text("@font-face { src: url('https://example.com/f') }", encoding="utf-8")
    lines = (
        *('<link rel="stylesheet" href="ok.css">', '<link rel="canonical" href="https://example.com/">'),
        *('<a href="sub/b.html#there">', '<a href="https://example.com">', '<a href="#">', '<a href="sub/b.html#no">'),
        *('<a href="c.html">', '<script src="https://example.com/x.js">', "</script>", '<img src="no.png">'),
        '<script src="//example.com/y.js"></script>',
    )
    (tmp_path / "a.html").write_text("\n".join(lines), encoding="utf-8")
    assert list(built.problems(tmp_path)) == [
        "a.html: sub/b.html#no: the page has no such anchor",
        "a.html: c.html: there is no such page",
        "a.html: https://example.com/x.js is loaded from another host",
        "a.html: no.png: there is no such page",
        "a.html: //example.com/y.js is loaded from another host",
        "bad.css loads something from another host",
    ]


@pytest.mark.parametrize("program", command_reference.PROGRAMS)
def test_the_reference_has_every_command_and_option(program: str) -> None:
    page = command_reference.page(program)
    assert page == command_reference.page(program)
    sections = dict(re.findall(r"^## `([^`]+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    group: Any = typer.main.get_command(command_reference.PROGRAMS[program])
    commands = dict(command_reference.commands_of(group, program))
    assert set(sections) == set(commands)
    assert {name.split()[1] for name in commands} == set(group.commands)
    for name, command in commands.items():
        for parameter in command.params:
            forms = [*parameter.opts, *parameter.secondary_opts] if parameter.param_type_name == "option" else []
            assert [form for form in forms if f"`{form}" not in sections[name]] == [], name


def test_the_reference_states_what_options_do() -> None:
    page = command_reference.page("seqbuild")
    assert "```sh\nseqbuild quantize MODEL --out OUT [OPTIONS]\n```" in page
    assert "| `-o`, `--out PATH` | **required** | Directory for the quantized checkpoint. |" in page
    assert "| `--batch-size N` | `8` | Samples per batch. |" in page
    assert "| `--evaluate`, `--no-evaluate` | `evaluate` |" in page
    assert "\n## `seqbuild cache explain`\n" in page


def test_the_reference_has_every_public_name() -> None:
    names = [name for parts in python_reference.PAGES.values() for part in parts for name in part.names]
    assert len(names) == len(set(names))
    shown = {name.rpartition(".")[2] for name in names}
    assert shown >= {*seqbuild.__all__, *runtime.__all__, *modifiers.__all__}
