"""The search for a scheme of each layer within a budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import runtime
from runtime.algorithms.rtn import quantize_rtn
from runtime.checkpoint.reader import Checkpoint
from runtime.data.lanes import Lanes
from runtime.errors import OutputError, RecipeError, UsageError
from runtime.quantize.preparation import prepare
from runtime.recipe.recipe import Recipe
from runtime.search import resolve
from runtime.search.candidates import CandidateJobs
from runtime.search.compact_targets import compact_targets
from runtime.search.find import find_bits
from runtime.search.found_bits import ERRORS, FoundBits
from runtime.search.loss_pass import LossPass
from runtime.search.options import BitSearch
from runtime.search.sensitivity_pass import NoGradientError, SensitivityPass
from tests.runtime.place import Place, Run, assert_refused
from tests.runtime.small import Small, Stop, directory_bytes, recipe, stop_at, token_batches

CPU = torch.device("cpu")
FEW = [(2, 12), (2, 12)]


def asking(text: str) -> Recipe:
    return recipe(f"ignore: [lm_head], {text}", modifier="AutoBitsModifier")


def find(small: Small, text: str, **options: Any) -> FoundBits:
    values = {"weights": Checkpoint(small.weights), "batches": token_batches(FEW), "device": CPU}
    return find_bits(BitSearch(artifact=small.load(), recipe=asking(text), **{**values, **options}))


@pytest.fixture(scope="module")
def found(llama: Small) -> FoundBits:
    return find(llama, "budget: W4A16")


def loss_pass(small: Small, candidate: str, dtype: torch.dtype, sizes: list[tuple[int, int]]) -> LossPass:
    jobs = CandidateJobs(recipes={candidate: recipe(f"scheme: {candidate}, ignore: [lm_head]")})
    prepared = prepare(small.load(), Checkpoint(small.weights), jobs.recipes[candidate], dtype, CPU, assign=jobs)
    batches = token_batches(sizes)
    return LossPass(
        prepared=prepared,
        candidates=[jobs.jobs[candidate]],
        lanes=Lanes.of(prepared.artifact.manifest, batches),
        device=CPU,
        samples=batches,
        budget=None,
        progress=lambda line: None,
    )


def test_losses_equal_a_loop_over_tokens(llama: Small) -> None:
    measured = loss_pass(llama, "W3A16", torch.float32, FEW)
    name = "model.layers.1.mlp.down_proj"
    module, inputs = measured.prepared.model.get_submodule(name), []
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    rows = measured.forward()
    weight = measured.prepared.weights.read(f"{name}.weight", CPU)
    args = measured.candidates[0][name].scheme.weights
    error = weight.double() - quantize_rtn(weight, args, scale_dtype=torch.float32).weight_OI.double()
    expected = torch.zeros(len(weight), dtype=torch.float64)
    for token in torch.cat([one.reshape(-1, one.shape[-1]) for one in inputs[: len(FEW)]]).double():
        expected += (error @ token) ** 2
    torch.testing.assert_close(rows[name][0].double(), expected, rtol=1e-4, atol=1e-9)


def test_sensitivities_equal_autograd_and_finite_differences(llama: Small) -> None:
    """The gradient of -log p of the drawn tokens; norms of the model compute in float32, whatever the dtype is."""
    measured = loss_pass(llama, "W4A16", torch.float64, [(1, 4)])
    measured.forward()
    found = measured.backward()["model.layers.1.self_attn.o_proj"]
    artifact, model = measured.prepared.artifact, measured.prepared.model
    measured.prepared.weights.load(model, artifact.manifest.parameters, CPU)
    module = model.get_submodule("model.layers.1.self_attn.o_proj")
    uniform = torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = torch.zeros(1, 4, 128, dtype=torch.float64, requires_grad=True)
    module.register_forward_hook(lambda _, args, output: output.detach() + error)
    tokens: list[torch.Tensor] = []

    def loss() -> torch.Tensor:
        values: dict[str, Any] = dict(token_batches([(1, 4)])[0])
        for subgraph in artifact.subgraphs:
            values |= subgraph.forward(model, **{key: values[key] for key in subgraph.input_names})
        log_p = torch.log_softmax(values["logits"][0], -1)
        tokens.append((log_p.detach().exp().cumsum(-1) <= uniform[:, None]).sum(-1))
        return -log_p.gather(1, tokens[0][:, None]).sum()

    (gradient,) = torch.autograd.grad(loss(), error)
    torch.testing.assert_close(found.mean_O(), gradient[0].square().mean(0), rtol=1e-5, atol=1e-12)
    assert found.num_tokens == 4
    largest = int(gradient.abs().argmax())
    moved = []
    for step in (0.02, -0.02):
        with torch.no_grad():
            error.zero_().view(-1)[largest] = step
            moved.append(float(loss()))
    assert (moved[0] - moved[1]) / 0.04 == pytest.approx(float(gradient.view(-1)[largest]), rel=0.02)


def test_the_budget_is_kept_and_no_uniform_scheme_is_predicted_better(found: FoundBits) -> None:
    uniform = {one.candidate: one for one in found.uniform()}
    assert found.num_bytes <= uniform["W4A16"].num_bytes == found.most_bytes
    assert found.loss <= uniform["W4A16"].loss
    assert found.gap == 0
    losses = [one.loss for one in found.uniform()]
    assert losses == sorted(losses, reverse=True) and losses[-1] > 0


def test_fused_modules_have_one_group(found: FoundBits) -> None:
    layer = [group.modules for group in found.groups if group.modules[0].startswith("model.layers.0.")]
    kinds = [tuple(name.rpartition(".")[2] for name in modules) for modules in layer]
    assert kinds == [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def test_the_same_search_finds_the_same(llama: Small, found: FoundBits) -> None:
    again = find(llama, "budget: W4A16")
    assert again == found


def test_the_recipe_says_what_was_chosen(llama: Small, found: FoundBits) -> None:
    read = Recipe.from_text(found.recipe_text, "found.yaml")
    assert read.search is None
    prepared = prepare(llama.load(), Checkpoint(llama.weights), read, torch.float32)
    stated = {name: read.groups[job.group].name for name, job in prepared.jobs.items()}
    chosen = {name: found.chosen(index) for index, group in enumerate(found.groups) for name in group.modules}
    assert stated == chosen
    assert len(found.recipe_text.splitlines()) < 40


def test_lines_and_page_show_every_group(llama: Small, found: FoundBits) -> None:
    from runtime.report.search_page import search_page

    text, page = "\n".join(found.lines()), search_page(found, "Llama").decode()
    assert "model.layers.2.self_attn.q_proj/k_proj/v_proj" in text
    assert "this choice" in text and "the best choice for W4A16" in text
    assert all(name in page for name in ("W2A16", "this choice", "Recipe", '"bits-0"', '"loss-0"', '"sizes"'))


@pytest.mark.parametrize("way", ["forward", "none"])
def test_other_ways_to_weigh(llama: Small, way: str) -> None:
    found = find(llama, f"budget: 8bits, candidates: [W3A16, W8A16], sensitivity: {way}")
    losses = [one.loss for one in found.uniform()]
    assert losses[0] > losses[1] > 0
    assert (found.unit == ERRORS) == (way == "none")
    assert {group.modules for group in found.groups if found.chosen(found.groups.index(group)) == "W8A16"}


def test_forwards_and_gradients_agree(llama: Small) -> None:
    """Both predict the divergence that quantizing each group causes."""
    text = "budget: 7bits, candidates: [W6A16, W8A16], sensitivity: "
    gradient, forward = (
        find(llama, text + way, batches=token_batches([(4, 40)] * 4)) for way in ("gradient", "forward")
    )
    ratios = [one[0] / other[0] for one, other in zip(gradient.losses, forward.losses, strict=True)]
    assert min(ratios) > 0.4 and max(ratios) < 1.6, ratios


def test_without_gradients_forwards_weigh(llama: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SensitivityPass, *args: Any, **options: Any) -> None:
        raise NoGradientError("a step is opaque")

    monkeypatch.setattr(SensitivityPass, "backward", broken)
    lines: list[str] = []
    found = find(llama, "budget: 6bits, candidates: [W3A16, W8A16]", progress=lines.append)
    (remark,) = found.remarks
    assert remark.startswith("warning: errors are weighed by forwards") and "a step is opaque" in remark
    assert remark in lines


def test_code_that_detaches_is_noticed(llama: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    real = runtime.chain.LoadedSubgraph.forward

    def detached(self: Any, model: Any, **inputs: Any) -> dict[str, Any]:
        outputs = real(self, model, **inputs)
        return {name: one.detach() if isinstance(one, torch.Tensor) else one for name, one in outputs.items()}

    monkeypatch.setattr(runtime.chain.LoadedSubgraph, "forward", detached)
    assert find(llama, "budget: 6bits, candidates: [W3A16, W8A16]").remarks


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_all_experts_of_a_layer_have_one_scheme(kind: str, request: pytest.FixtureRequest) -> None:
    small: Small = request.getfixturevalue(kind)
    found = find(small, "budget: 9bits, candidates: [NVFP4A16, unquantized]", batches=token_batches([(4, 40)]))
    experts = [group for group in found.groups if ".experts." in group.modules[0]]
    assert len(experts) == 3 and all(len(group.modules) == 12 for group in experts)
    losses = [own for group, own in zip(found.groups, found.losses, strict=True) if group in experts]
    assert all(nvfp4 > unquantized == 0 for nvfp4, unquantized in losses)
    read = Recipe.from_text(found.recipe_text, "found.yaml")
    prepared = prepare(small.load(), Checkpoint(small.weights), read, torch.float32)
    stated = {name: read.groups[job.group].name for name, job in prepared.jobs.items()}
    chosen = {name: found.chosen(index) for index, group in enumerate(found.groups) for name in group.modules}
    assert stated == {name: scheme for name, scheme in chosen.items() if scheme != "unquantized"}


def test_a_run_searches_once_and_writes_the_plain_recipe(
    llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asking("budget: 6bits, candidates: [W3A16, W8A16]")
    options: dict[str, Any] = {"weights": llama.weights, "batches": token_batches(FEW)}
    whole = runtime.calibrate(llama.load(), recipe=asked, out=tmp_path / "whole", **options)
    text = (whole.path / "recipe.yaml").read_text()
    assert "AutoBitsModifier" not in text and "W3A16" in text and "W8A16" in text
    again = Recipe.from_file(whole.path / "recipe.yaml")
    plain = runtime.calibrate(llama.load(), recipe=again, out=tmp_path / "plain", **options)
    name = "model.safetensors"
    assert directory_bytes(plain.path)[name] == directory_bytes(whole.path)[name]
    assert plain.path.joinpath("recipe.yaml").read_text() == text

    with monkeypatch.context() as patch:
        calls = stop_at(patch, 0)
        found = find(llama, "budget: 6bits, candidates: [W3A16, W8A16]")
        calls_of_search = calls[0]
    assert whole.num_bytes == found.num_bytes + found.num_other_bytes  # as the budget counts them
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, calls_of_search + 8)
        runtime.calibrate(llama.load(), recipe=asked, out=tmp_path / "resumed", **options)
    with monkeypatch.context() as patch:
        patch.setattr(resolve, "find_bits", lambda search: pytest.fail("it searched again"))
        resumed = runtime.calibrate(llama.load(), recipe=asked, out=tmp_path / "resumed", resume=True, **options)
    assert resumed.resumed_at > 0
    assert directory_bytes(resumed.path)[name] == directory_bytes(whole.path)[name]


@pytest.mark.parametrize(
    "kept", ["", "{}", "[]", '{"search": "x", "targets": {}}', '{"search": "KEY", "targets": {"W4A16": [1]}}']
)
def test_a_choice_that_is_not_of_this_search_is_ignored(tmp_path: Path, kept: str) -> None:
    path = tmp_path / "choice.json"
    path.write_text(kept)
    assert resolve._left_by(path, "KEY", asking("budget: 4.5bits")) is None
    path.write_text(json.dumps({"search": "KEY", "targets": {"W4A16": ["re:.*"]}}))
    assert resolve._left_by(path, "KEY", asking("budget: 4.5bits")) == {"W4A16": ["re:.*"]}


def test_several_workers_are_told_to_search_first() -> None:
    run: Any = SimpleNamespace(
        recipe=asking("budget: 4bits"), options=SimpleNamespace(statistics=None), workers=SimpleNamespace(size=2)
    )
    with pytest.raises(UsageError, match="this run has 2"):
        resolve.plain_recipe_of(run)
    run.options.statistics = Path("kept")
    with pytest.raises(UsageError, match="needs data for gradients"):
        resolve.plain_recipe_of(run)


def test_other_modifiers_stay(llama: Small) -> None:
    text = """
first_stage:
  q_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.5}
    AutoBitsModifier: {budget: 6bits, candidates: [W3A16, W8A16], algorithm: rtn, ignore: [lm_head]}
second_stage:
  q_modifiers:
    QuantizationModifier:
      kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false}
"""
    read = Recipe.from_text(text, "recipe.yaml")
    search = BitSearch(
        artifact=llama.load(),
        weights=Checkpoint(llama.weights),
        batches=token_batches(FEW),
        recipe=read,
        device=CPU,
    )
    plain = Recipe.from_text(find_bits(search).recipe_text, "found.yaml")
    assert plain.cache is not None
    assert [type(entry).__name__ for entry in (*plain.transforms, *plain.modifiers)] == [
        "SmoothQuantModifier",
        "QuantizationModifier",
        "QuantizationModifier",
    ]


def test_targets_are_compact_and_exact() -> None:
    names = [f"model.layers.{n}.{part}" for n in range(12) for part in ("attn.q", "attn.k", "mlp.up")] + ["head"]
    own = [name for name in names if name.endswith(("q", "k"))]
    assert compact_targets(own, names, {}) == [r"re:(.*\.)?layers\.\d+\.attn\.(q|k)$"]
    some = ["model.layers.1.mlp.up", "model.layers.11.mlp.up", "head"]
    assert compact_targets(some, names, {}) == [r"re:(.*\.)?layers\.(1|11)\.mlp\.up$", "re:(.*\\.)?head$"]
    both = [*names, "vision.layers.1.mlp.up"]
    assert compact_targets(["model.layers.1.mlp.up"], both, {}) == ["model.layers.1.mlp.up"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("budget: 3", "recipe.yaml:1: budget must be a text such as 3.5bits"),
        ("budget: '3'", "budget must have a unit; got '3'"),
        ("budget: 0bits", "budget must be above 0 and at most 64 bits"),
        ("budget: 4bits, algorithm: rtn, block_size: 64", "block_size has no effect with algorithm: rtn"),
        ("budget: 4bits, sensitivity: none, sensitivity_samples: 2", "has no effect with sensitivity: none"),
        ("budget: much GiB", "budget must be bits, bytes or a preset; got 'much GiB'"),
        ("candidates: [W4A16]", "AutoBitsModifier has no budget"),
        ("budget: 4bits, candidates: [W4A17]", "unknown scheme 'W4A17'"),
        ("budget: 4bits, candidates: [W8A8]", "the candidate W8A8 rounds inputs"),
        ("budget: 4bits, candidates: [unquantized]", "candidates has no scheme"),
        ("budget: 4bits, candidates: 4", "candidates must be a list of presets"),
        ("budget: 4bits, algorithm: awq", "algorithm must be gptq or rtn"),
        ("budget: 4bits, bits: 4", "unknown key 'bits' of AutoBitsModifier"),
    ],
)
def test_bad_fields(fields: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(fields, modifier="AutoBitsModifier")
    assert words in caught.value.message


def test_a_budget_without_a_choice_is_rejected(llama: Small) -> None:
    """All modules fit as they are: the recipe would quantize nothing."""
    words = r"32bits leaves every searched module unquantized, .*\(lower the budget, or remove unquantized"
    with pytest.raises(UsageError, match=words):
        find(llama, "budget: 32bits, candidates: [W4A16, unquantized]")


def test_there_is_one_search() -> None:
    part = "{modifiers: {AutoBitsModifier: {budget: 4bits}}}"
    with pytest.raises(RecipeError, match="two modifiers AutoBitsModifier"):
        Recipe.from_text(f"a_stage: {part}\nb_stage: {part}".replace("modifiers", "q_modifiers"), "recipe.yaml")


def _full(*_: Any) -> None:
    raise OutputError("the disk is full")


def test_the_command(place: Place, run: Run) -> None:
    found, page = place.folder / "found.yaml", place.folder / "found.html"
    command = ["search", place.artifact, "--weights", place.weights, "--data", place.data, "-o", found]
    call: Callable[..., tuple[int, str, str]] = lambda *more: run([str(part) for part in (*command, *more)])  # noqa: E731
    code, printed, complaint = call("--budget", "3.2bits", "--candidates", "w2a16,w4a16", "--html", page, "--json")
    assert (code, complaint) == (0, "")
    facts = json.loads(printed)
    assert facts["bits"] <= 3.2 and {one["scheme"] for one in facts["groups"]} == {"W2A16", "W4A16"}
    assert Recipe.from_file(found).search is None and page.read_bytes().startswith(b"<!DOCTYPE html>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.report.search_page.write_search", _full)
        code, printed, complaint = call("--budget", "3.2bits", "--html", page)
    assert code == 0 and "this choice" in printed and "page:" not in printed
    assert "cannot write the page of the search: " in complaint
    found.unlink()
    before = place.tree()
    place.recipe.write_text("AutoBitsModifier: {budget: 100bytes, ignore: [lm_head]}")
    assert_refused(call("--budget", "2bits"), "the budget 2bits is too small", "2.2", "bits (raise the budget")
    assert_refused(call("--budget", "20kB"), "the budget 20kB is too small", "bytes")
    assert_refused(call("--budget", "many"), "got 'many'")
    assert_refused(call("--budget", "3bits", "--candidates", "W3"), "unknown scheme 'W3'")
    assert_refused(call(), "a search needs a budget (pass --budget")
    assert_refused(call("--recipe", place.write("plain.yaml", "QuantizationModifier: {scheme: W4A16}")), "has no AutoB")
    assert_refused(call("--recipe", place.recipe, "--budget", "3bits"), "--budget and --recipe both say")
    assert_refused(call("--budget", "3bits", "-o", place.folder / "plain.yaml"), "is not a recipe of a search")
    place.recipe.write_text("AutoBitsModifier: {budget: 3bits, ignore: [lm_head]}")
    assert_refused(call("--recipe", place.recipe, "-o", place.recipe), "is not a recipe of a search")
    place.recipe.write_text("AutoBitsModifier: {budget: 100bytes, ignore: [lm_head]}")
    assert_refused(call("--budget", "3bits", "--html", found), "are the same file")
    (place.folder / "plain.yaml").unlink()
    assert place.tree() == before


def test_a_plan_counts_the_largest_candidate(place: Place, run: Run) -> None:
    place.recipe.write_text("AutoBitsModifier: {budget: 3.5bits, ignore: [lm_head]}")
    command = [
        "plan",
        str(place.artifact),
        "--recipe",
        str(place.recipe),
        "--samples",
        "2",
        "--seq-len",
        "16",
        "--json",
    ]
    code, printed, _ = run(command)
    facts = json.loads(printed)
    assert code == 0 and facts["fits"] and "the plan counts the largest candidate" in printed


def test_saved_statistics_are_not_measured_again(llama: Small, found: FoundBits, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": llama.weights, "batches": token_batches(FEW), "propagate_error": False}
    plan = recipe("scheme: W4A16, ignore: [lm_head]", modifier="GPTQModifier")
    runtime.calibrate(llama.load(), recipe=plan, out=tmp_path / "out", keep_statistics=tmp_path / "kept", **options)
    again = find(llama, "budget: W4A16", statistics=tmp_path / "kept")
    assert again.recipe_text == found.recipe_text
    for own, other in zip(again.losses, found.losses, strict=True):
        assert own == pytest.approx(other, rel=1e-3)
