"""AWQ and SmoothQuant in a run: what is rescaled, that the model stays the same, and what recipes may name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from runtime.algorithms.awq import ScaleSearch, search_scales
from runtime.artifact.manifest import ScaleGroup
from runtime.quantize import smoothing
from runtime.quantize.smoothing import Rescaled
from runtime.recipe.recipe import Recipe
from seqbuild.build import build
from tests.runtime.small import (
    NARROW_W4,
    WIDTHS,
    Small,
    calibrate,
    directory_bytes,
    read_tensors,
    run_transformers,
    run_weights,
    token_batches,
)

SCHEME = "targets: Linear, scheme: W4A16, ignore: [lm_head]"
SMOOTH = "SmoothQuantModifier: {smoothing_strength: 0.8}\n"
SIBLINGS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def plan(*modifiers: str) -> Recipe:
    return Recipe.from_text("\n".join(modifiers), "recipe.yaml")


def loss(small: Small, out: Path) -> float:
    """How far the logits of a checkpoint are from the original's."""
    inputs = token_batches([(2, 31)], seed=7)[0]
    got, expected = (run_weights(small, path, inputs)["logits"].float() for path in (out, small.weights))
    return float((got - expected).square().mean())


@pytest.mark.parametrize("is_quick", [True, False])
def test_candidates_race_in_bf16_where_it_is_fast(
    is_quick: bool, llama: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    races: list[torch.dtype] = []

    def search(*args: Any, race_dtype: torch.dtype, **options: Any) -> ScaleSearch:
        races.append(race_dtype)
        return search_scales(*args, race_dtype=race_dtype, **options)

    monkeypatch.setattr(smoothing, "has_quick_bfloat16", lambda: is_quick)
    monkeypatch.setattr(smoothing, "search_scales", search)
    calibrate(llama, plan("AWQModifier: {}", f"QuantizationModifier: {{{SCHEME}}}"), tmp_path / "out")
    assert races
    assert set(races) == {torch.bfloat16 if is_quick else torch.float32}


@pytest.mark.parametrize(
    "modifiers",
    [
        (SMOOTH, "GPTQModifier: {targets: Linear, scheme: W8A8, ignore: [lm_head]}"),
        ("AWQModifier: {}", f"QuantizationModifier: {{{SCHEME}}}"),
        ("AWQModifier: {duo_scaling: both}", f"GPTQModifier: {{{SCHEME}}}"),
        (SMOOTH, "AWQModifier: {n_grid: 5}", f"GPTQModifier: {{{SCHEME}}}"),
        (f"AWQModifier: {{{SCHEME}}}",),
    ],
)
def test_transformers_loads_what_was_rescaled(llama: Small, tmp_path: Path, modifiers: tuple[str, ...]) -> None:
    done = calibrate(llama, plan(*modifiers), tmp_path / "out")
    before, after = read_tensors(llama.weights), read_tensors(tmp_path / "out")
    for name, tensor in before.items():
        if name.endswith(NORMS):
            assert not torch.equal(after[name], tensor), name
        elif "norm" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(after[name], tensor), name
    inputs = token_batches([(2, 17)], seed=5)[0]
    assert torch.equal(
        run_weights(llama, tmp_path / "out", inputs)["logits"], run_transformers(tmp_path / "out", inputs)
    )
    assert all(report.num_tokens == 366 for report in done.modules)


def test_rescaling_alone_changes_nothing_but_rounding(llama: Small, tmp_path: Path) -> None:
    """With eight bits by group what is left of the difference is that of rounding."""
    weights = "{num_bits: 8, type: int, group_size: 32}"
    fine = f"config_groups: {{a: {{targets: [Linear], weights: {weights}}}}}, ignore: [lm_head]"
    calibrate(llama, plan(SMOOTH, f"QuantizationModifier: {{{fine}}}"), tmp_path / "smooth")
    calibrate(llama, plan(f"QuantizationModifier: {{{fine}}}"), tmp_path / "plain")
    assert loss(llama, tmp_path / "smooth") < 4 * loss(llama, tmp_path / "plain")


def test_the_same_seed_gives_the_same_bytes(llama: Small, tmp_path: Path) -> None:
    modifiers = ("AWQModifier: {}", f"GPTQModifier: {{{SCHEME}, refine: 1}}")
    for name in ("one", "two"):
        calibrate(llama, plan(*modifiers), tmp_path / name)
    assert directory_bytes(tmp_path / "one") == directory_bytes(tmp_path / "two")


def test_named_mappings_equal_those_that_were_found(llama: Small, tmp_path: Path) -> None:
    named = """
AWQModifier:
  mappings:
    - {smooth_layer: 're:.*input_layernorm', balance_layers: ['re:.*q_proj', 're:.*k_proj', 're:.*v_proj']}
    - {smooth_layer: 're:.*v_proj', balance_layers: ['re:.*o_proj']}
    - [['re:.*gate_proj', 're:.*up_proj'], 're:.*post_attention_layernorm']
    - [['re:.*down_proj'], 're:.*up_proj']
"""
    rest = f"QuantizationModifier: {{{SCHEME}}}"
    calibrate(llama, plan(named, rest), tmp_path / "named")
    calibrate(llama, plan("AWQModifier: {}", rest), tmp_path / "found")
    one, two = read_tensors(tmp_path / "named"), read_tensors(tmp_path / "found")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_mapping_that_changes_the_model_is_refused(llama: Small, tmp_path: Path) -> None:
    wrong = "SmoothQuantModifier: {mappings: [[['re:.*k_proj'], 're:.*q_proj']]}"
    with pytest.raises(runtime.RecipeError, match=r"recipe.yaml:1: the mapping of .* changes the model's output"):
        calibrate(llama, plan(wrong, f"QuantizationModifier: {{{SCHEME}}}"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("[['re:.*nothing'], 're:.*input_layernorm']", "matches no modules"),
        ("[['re:.*down_proj'], 're:.*input_layernorm']", "has 128 output channels, but .* have 256"),
    ],
)
def test_mappings_that_fit_nothing_are_refused(llama: Small, tmp_path: Path, mapping: str, message: str) -> None:
    text = f"SmoothQuantModifier: {{mappings: [{mapping}]}}"
    with pytest.raises(runtime.RecipeError, match=message):
        calibrate(llama, plan(text, f"QuantizationModifier: {{{SCHEME}}}"), tmp_path / "out")


def test_ignored_groups_stay_as_they_are(llama: Small, tmp_path: Path) -> None:
    modifier = "SmoothQuantModifier: {ignore: ['re:.*mlp']}"
    calibrate(llama, plan(modifier, f"QuantizationModifier: {{{SCHEME}}}"), tmp_path / "out")
    before, after = read_tensors(llama.weights), read_tensors(tmp_path / "out")
    for name, tensor in before.items():
        if name.endswith(NORMS):
            assert torch.equal(after[name], tensor) is name.endswith(NORMS[1])


@pytest.mark.parametrize(
    "ignored", ["'re:.*v_proj'", "'re:.*v_proj', 're:.*up_proj'", "'re:.*q_proj', 're:.*down_proj'"]
)
def test_modules_that_are_not_quantized_are_rescaled_with_their_siblings(
    llama: Small, tmp_path: Path, ignored: str
) -> None:
    """An AWQModifier's scheme leaves them as they are, and not its factors: these belong to all that read the norm."""
    one = f"AWQModifier: {{{SCHEME.replace('lm_head', f'lm_head, {ignored}')}}}"
    done = calibrate(llama, plan(one), tmp_path / "out")
    assert not [remark for remark in done.remarks if "rescale" in remark or "leaves" in remark]
    before, after = read_tensors(llama.weights), read_tensors(tmp_path / "out")
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        for norm, together in zip(NORMS, SIBLINGS, strict=True):
            factor = before[f"{prefix}.{norm}"] / after[f"{prefix}.{norm}"]
            assert not torch.equal(factor, torch.ones_like(factor))
            for name in together:
                key = f"{prefix}.{name}.weight"
                if key in after and not name.endswith(("v_proj", "up_proj")):
                    torch.testing.assert_close(after[key], before[key] * factor)
    assert loss(llama, tmp_path / "out") < loss_without(llama, tmp_path, ignored) * 2


def loss_without(small: Small, root: Path, ignored: str) -> float:
    """The loss of round-to-nearest of the same modules."""
    calibrate(
        small, plan(f"QuantizationModifier: {{{SCHEME.replace('lm_head', f'lm_head, {ignored}')}}}"), root / "plain"
    )
    return loss(small, root / "plain")


def test_why_nothing_is_rescaled_is_said(llama: Small, tmp_path: Path) -> None:
    rounding = f"QuantizationModifier: {{{SCHEME}}}"
    with pytest.raises(runtime.RecipeError, match="its ignore matches every group") as caught:
        calibrate(llama, plan("AWQModifier: {ignore: ['re:.*']}", rounding), tmp_path / "out")
    assert caught.value.hint is not None
    assert "--leaves" not in caught.value.hint
    shallow = Small(weights=llama.weights, artifact=build(llama.weights, out=tmp_path / "a", leaves="target").path)
    with pytest.raises(runtime.RecipeError, match="compiled with --leaves target") as caught:
        calibrate(shallow, plan("AWQModifier: {}", rounding), tmp_path / "out")
    assert caught.value.hint is not None
    assert "--leaves linear" in caught.value.hint


def test_siblings_are_known_by_name_where_the_artifact_does_not_say(llama: Small, tmp_path: Path) -> None:
    shallow = Small(weights=llama.weights, artifact=build(llama.weights, out=tmp_path / "a", leaves="target").path)
    recipe = plan("QuantizationModifier: {targets: Linear, scheme: NVFP4A16, ignore: [lm_head]}")
    done = calibrate(shallow, recipe, tmp_path / "o")
    assert [remark for remark in done.remarks if "fuse by name (q_proj/k_proj/v_proj" in remark]
    tensors = read_tensors(tmp_path / "o")
    for together in SIBLINGS:
        found = {float(tensors[f"model.layers.1.{name}.weight_global_scale"]) for name in together}
        assert len(found) == 1


def test_padding_and_masked_tokens_change_nothing(narrow_llama: Small, tmp_path: Path) -> None:
    batch = token_batches([(3, 24)])[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 18:] = 0
    other = batch["input_ids"].clone()
    other[1, 18:] = 5
    recipe = plan("AWQModifier: {}", f"GPTQModifier: {{{NARROW_W4}}}")
    for name, ids in (("one", batch["input_ids"]), ("two", other)):
        batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "loss_mask": mask}]
        done = calibrate(narrow_llama, recipe, tmp_path / name, batches=batches)
        assert {report.num_tokens for report in done.modules} == {66}
    # Causal attention: what comes later does not reach the tokens that count.
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [((3, 24), 0, "no token counts"), ((2, 5), 1, r"batch 0: loss_mask has the shape \[2, 5\] for")],
)
def test_masks_that_leave_nothing_are_refused(
    narrow_llama: Small, tmp_path: Path, shape: tuple[int, int], value: int, message: str
) -> None:
    batch = {**token_batches([(3, 24)])[0], "loss_mask": torch.full(shape, value)}
    with pytest.raises(runtime.DataError, match=message):
        calibrate(narrow_llama, plan(f"GPTQModifier: {{{NARROW_W4}}}"), tmp_path / "out", batches=[batch])


def test_too_few_tokens_are_reported_and_can_be_an_error(narrow_llama: Small, tmp_path: Path) -> None:
    batches = token_batches([(1, 20)])
    done = calibrate(narrow_llama, plan(f"GPTQModifier: {{{NARROW_W4}}}"), tmp_path / "out", batches=batches)
    assert any("saw fewer tokens than input features (minimum 20)" in remark for remark in done.remarks)
    bounded = plan(f"GPTQModifier: {{{NARROW_W4}, min_tokens: 21}}")
    with pytest.raises(runtime.DataError, match=r"q_proj received 20 tokens, fewer than the recipe's min_tokens: 21"):
        calibrate(narrow_llama, bounded, tmp_path / "other", batches=batches)


@pytest.mark.parametrize(("modifier", "has_fallback"), [("GPTQModifier", True), ("AutoRoundModifier", False)])
def test_too_few_tokens_recommend_what_the_modifier_has(
    narrow_llama: Small, tmp_path: Path, modifier: str, has_fallback: bool
) -> None:
    bounded = plan(f"{modifier}: {{{NARROW_W4}, min_tokens: 21}}")
    with pytest.raises(runtime.DataError, match="min_tokens: 21") as caught:
        calibrate(narrow_llama, bounded, tmp_path / "out", batches=token_batches([(1, 20)]))
    assert ("set fallback: rtn" in str(caught.value)) == has_fallback


@pytest.fixture(scope="module")
def narrow_numbers(small: Callable[..., Small]) -> Small:
    """In bfloat16: readers dequantize small floats to that, and cannot run such layers in a float32 model."""
    return small("LlamaForCausalLM", "LlamaConfig", WIDTHS, dtype=torch.bfloat16)


@pytest.mark.parametrize("scheme", ["NVFP4", "NVFP4A16"])
def test_siblings_share_nvfp4_s_global_scale(narrow_numbers: Small, tmp_path: Path, scheme: str) -> None:
    recipe = plan(f"QuantizationModifier: {{targets: Linear, scheme: {scheme}, ignore: [lm_head]}}")
    calibrate(narrow_numbers, recipe, tmp_path / "o")
    tensors = read_tensors(tmp_path / "o")
    kinds = ["weight_global_scale", "input_global_scale"] if scheme == "NVFP4" else ["weight_global_scale"]
    for layer in range(3):
        for kind in kinds:
            for together in SIBLINGS:
                found = {float(tensors[f"model.layers.{layer}.{name}.{kind}"]) for name in together}
                assert len(found) == 1
    inputs = token_batches([(2, 17)], seed=5)[0]
    assert torch.equal(
        run_weights(narrow_numbers, tmp_path / "o", inputs)["logits"], run_transformers(tmp_path / "o", inputs)
    )


@pytest.mark.parametrize("scheme", ["FP8", "FP8_BLOCK", "MXFP4", "MXFP8", "W4A8"])
def test_other_schemes_in_a_whole_run(narrow_numbers: Small, tmp_path: Path, scheme: str) -> None:
    recipe = plan(f"QuantizationModifier: {{targets: Linear, scheme: {scheme}, ignore: [lm_head]}}")
    calibrate(narrow_numbers, recipe, tmp_path / "o")
    inputs = token_batches([(2, 17)], seed=5)[0]
    assert torch.equal(
        run_weights(narrow_numbers, tmp_path / "o", inputs)["logits"], run_transformers(tmp_path / "o", inputs)
    )


def test_a_fallback_is_used_only_when_asked_for_and_said(narrow_llama: Small, tmp_path: Path) -> None:
    batches = token_batches([(1, 8)])
    batches[0]["input_ids"][:] = 3

    def fail(*args: object, **kwargs: object) -> object:
        raise runtime.QuantizationError("the Hessian does not factor")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.quantize.solves.factor_hessian", fail)
        with pytest.raises(runtime.QuantizationError, match="does not factor"):
            calibrate(narrow_llama, plan(f"GPTQModifier: {{{NARROW_W4}}}"), tmp_path / "no", batches=batches)
        done = calibrate(
            narrow_llama, plan(f"GPTQModifier: {{{NARROW_W4}, fallback: rtn}}"), tmp_path / "yes", batches=batches
        )
    assert {(report.algorithm, report.fallback) for report in done.modules} == {("rtn", "the Hessian does not factor")}
    assert any("rounded to nearest: the Hessian does not factor" in remark for remark in done.remarks)


def test_rounded_norms_are_made_up_for() -> None:
    """What a norm loses by the checkpoint's dtype, the columns get."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"n.weight": torch.rand(8, generator=generator) + 0.5, "a.weight": torch.randn(4, 8, generator=generator)}
    jobs: dict[str, Any] = {"a": None}
    rescaled = Rescaled(read=tensors.__getitem__, stored_dtype=lambda name: torch.bfloat16, jobs=jobs)
    group = ScaleGroup(subgraph=0, modules=("a",), producer="n.weight", channels=(0, 8))
    used = rescaled.apply(group, torch.rand(8, generator=generator) + 0.5)
    product = rescaled.get("n.weight") * rescaled.get("a.weight")
    torch.testing.assert_close(product, tensors["n.weight"] * tensors["a.weight"], rtol=1e-6, atol=0)
    assert torch.equal(rescaled.tensors["n.weight"], rescaled.tensors["n.weight"].bfloat16().float())
    assert used.shape == (8,)


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "MXFP4"])
def test_widths_that_groups_do_not_divide_are_refused_before_anything_runs(
    narrow_llama: Small, tmp_path: Path, scheme: str
) -> None:
    recipe = plan(f"QuantizationModifier: {{targets: Linear, scheme: {scheme}, ignore: [lm_head]}}")
    with pytest.raises(runtime.RecipeError, match=r"input features, which is not a multiple of group_size (128|32)"):
        calibrate(narrow_llama, recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_scales_of_the_cache_are_those_of_rescaled_values(llama: Small, tmp_path: Path) -> None:
    """The value projection is not rounded here, so the checkpoint says what the cache of its first layer holds."""
    cache = "kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, dynamic: false, observer: static_minmax}"
    ignored = SCHEME.replace("lm_head", "lm_head, 're:.*v_proj'")
    calibrate(llama, plan("AWQModifier: {}", f"QuantizationModifier: {{{ignored}, {cache}}}"), tmp_path / "out")
    after = read_tensors(tmp_path / "out")
    largest = 0.0
    for batch in token_batches():
        states = after["model.embed_tokens.weight"][batch["input_ids"]]
        states = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)
        states = states * after["model.layers.0.input_layernorm.weight"]
        values = states @ after["model.layers.0.self_attn.v_proj.weight"].T
        largest = max(largest, float(values.abs().max()))
    assert float(after["model.layers.0.self_attn.v_scale"]) == pytest.approx(largest / 448, rel=1e-3)
