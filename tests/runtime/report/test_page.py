from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest

import runtime
from runtime.report.compare_page import comparison_page
from runtime.report.comparison import compare
from runtime.report.errors_by_layer import OUTPUT, WEIGHT, errors_of
from runtime.report.experts import expert_tokens
from runtime.report.facts import Perplexity, ReportedModule, RunFacts, checked
from runtime.report.figures import error_chart, expert_chart
from runtime.report.html import require_replaceable, write_page
from runtime.report.page import report_page
from runtime.report.summary import findings, verdict
from tests.runtime.report.hostile import HOSTILE_NAMES, SCRIPT, hostile_facts, large_facts


class Document(HTMLParser):
    """The elements and texts of a page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.data: dict[str, str] = {}
        self.inside: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = (tag, dict(attrs))
        self.tags.append(self.inside)

    def handle_endtag(self, tag: str) -> None:
        self.inside = ("", {})

    def handle_data(self, data: str) -> None:
        tag, attributes = self.inside
        if tag == "script" and "type" in attributes:
            self.data[str(attributes["id"])] = data
        elif tag == "script":
            self.scripts.append(data)
        elif tag != "style":
            self.text += data


def modules(errors: dict[str, float | None], **more: Any) -> list[ReportedModule]:
    defaults = {"algorithm": "gptq", "damping": 0.01, "num_tokens": 100, **more}
    return [ReportedModule(name=name, error=error, **defaults) for name, error in errors.items()]


@pytest.mark.parametrize("name", ["hostile", "comparison"])
def test_names_are_text(name: str) -> None:
    facts = hostile_facts()
    page = report_page(facts) if name == "hostile" else comparison_page(facts, facts, (SCRIPT, HOSTILE_NAMES[1]))
    found = Document(page)
    policy = next(str(one["content"]) for _, one in found.tags if one.get("http-equiv") == "Content-Security-Policy")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in found.scripts]
    assert digests == allowed and len(digests) == 3
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy and "http" not in policy
    for tag, attributes in found.tags:
        assert tag not in ("img", "iframe", "link", "object", "base", "form")
        assert not [one for one in attributes if one.startswith("on") or one in ("src", "action")]
        assert (attributes.get("href") or "#").startswith("#")
    assert SCRIPT in found.text
    figures = json.loads(found.data["figures"])
    assert figures
    assert "<script" not in found.data["figures"]
    names = json.dumps(figures)
    assert "<script>" not in names and "<img" not in names and "<a href" not in names
    for figure in figures.values():
        assert "NaN" not in json.dumps(figure) and "Infinity" not in json.dumps(figure)


def test_a_page_of_many_modules_is_small() -> None:
    facts = large_facts(20_000)
    page = report_page(facts)
    assert len(page) < 12 * 10**6
    figure = json.loads(Document(page).data["figures"])["errors-0-0"]["data"][0]
    assert len(figure["x"]) == 64
    labels = json.loads(Document(page).data["figures"])["errors-0-0"]["layout"]["yaxis"]["ticktext"]
    assert labels[:3] == ["q_proj", "experts up_proj, largest", "experts up_proj, median"]


def test_numbers_of_a_heat_map() -> None:
    errors = {f"m.{layer}.{kind}": 0.1 * layer + 0.01 for layer in (0, 1, 3) for kind in ("q", "k")}
    errors |= {f"m.1.experts.{one}.w": value for one, value in enumerate((0.2, 0.4, 0.9))}
    (found,) = errors_of(modules({**errors, "lm_head": 0.3, "m.0.nan": None}))
    assert found.measure == OUTPUT
    (drawn,) = found.maps
    assert drawn.layers == [0, 1, 3]
    rows = {row.label: list(row.values) for row in drawn.rows}
    assert rows["q"] == [0.01, 0.11, pytest.approx(0.31)]
    assert rows["experts w, largest"] == [None, 0.9, None]
    assert rows["experts w, median"] == [None, 0.4, None]
    assert [one.name for one in found.outside] == ["lm_head"]
    assert [one.name for one in found.worst[:2]] == ["m.1.experts.2.w", "m.1.experts.1.w"]
    assert [(one.kind, one.num_modules, one.largest) for one in found.kinds[:2]] == [
        ("experts.*.w", 3, 0.9),
        ("k", 3, pytest.approx(0.31)),
    ]


def test_errors_of_weights_are_not_mixed_with_those_of_outputs() -> None:
    few = modules({f"m.{layer}.q": 0.1 for layer in range(20)}) + modules({"m.0.k": 0.5}, num_tokens=0)
    output, weight = errors_of(few)
    assert (output.measure, len(output.worst), weight.measure, weight.maps) == (OUTPUT, 15, WEIGHT, [])
    assert [one.name for one in weight.worst] == ["m.0.k"]


def test_widely_spread_errors_have_logarithmic_colors() -> None:
    (found,) = errors_of(modules({"m.0.q": 0.001, "m.1.q": 0.0, "m.2.q": 0.001, "m.3.q": 1.0}))
    trace = error_chart("errors", found.maps[0]).figure["data"][0]
    assert trace["z"][0] == pytest.approx([-3.0, -3.0, -3.0, 0.0])
    assert trace["colorbar"]["ticktext"] == ["0.001", "0.01", "0.1", "1"]
    assert trace["customdata"][0][1] == ["m.1.q", "0"]


def test_experts_with_few_tokens_are_named() -> None:
    tokens = {3: [1000, 1000, 50, 0], 4: [10, 10, 10, 10]}
    found = [
        ReportedModule(name=f"m.{layer}.experts.{one}.{part}", num_tokens=number)
        for layer, numbers in tokens.items()
        for one, number in enumerate(numbers)
        for part in ("up", "down")
    ]
    (table,) = expert_tokens(found)
    assert (table.num_unused, table.num_rare, table.is_same, table.total) == (1, 2, False, 1000)
    assert [(one.layer, one.expert, one.tokens) for one in table.rare] == [(3, 3, 0), (3, 2, 50)]
    assert expert_chart("tokens", table).figure["data"][0]["customdata"][0][0] == [3, "1,000"]
    (same,) = expert_tokens([msgspec.structs.replace(one, num_tokens=7) for one in found])
    assert same.is_same and not same.rare
    assert expert_tokens([msgspec.structs.replace(one, num_tokens=0) for one in found]) == []
    assert b"every expert was measured on the same" in report_page(
        RunFacts(modules=[msgspec.structs.replace(one, num_tokens=7) for one in found])
    )


def test_what_needs_attention() -> None:
    usual = modules({f"m.{layer}.q": 0.1 for layer in range(3)})
    odd = modules({"m.3.q": 0.1}, damping=1.0, num_dead=5) + modules({"m.4.q": 0.2}, algorithm="rtn", fallback="why")
    found = findings([*usual, *odd])
    assert [(one.title, list(one.rows)) for one in found] == [
        ("Fallbacks", [("m.4.q", "rtn: why")]),
        ("Raised dampening", [("m.3.q", "1")]),
        ("Dead input channels", [("m.3.q", "5")]),
    ]
    assert findings(usual) == []


@pytest.mark.parametrize(
    ("after", "level", "headline"),
    [
        (10.1, "good", "perplexity rises by 1.00 %"),
        (9.0, "good", "perplexity falls by 10.00 %"),
        (10.0, "good", "perplexity stays the same"),
        (10.5, "note", "perplexity rises by 5.00 %"),
        (500.0, "bad", "perplexity rises by ×50"),
        (None, "bad", "the perplexity is not finite"),
    ],
)
def test_the_verdict(after: float | None, level: str, headline: str) -> None:
    facts = RunFacts(perplexity=Perplexity(before=10.0, after=after, tokens=5), modules=modules({"m.0.q": 0.1}))
    found = verdict(facts, [], [])
    assert (found.level, headline in found.headline) == (level, True), found.headline


def test_empty_facts_have_a_page() -> None:
    text = Document(report_page(RunFacts())).text
    for sentence in ("No error of a module is known", "The run had no warnings", "Time and memory are not known"):
        assert sentence in text


def test_a_comparison() -> None:
    first = RunFacts(
        recipe="a: 1\nb: 2\n",
        bytes_after=100,
        perplexity=Perplexity(before=9.0, after=10.0),
        settings={"samples": "1"},
        modules=modules({"m.0.q": 0.1, "m.0.k": 0.4, "m.0.v": 0.1}, scheme="4 bit"),
    )
    second = RunFacts(
        recipe="a: 1\nb: 3\n",
        bytes_after=50,
        perplexity=Perplexity(before=9.0, after=11.0),
        settings={"samples": "2"},
        modules=modules({"m.0.q": 0.2, "m.0.k": 0.1}, scheme="8 bit")
        + modules({"m.0.v": 0.3}, scheme="4 bit", num_tokens=0)
        + modules({"m.0.o": 0.1}),
    )
    found = compare(first, second)
    assert [(pair.name, pair.ratio) for pair in found.worse] == [("m.0.q", 2.0)]
    assert [(pair.name, pair.ratio) for pair in found.better] == [("m.0.k", 0.25)]
    assert [(one[:3]) for one in found.changed] == [("4 bit, gptq", "8 bit, gptq", 2)]
    assert (found.only_first, found.only_second) == ([], ["m.0.o"])
    assert [line for line in found.recipe if line[0]] == [("removed", "-b: 2"), ("added", "+b: 3")]
    assert list(found.differing) == [("samples", "1", "2")]
    numbers = {one.title: (one.first, one.second, one.change, one.is_better) for one in found.numbers}
    assert numbers["Perplexity after"] == ("10.0000", "11.0000", "+10.00 %", False)
    assert numbers["Size of the weights"] == ("100 B", "50 B", "-50.00 %", True)
    page = Document(comparison_page(first, second, ("one", "two")))
    assert {"errors-0-a", "errors-0-b", "errors-0-change"} <= set(json.loads(page.data["figures"]))
    assert "The errors of 1 module are not compared" in page.text


def test_only_pages_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_page(path, report_page(RunFacts()))
    write_page(path, report_page(RunFacts(model="other")))
    assert b"other" in path.read_bytes()
    path.write_text("<!DOCTYPE html>\nmine")
    with pytest.raises(runtime.OutputError, match="is not a page of seqbuild"):
        write_page(path, report_page(RunFacts()))
    assert path.read_text() == "<!DOCTYPE html>\nmine"
    with pytest.raises(runtime.OutputError, match="is not a page of seqbuild"):
        require_replaceable(tmp_path)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(runtime.OutputError, match="is not a page of seqbuild"):
        require_replaceable(tmp_path / "broken")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["broken", "page.html"]


def test_too_many_modules_are_one_error() -> None:
    facts = RunFacts(modules=[ReportedModule(name="m")] * 200_001)
    with pytest.raises(runtime.DataError, match="more than 200,000 modules"):
        checked(facts, "log")
