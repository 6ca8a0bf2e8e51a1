"""Several recipes in one call: one pass over the data, a checkpoint for each, and one table."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime.errors import DataError, OutputError, RecipeError, SeqbuildError, UsageError
from runtime.recipe.recipe import Recipe
from runtime.recipe_sweep import STATISTICS, Sweep, names_of, sweep_lines, total_error
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import NARROW_W4, Small, Stop, calibrate, directory_bytes, recipe, stop_at, token_batches

GPTQ = recipe(NARROW_W4, modifier="GPTQModifier")
AWQ = recipe(NARROW_W4, modifier="AWQModifier")
RTN = recipe(NARROW_W4)
ORIGINAL = recipe(f"{NARROW_W4}, target: original", modifier="GPTQModifier")
ROUNDED = recipe(NARROW_W4, modifier="AutoRoundModifier")
ROTATED = Recipe.from_text(
    f"SpinQuantModifier: {{rotations: [R1], transform_type: hadamard}}\nGPTQModifier: {{{NARROW_W4}}}",
    origin="rotated.yaml",
)
RECIPES = {"gptq": GPTQ, "awq": AWQ, "rtn": RTN}
OF_RUN = ("seqbuild.json", "README.md")


def swept(small: Small, out: Path, recipes: dict[str, Recipe] | None = None, **options: Any) -> Sweep:
    defaults: dict[str, Any] = {"weights": small.weights, "batches": token_batches()}
    return runtime.sweep(small.load(), recipes=recipes or RECIPES, out=out, **{**defaults, **options})


def compared(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in directory_bytes(folder).items() if name not in OF_RUN}


def test_the_data_is_passed_once(narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, plan in RECIPES.items():
        calibrate(narrow_llama, plan, tmp_path / name, propagate_error=False)
    calls = stop_at(monkeypatch, 0)
    alone = tmp_path / "alone"
    calibrate(narrow_llama, GPTQ, alone, propagate_error=False, keep_statistics=tmp_path / "statistics")
    once, calls[0] = calls[0], 0
    found = swept(narrow_llama, tmp_path / "sweep", evaluate=lambda weights: float(len(Path(weights).name)))
    assert calls[0] == once
    assert [one.name for one in found.recipes] == list(RECIPES)
    assert found.num_passes == 1
    for one in found.recipes:
        assert compared(one.path) == compared(tmp_path / one.name)
        assert one.perplexity == len(one.name)
        assert one.num_bytes > 0
        assert 4 < one.bits <= 8
        assert 0 < one.error < 1
    assert found.recipes[0].bits == found.recipes[2].bits
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == sorted(RECIPES)
    lines = list(sweep_lines(found))
    assert lines[0].split() == ["recipe", "size", "bits", "error", "loss", "perplexity", "seconds"]
    assert "the data was passed once" in lines[-1]
    again = swept(narrow_llama, tmp_path / "saved", batches=(), statistics=tmp_path / "statistics")
    assert again.num_passes == 0
    assert [one.loss for one in again.recipes] == [one.loss for one in found.recipes]


def test_with_propagation_each_recipe_passes_by_itself(narrow_llama: Small, tmp_path: Path) -> None:
    calibrate(narrow_llama, AWQ, tmp_path / "awq")
    found = swept(narrow_llama, tmp_path / "sweep", {"gptq": GPTQ, "awq": AWQ}, propagate_error=True)
    assert found.num_passes == 2
    assert compared(tmp_path / "sweep" / "awq") == compared(tmp_path / "awq")


def test_an_interrupted_sweep_continues(narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = swept(narrow_llama, tmp_path / "expected")
    stop_at(monkeypatch, 8)
    with pytest.raises(Stop):
        swept(narrow_llama, tmp_path / "sweep")
    calls = stop_at(monkeypatch, 0)
    with monkeypatch.context() as patch:
        patch.setattr("runtime.quantize.rescaling.find_scales", _stop)
        with pytest.raises(Stop):
            swept(narrow_llama, tmp_path / "sweep", resume=True)
    assert calls[0]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} >= {"gptq", STATISTICS}
    with pytest.raises(OutputError, match="another data"):
        swept(narrow_llama, tmp_path / "sweep", resume=True, batches=token_batches(seed=9))
    with pytest.raises(OutputError, match="written with another recipe than this sweep has"):
        swept(narrow_llama, tmp_path / "sweep", {"gptq": AWQ}, resume=True)
    calls[0] = 0
    found = swept(narrow_llama, tmp_path / "sweep", resume=True)
    assert calls == [0]
    assert found.recipes[0].seconds is None
    for one, other in zip(found.recipes, expected.recipes, strict=True):
        assert compared(one.path) == compared(other.path)
    assert not (tmp_path / "sweep" / STATISTICS).exists()


def test_a_sweep_stopped_between_statistics_and_checkpoint_continues(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("runtime.streaming.workplace.Workplace.publish", _stop)
        with pytest.raises(Stop):
            swept(narrow_llama, tmp_path / "sweep")
    assert (tmp_path / "sweep" / STATISTICS).is_dir()
    calls = stop_at(monkeypatch, 0)
    swept(narrow_llama, tmp_path / "sweep", resume=True)
    assert calls == [0]


def _stop(*_: object) -> None:
    raise Stop


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batches": ()}, DataError, "needs calibration data"),
        ({"recipes": {"a": GPTQ, "bad": recipe("targets: nothing, scheme: W4A16")}}, RecipeError, "nothing"),
        ({"recipes": {"../a": GPTQ}}, UsageError, "is not the name of a directory"),
        ({"propagate_error": True, "keep_statistics": "kept"}, UsageError, "each recipe has statistics of its own"),
        ({"statistics": "missing", "keep_statistics": "kept"}, UsageError, "exclude each other"),
        ({"keep_statistics": "sweep/rtn"}, OutputError, "rtn is the same as the output directory"),
        ({"keep_statistics": "."}, OutputError, "gptq is inside the statistics directory"),
        ({"recipes": {"gptq": GPTQ, "original": ORIGINAL}}, RecipeError, "--no-propagate-error"),
        ({"recipes": {"gptq": GPTQ, "rounded": ROUNDED}}, RecipeError, "runs the model's layers"),
        ({"recipes": {"gptq": GPTQ, "rotated": ROTATED}}, RecipeError, "rotate the model differently"),
        ({"statistics": "missing"}, UsageError, "replaces the calibration data"),
        ({"recipes": {"rtn": RTN}, "keep_statistics": "kept"}, UsageError, "no recipe measures inputs"),
        ({"statistics": "missing", "batches": ()}, DataError, "does not exist"),
    ],
)
def test_what_cannot_work_is_known_before_the_first_run(
    options: dict[str, Any],
    kind: type[SeqbuildError],
    message: str,
    narrow_llama: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = stop_at(monkeypatch, 0)
    given = {key: tmp_path / value if key.endswith("statistics") else value for key, value in options.items()}
    with pytest.raises(kind, match=message):
        swept(narrow_llama, tmp_path / "sweep", **given)
    assert calls == [0]
    assert not (tmp_path / "sweep").is_dir() or not any((tmp_path / "sweep").iterdir())


def test_an_output_that_is_there_is_kept(narrow_llama: Small, tmp_path: Path) -> None:
    (tmp_path / "sweep" / "awq").mkdir(parents=True)
    (tmp_path / "sweep" / "awq" / "mine").write_text("")
    with pytest.raises(OutputError, match="awq is not empty"):
        swept(narrow_llama, tmp_path / "sweep")


def test_names_follow_from_recipes() -> None:
    assert names_of(["a/W4 A16.yaml", "FP8", "b/c.yml"]) == {"W4-A16": "a/W4 A16.yaml", "FP8": "FP8", "c": "b/c.yml"}
    with pytest.raises(UsageError, match=r"the same name 'x' \(rename a file"):
        names_of(["a/x.yaml", "b/x.yaml"])
    with pytest.raises(UsageError, match=r"the same name 'FP8' \(pass each recipe once"):
        names_of(["FP8", "FP8"])


def test_statistics_and_outputs_are_apart(narrow_llama: Small, tmp_path: Path) -> None:
    for place, words in (
        ("sweep/gptq", "the statistics directory .* is the same as the output directory"),
        ("sweep/gptq/kept", "the statistics directory .* is inside the output directory"),
        ("sweep", "the output directory .* is inside the statistics directory"),
    ):
        with pytest.raises(OutputError, match=words):
            swept(narrow_llama, tmp_path / "sweep", keep_statistics=tmp_path / place)


def test_a_directory_that_cannot_be_made_is_known_before_the_first_run(
    narrow_llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stop_at(monkeypatch, 0)
    monkeypatch.setattr("runtime.host.publish.os.access", lambda *_: False)
    with pytest.raises(OutputError, match="no permission to create files"):
        swept(narrow_llama, tmp_path / "sweep")
    assert calls == [0]
    monkeypatch.undo()
    monkeypatch.setattr(Path, "mkdir", _read_only)
    with pytest.raises(OutputError, match="the file system is read-only"):
        swept(narrow_llama, tmp_path / "sweep")


def _read_only(*_: Any, **__: Any) -> None:
    raise OSError(errno.EROFS, "Read-only file system")


def test_errors_add_up() -> None:
    from runtime.provenance.record import ModuleFacts

    def module(error: float | None, loss: float | None) -> ModuleFacts:
        rest: dict[str, Any] = {"name": "", "algorithm": "", "scheme": "", "damping": 0.0, "fallback": ""}
        counts = dict.fromkeys(("num_tokens", "num_bytes", "num_dead"), 0)
        return ModuleFacts(error=error, loss=loss, **rest, **counts)

    # ||WX||^2 are 100 and 400, and ||WX-QX||^2 are 1 and 16.
    assert total_error([module(0.1, 1.0), module(0.2, 16.0), module(None, None)]) == (
        pytest.approx((17 / 500) ** 0.5),
        17.0,
    )
    assert total_error([]) == (0.0, 0)


def test_the_command_line(place: Place, run: Run) -> None:
    second = place.write("second.yaml", "QuantizationModifier: {targets: Linear, scheme: FP8, ignore: [lm_head]}\n")
    command = ["sweep", place.artifact, "--weights", place.weights, "--recipe", place.recipe, "--recipe", second]
    command += ["--data", place.data, "--eval", place.data, "-o", place.out]
    code, out, complaint = run([str(part) for part in command])
    assert code == 0, complaint
    assert "the data was passed once" in out
    names = {path.name for path in place.out.iterdir()}
    pages = {"recipe.report.html", "second.report.html", "recipe-second.compare.html", "sweep.html"}
    assert names == {"recipe", "second", *pages}
    page = (place.out / "sweep.html").read_text()
    assert 'href="recipe-second.compare.html"' in page
    assert "Perplexity" in page
    assert_refused(run([str(part) for part in command]), "is not empty")
    code, out, complaint = run([str(part) for part in [*command, "--resume", "--json", "--no-report"]])
    assert code == 0, complaint
    facts = json.loads(out)
    assert [one["name"] for one in facts["recipes"]] == ["recipe", "second"]
    assert facts["passes"] == 0
    assert facts["report"] is None
