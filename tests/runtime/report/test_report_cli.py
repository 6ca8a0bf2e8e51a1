from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import runtime.cli.app
import seqbuild.cli.app
from runtime.report.collect import Collector
from runtime.report.page import report_page
from runtime.report.run_facts import facts_of_run
from runtime.report.sources import read_facts
from runtime.streaming import journal
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import NARROW_W4, Small, Stop, calibrate, recipe, stop_at


@pytest.fixture(scope="module")
def finished(llama: Small, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was interrupted after one subgraph, and then finished, with a log of the second process only."""
    place = Place(tmp_path_factory.mktemp("place"), llama)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4, KeyboardInterrupt)
        assert runtime.cli.app.main(place.calibrate()) == 130
    assert not list(place.folder.glob("*.html"))
    assert runtime.cli.app.main(place.calibrate("--resume", "--log", place.folder / "log")) == 0
    return place


@pytest.fixture
def copied(finished: Place, tmp_path: Path) -> Place:
    """The same in another folder, for tests that change it."""
    place = Place.__new__(Place)
    place.folder, place.out = tmp_path, tmp_path / "out"
    shutil.copytree(finished.out, place.out)
    shutil.copy(finished.folder / "out.report.html", tmp_path)
    return place


def test_a_run_writes_a_page_with_what_earlier_processes_did(finished: Place) -> None:
    facts = read_facts(finished.folder / "out.report.html")
    assert (len(facts.modules), facts.resumed_at, facts.num_subgraphs, facts.is_partial) == (21, 1, 4, False)
    assert [entry.index for entry in facts.subgraphs] == [0, 1, 2, 3]
    assert all(entry.seconds and entry.peak_host_bytes for entry in facts.subgraphs)
    assert facts.subgraphs[1].phases.keys() >= {"measure", "quantize"}
    assert [entry.index for entry in facts.plan] == [0, 1, 2, 3]
    assert {one.scheme for one in facts.modules} == {"4 bit int weights in groups of 128"}
    assert facts.bytes_before > facts.bytes_after > 0
    assert {"artifact", "recipe.yaml", "model inputs"} <= facts.digests.keys()
    assert "GPTQModifier" in facts.recipe
    assert facts.warnings and facts.output_digest


def test_a_journal_without_costs_is_resumed(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = recipe(NARROW_W4, modifier="GPTQModifier")
    stop_at(monkeypatch, 7)
    with pytest.raises(Stop):
        calibrate(narrow_llama, plan, tmp_path / "out")
    stop_at(monkeypatch, 0)
    path = next(tmp_path.glob(".out.*/journal"))
    entries = journal.read(path)
    for entry in entries:
        entry.pop("cost", None)
        for module in entry.get("modules", ()):
            for name in ("num_dead", "fallback", "scheme"):
                del module[name]
    path.write_bytes(b"".join(map(journal._line, entries)))
    collector = Collector()
    result = calibrate(narrow_llama, plan, tmp_path / "out", resume=True, watchers=[collector])
    facts = facts_of_run(collector, result, tmp_path / "out", {})
    assert (facts.resumed_at, facts.is_partial, len(facts.modules)) == (1, True, 21)
    assert [entry.index for entry in facts.subgraphs] == [1, 2, 3]
    assert b"known only in part" in report_page(facts)


def test_an_output_and_its_page_give_the_same_report(finished: Place, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, printed, complaint = run(["report", str(finished.out), "-o", str(page)])
    assert (code, printed, complaint) == (0, f"report: {page}\n", "")
    written = read_facts(finished.folder / "out.report.html")
    again = read_facts(page)
    differing = [name for name in again.__struct_fields__ if getattr(again, name) != getattr(written, name)]
    assert differing == []
    of_log = read_facts(finished.folder / "log").modules
    assert of_log == [one for one in written.modules if ".layers.0." not in one.name]


def test_a_page_of_another_run_is_not_believed(copied: Place, run: Run) -> None:
    record = copied.out / "seqbuild.json"
    content = json.loads(record.read_text())
    content["model"]["name"] = "other"
    record.write_text(json.dumps(content))
    code, _, complaint = run(["report", str(copied.out)])
    assert (code, complaint) == (0, "")
    facts = read_facts(copied.folder / "out.report.html")
    assert (facts.model, facts.has_times, len(facts.modules)) == ("other", False, 21)


def test_two_runs_are_compared(copied: Place, finished: Place, run: Run) -> None:
    code, printed, complaint = run(["report", str(copied.out), "--compare", str(finished.folder / "log")])
    page = copied.folder / "out.compare.html"
    assert (code, printed, complaint) == (0, f"report: {page}\n", "")
    assert "Quantized only in A: " in page.read_text()
    assert_refused(run(["report", str(page)]), "no facts of one run", "not a comparison of two")
    inside = ["-o", str(copied.out / "page.html")]
    assert_refused(run(["report", str(page), "--compare", str(copied.out), *inside]), f"is inside {copied.out}")


@pytest.mark.parametrize("content", ["{", '{"format": "seqbuild-provenance", "format_version": [1, 0]}', "[" * 99_999])
def test_a_damaged_record_is_one_error(copied: Place, run: Run, content: str) -> None:
    (copied.out / "seqbuild.json").write_text(content)
    page = copied.folder / "page.html"
    assert_refused(run(["report", str(copied.out), "-o", str(page)]), "seqbuild.json cannot be read")
    assert not page.exists()


def test_a_file_that_is_no_page_is_kept(place: Place, run: Run) -> None:
    place.write("out.report.html", "mine")
    before = place.tree()
    assert_refused(run(place.calibrate()), "out.report.html exists and is not a page of seqbuild")
    assert_refused(run(place.calibrate("--report", place.weights / "r.html")), "--report", "is inside")
    assert_refused(run(place.calibrate("--report", place.out / "r.html")), "is inside")
    assert_refused(run(place.calibrate("--report", "r.html", "--no-report")), "cannot be combined")
    assert_refused(run(place.calibrate("--log", place.recipe)), f"{place.recipe} exists and is not an event log")
    assert_refused(run(["report", str(place.folder)]), "has no seqbuild.json")
    assert place.tree() == before


def test_a_page_that_cannot_be_written_is_a_warning(place: Place, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    place.recipe.write_text("QuantizationModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n")

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.report.html.write_file", fail)
    code, printed, complaint = run(place.calibrate("--json"))
    assert code == 0 and (place.out / "config.json").is_file()
    why = "[Errno 28] No space left on device"
    assert complaint == f"warning: cannot write the report page {place.out}.report.html: {why}\n"
    assert json.loads(printed)["report"] is None
    monkeypatch.undo()
    shutil.rmtree(place.out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.report.html.write_file", interrupt)
        code, _, complaint = run(place.calibrate())
    assert (code, complaint) == (130, f"runtime: interrupted; output directory {place.out} is complete\n")
    shutil.rmtree(place.out)
    code, printed, complaint = run(place.calibrate("--no-report"))
    assert (code, complaint) == (0, "") and "report" not in printed
    assert not list(place.folder.glob("*.html"))


def test_the_chain_of_an_artifact(llama: Small, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "chain.html"
    inspect = ["inspect", str(llama.artifact)]
    main = seqbuild.cli.app.main
    code, printed, complaint = run([*inspect, "--html", str(page), "--seq-len", "64", "--batch-size", "2"], main)
    assert (code, printed, complaint) == (0, f"page: {page}\n", "")
    text = page.read_text()
    assert "sequence = 64" in text and "model.<wbr>layers.<wbr>1.<wbr>mlp.<wbr>up_proj.<wbr>weight" in text
    assert "65.5 kB" in text  # 2 samples, 64 tokens, 128 numbers of 4 bytes
    assert "default-src" in text and "sha256-" in text
    assert_refused(run([*inspect, "--seq-len", "64"], main), "require --html", program="seqbuild")
    assert_refused(run(["report", str(page)], main), program="seqbuild")
    code, _, complaint = run([*inspect, "--html", str(page), "--seq-len", "1"], main)
    assert code == 2 and "supports a sequence of" in complaint
