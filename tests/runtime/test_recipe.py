"""Recipes: llm-compressor's dialect, what each module is assigned, and errors that say where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from runtime.errors import RecipeError
from runtime.formats.presets import scheme_from_preset
from runtime.recipe import yaml
from runtime.recipe.modifiers import GptqOptions
from runtime.recipe.recipe import Assignment, Recipe

LINEARS = {
    "model.layers.0.self_attn.q_proj": "Linear",
    "model.layers.0.mlp.down_proj": "Linear",
    "model.layers.1.self_attn.q_proj": "Linear",
    "model.layers.1.mlp.down_proj": "Linear",
    "lm_head": "Linear",
}
DECODER = tuple(LINEARS)[:-1]


def read(text: str) -> Recipe:
    return Recipe.from_text(text, "recipe.yaml")


def summary(recipe: Recipe) -> dict[str, tuple[str, int, int]]:
    """What each module is assigned: algorithm, bits, group."""
    assigned = recipe.assign(LINEARS)
    return {name: (a.algorithm, a.scheme.weights.num_bits, a.group) for name, a in assigned.items()}


ONE_LINE = "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head], dampening_frac: 0.02}"
STAGED = """
quant_stage:
  quant_modifiers:
    GPTQModifier:
      targets: [Linear]
      scheme: w4a16
      ignore: ["lm_head"]
      dampening_frac: 0.02
"""
DEFAULT_STAGE = """
DEFAULT_stage:
  run_type: oneshot
  DEFAULT_modifiers:
    GPTQModifier:
      targets: Linear
      scheme: {W4A16: [Linear]}
      ignore: lm_head
      dampening_frac: 2e-2
      block_size: 128
      actorder: static
      batched_quantization: auto
      bypass_divisibility_checks: false
      requires_calibration_data: true
      kv_cache_scheme: null
      weight_observer: minmax
"""
CONFIG_GROUPS = """
quant_stage:
  quant_modifiers:
    GPTQModifier:
      ignore: [lm_head]
      dampening_frac: 0.02
      config_groups:
        group_0:
          targets: ["Linear"]
          input_activations: null
          output_activations: null
          weights:
            num_bits: 4
            type: "int"
            symmetric: true
            strategy: group
            group_size: 128
"""
ANCHORED = """
defaults_stage:
  first_modifiers:
    GPTQModifier:
      <<: {scheme: {W8A16: nothing}, ignore: [lm_head]}
      scheme: {<<: {W4A16: nothing}, W4A16: Linear}
      dampening_frac: 0.02
"""
JSON = (
    '{"a_stage": {"b_modifiers": {"GPTQModifier": {"scheme": "W4A16", "ignore": ["lm_head"], "dampening_frac": 0.02}}}}'
)


@pytest.mark.parametrize("text", [ONE_LINE, STAGED, DEFAULT_STAGE, CONFIG_GROUPS, ANCHORED, JSON])
def test_all_forms_say_the_same(text: str) -> None:
    scheme = scheme_from_preset("W4A16", ["Linear"])
    scheme.weights.actorder = "static"
    expected = Assignment(
        scheme=scheme,
        algorithm="gptq",
        options=GptqOptions(dampening_frac=0.02, block_size=128, actorder="static"),
        group=0,
    )
    assigned = read(text).assign(LINEARS)
    assert tuple(assigned) == DECODER
    for assignment in assigned.values():
        assert assignment.options == expected.options
        assert assignment.algorithm == "gptq"
        assert assignment.group == 0
        assert assignment.scheme.model_dump(mode="json") == expected.scheme.model_dump(mode="json")


def test_reads_a_file_and_keeps_its_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(ONE_LINE)
    recipe = Recipe.from_file(path)
    assert recipe.source == str(path)
    assert recipe.text == ONE_LINE
    assert recipe.modifiers == read(ONE_LINE).modifiers
    assert [modifier.line for modifier in recipe.modifiers] == [1]


def test_round_to_nearest_has_no_options() -> None:
    recipe = read("QuantizationModifier: {scheme: FP8_dynamic, ignore: ['re:.*lm_head']}")
    assert summary(recipe) == dict.fromkeys(DECODER, ("rtn", 8, 0))
    assert [group.options for group in recipe.groups] == [None]
    assert recipe.groups[0].scheme.input_activations.dynamic is True


@pytest.mark.parametrize(
    ("options", "actorder"),
    [
        ("", "static"),
        ("actorder: static", "static"),
        ("actorder: weight", "weight"),
        ("actorder: null", None),
    ],
)
def test_the_order_of_columns_is_noted_in_the_scheme(options: str, actorder: str | None) -> None:
    group = read(f"GPTQModifier: {{scheme: W4A16, {options}}}").groups[0]
    assert group.options == GptqOptions(dampening_frac=0.01, block_size=128, actorder=actorder)
    assert group.scheme.weights.actorder == actorder


WEIGHTS = "num_bits: 3, type: int, symmetric: false, strategy: group, group_size: 64"


def test_the_order_may_stand_in_the_scheme() -> None:
    text = f"GPTQModifier: {{config_groups: {{g: {{targets: Linear, weights: {{{WEIGHTS}, actorder: weight}}}}}}}}"
    recipe = read(text)
    assert recipe.groups[0].options == GptqOptions(dampening_frac=0.01, block_size=128, actorder="weight")
    weights = recipe.groups[0].scheme.weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (3, 64, False)
    assert recipe.groups[0].scheme.format == "pack-quantized"


def test_names_go_before_classes_and_groups_are_numbered_over_modifiers() -> None:
    recipe = read("""
a_stage:
  rtn_modifiers:
    QuantizationModifier:
      scheme: {W8A8: ["re:.*layers.1.mlp"], W4A16: [lm_head]}
b_stage:
  gptq_modifiers:
    GPTQModifier:
      targets: Linear
      scheme: W4A16_ASYM
      ignore: ["re:.*layers[.]1[.]mlp", lm_head]
""")
    assert summary(recipe) == {
        "model.layers.0.self_attn.q_proj": ("gptq", 4, 2),
        "model.layers.0.mlp.down_proj": ("gptq", 4, 2),
        "model.layers.1.self_attn.q_proj": ("gptq", 4, 2),
        "model.layers.1.mlp.down_proj": ("rtn", 8, 0),
        "lm_head": ("rtn", 4, 1),
    }
    assert [group.targets[0].line for group in recipe.groups] == [5, 5, 9]


def test_a_class_stands_for_those_derived_from_it() -> None:
    class Special(torch.nn.Linear):
        pass

    recipe = read("QuantizationModifier: {scheme: W8A16, ignore: [Special]}")
    assert list(recipe.assign({"a": Special, "b": torch.nn.Linear})) == ["b"]
    recipe = read("QuantizationModifier: {scheme: W8A16}")
    assert list(recipe.assign({"a": Special, "b": torch.nn.Linear})) == ["a", "b"]


def test_sequential_targets_are_kept() -> None:
    recipe = read("""
a_stage:
  x_modifiers:
    QuantizationModifier: {scheme: {W8A8: lm_head}, sequential_targets: [B, A]}
    GPTQModifier: {scheme: W4A16, ignore: [lm_head], sequential_targets: A}
""")
    assert recipe.sequential_targets == ("B", "A")
    assert [modifier.sequential_targets for modifier in recipe.modifiers] == [("B", "A"), ("A",)]


def smooth(field: str) -> str:
    return f"# a comment\nSmoothQuantModifier:\n  {field}\nGPTQModifier: {{scheme: W8A8}}\n"


def gptq(fields: str) -> str:
    return f"# a comment\nGPTQModifier:\n  scheme: W4A16\n  {fields}\n"


GROUP = "QuantizationModifier:\n  config_groups:\n    g:\n      targets: Linear\n      "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # not a recipe
        ("", "recipe.yaml: the file is empty"),
        ("# nothing\n", "recipe.yaml: the file is empty"),
        ("- a\n", "recipe.yaml:1: the file must be a mapping, not a list"),
        ("W4A16", "recipe.yaml:1: the file must be a mapping, not 'W4A16'"),
        ("{}", "recipe.yaml:1: the recipe has no modifier"),
        ("a_stage: {}", "recipe.yaml:1: the recipe has no modifier"),
        ("a: b: c", "recipe.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("\na: [1,\nb: }", "recipe.yaml:3: not valid YAML: "),
        ("a: 1\n---\nb: 2", "recipe.yaml:2: not valid YAML: but found another document"),
        ("GPTQModifier: !!python/object:os.system {}", "recipe.yaml:1: "),
        ("1: {}", "recipe.yaml:1: a key must be a string, not 1"),
        # stages and modifiers
        ("quant_stge: {}", "recipe.yaml:1: 'quant_stge' is not supported (did you mean *_stage?)"),
        ("a_stage:\n  b_modifier: {}", "recipe.yaml:2: 'b_modifier' is not supported (did you mean *_modifiers?)"),
        ("a_stage:\n  run_type: train", "recipe.yaml:2: run_type must be oneshot, not 'train'"),
        ("args: {a: 1}", "recipe.yaml:1: args are not supported (write the values"),
        ("GPTQModfier: {}", "recipe.yaml:1: 'GPTQModfier' is not supported (did you mean GPTQModifier?)"),
        (
            "a_stage:\n b_modifiers:\n  GPTQ: {}",
            "recipe.yaml:3: 'GPTQ' is not supported (did you mean GPTQModifier?)",
        ),
        (
            "a_stage:\n b_modifiers:\n  SparseGPTModifier: {}",
            "recipe.yaml:3: 'SparseGPTModifier' is not supported (supported: Quant",
        ),
        ("\nSmoothQuantModifier: {}", "recipe.yaml:2: SmoothQuantModifier rescales weights, but no modifier quantizes"),
        ("GPTQModifier: {scheme: W4A16}\nAWQModifier: {}", "AWQModifier comes after GPTQModifier"),
        (smooth("smoothing_strength: 2"), "recipe.yaml:3: smoothing_strength must be a number from 0 to 1, not 2"),
        (smooth("algorithm: log_equalization"), "recipe.yaml:3: algorithm 'log_equalization' is not supported: log"),
        (
            smooth("num_calibration_steps: 8"),
            "recipe.yaml:3: num_calibration_steps 8 is not supported: all data is used",
        ),
        (smooth("scheme: W8A8"), "recipe.yaml:3: unknown key 'scheme' of SmoothQuantModifier"),
        (smooth("mappings: [[a]]"), "recipe.yaml:3: a mapping is a list of balance_layers and smooth_layer, or a"),
        (smooth("mappings: [{smooth_layer: a}]"), "recipe.yaml:3: an element of mappings has no balance_layers"),
        (smooth("mappings: [{smooth_layer: 're:(', balance_layers: b}]"), "'re:(' is not a valid regular expression"),
        ("AWQModifier: {duo_scaling: 1}", "recipe.yaml:1: duo_scaling must be true, false or both, not 1"),
        ("AWQModifier: {clip: 1}", "recipe.yaml:1: clip must be true or false, not 1"),
        ("AWQModifier: {n_grid: 0}", "recipe.yaml:1: n_grid must be a positive integer, not 0"),
        (
            "AWQModifier: {offload_device: cuda}",
            "recipe.yaml:1: offload_device 'cuda' is not supported: nothing is cached",
        ),
        (gptq("fallback: awq"), "recipe.yaml:4: fallback must be rtn, all_tokens or null, not 'awq'"),
        (gptq("refine: -1"), "recipe.yaml:4: refine must be an integer of at least 0, not -1"),
        (gptq("min_tokens: many"), "recipe.yaml:4: min_tokens must be an integer of at least 0, not 'many'"),
        ("\nGPTQModifier:", "recipe.yaml:2: GPTQModifier must be a mapping, not None"),
        # fields
        (
            gptq("dampning_frac: 0.1"),
            "recipe.yaml:4: unknown key 'dampning_frac' of GPTQModifier (did you mean dampening_frac?)",
        ),
        (
            "QuantizationModifier: {scheme: W4A16, block_size: 1}",
            "recipe.yaml:1: unknown key 'block_size' of QuantizationModifier",
        ),
        (gptq("scheme: W8A16"), "recipe.yaml:4: 'scheme' is repeated, first on line 3"),
        (
            gptq("dampening_frac: high"),
            "recipe.yaml:4: dampening_frac must be a number above 0 and at most 1, not 'high'",
        ),
        (gptq("dampening_frac: 0"), "recipe.yaml:4: dampening_frac must be a number above 0 and at most 1, not 0"),
        (gptq("dampening_frac: .nan"), "recipe.yaml:4: dampening_frac must be a number above 0 and at most 1, not nan"),
        (
            gptq("dampening_frac: true"),
            "recipe.yaml:4: dampening_frac must be a number above 0 and at most 1, not True",
        ),
        (gptq("block_size: 12.5"), "recipe.yaml:4: block_size must be a positive integer, not 12.5"),
        (gptq("block_size: -1"), "recipe.yaml:4: block_size must be a positive integer, not -1"),
        (gptq("actorder: group"), "recipe.yaml:4: actorder must be static, weight or null, not 'group'"),
        (gptq("actorder: true"), "recipe.yaml:4: actorder must be static, weight or null, not True"),
        (gptq("targets: 3"), "recipe.yaml:4: targets must be a string, not 3"),
        (gptq("targets: [Linear, 3]"), "recipe.yaml:4: an element of targets must be a string, not 3"),
        (gptq("targets: []"), "recipe.yaml:4: targets must name at least one module"),
        (gptq("targets: {a: b}"), "recipe.yaml:4: targets must be a string, not {'a': 'b'}"),
        (
            gptq("targets: 're:*'"),
            "recipe.yaml:4: 're:*' is not a valid regular expression: nothing to repeat at position 0",
        ),
        (gptq("ignore:\n  - lm_head\n  - 're:('"), "recipe.yaml:6: 're:(' is not a valid regular expression"),
        (gptq("ignore: ['']"), "recipe.yaml:4: an element of ignore is an empty pattern"),
        # YAML
        (
            "GPTQModifier: !!set {a, b}",
            "recipe.yaml:1: the tag 'tag:yaml.org,2002:set' of GPTQModifier is not supported",
        ),
        ("GPTQModifier: {<<: 3}", "recipe.yaml:1: not valid YAML: << takes a mapping or a list of mappings"),
        ("GPTQModifier: {<<: {}, <<: {}}", "recipe.yaml:1: '<<' is repeated, first on line 1"),
        ('GPTQModifier: {"<<": {scheme: W4A16}}', "recipe.yaml:1: unknown key '<<' of GPTQModifier"),
        ('a_stage:\n  b_modifiers:\n    "x\\0": {}', "recipe.yaml:3: 'x\\x00' is not supported"),
        ("a_stage: [1]", "recipe.yaml:1: a_stage must be a mapping, not [1]"),
        (gptq("ignore: 2001-13-01"), "recipe.yaml:4: ignore cannot be read: month must be in 1..12"),
        # several problems: the first line
        (gptq("refine: -1\n  block_size: -1\n  start: 1"), "recipe.yaml:4: refine must be"),
        # fields of llm-compressor that are not implemented
        (
            gptq("kv_cache_scheme: {num_bits: 8}"),
            "recipe.yaml:4: a key-value cache of 8 bit int by tensor (symmetric=True, dynamic=False) is not supported",
        ),
        (
            gptq("weight_observer: best"),
            "recipe.yaml:4: the observer 'best' is not supported (supported: minmax",
        ),
        (gptq("observer: {weight: MSE}"), "recipe.yaml:4: unknown key 'weight' of observer (did you mean weights?)"),
        (gptq("observer: {output: minmax}"), "recipe.yaml:4: output 'minmax' is not supported: outputs are not"),
        (gptq("output_observer: minmax"), "recipe.yaml:4: output_observer 'minmax' is not supported: outputs are not"),
        (
            gptq("bypass_divisibility_checks: true"),
            "recipe.yaml:4: bypass_divisibility_checks True is not supported: a",
        ),
        (gptq("bypass_divisibility_checks: 0"), "recipe.yaml:4: bypass_divisibility_checks 0 is not supported: a"),
        (
            gptq("batched_quantization: 0"),
            "recipe.yaml:4: batched_quantization must be a positive integer, auto or null, not 0",
        ),
        (gptq("start: 0.0"), "recipe.yaml:4: start 0.0 is not supported: schedules belong to training"),
        (
            gptq("initialized_: true"),
            "recipe.yaml:4: initialized_ True is not supported: it is the state of a modifier",
        ),
        # schemes
        ("GPTQModifier: {ignore: [a]}", "recipe.yaml:1: GPTQModifier has neither scheme nor config_groups (give one"),
        (
            gptq("config_groups: {g: {targets: Linear}}"),
            "recipe.yaml:2: GPTQModifier has both scheme and config_groups",
        ),
        (
            "\nGPTQModifier:\n  scheme: W4A61",
            "recipe.yaml:3: unknown scheme 'W4A61' (did you mean W4A16? supported:",
        ),
        ("\nGPTQModifier:\n  scheme: UNQUANTIZED", "recipe.yaml:3: the scheme UNQUANTIZED is not supported"),
        ("\nGPTQModifier:\n  scheme:\n    FP: Linear", "recipe.yaml:4: unknown scheme 'FP' (did you mean FP8?"),
        (
            "\nGPTQModifier:\n  scheme: 4",
            "recipe.yaml:3: scheme must be a preset or a mapping of presets to targets, not 4",
        ),
        ("\nGPTQModifier:\n  scheme: {}", "recipe.yaml:3: scheme is empty"),
        (
            "GPTQModifier:\n  scheme: {W4A16: a}\n  targets: b",
            "recipe.yaml:3: targets are already stated in scheme (remove them here)",
        ),
        ("QuantizationModifier:\n  config_groups:\n    g: {weights: {}}", "recipe.yaml:3: g has no targets"),
        (GROUP + "wieghts: {}", "recipe.yaml:5: unknown key 'wieghts' of g (did you mean weights?)"),
        (GROUP + "weights: 4", "recipe.yaml:5: weights must be a mapping, not 4"),
        (
            GROUP + "weights: {}\n      output_activations: {}",
            "recipe.yaml:6: output_activations {} is not supported: outputs are not quantized",
        ),
        (
            GROUP + "weights:\n        numbits: 4",
            "recipe.yaml:6: unknown key 'numbits' of weights (did you mean num_bits?)",
        ),
        (GROUP + "weights:\n        num_bits: '4'", "recipe.yaml:6: num_bits must be an integer, not '4'"),
        (GROUP + "weights:\n        symmetric: 1", "recipe.yaml:6: symmetric must be true or false, not 1"),
        (
            GROUP + "weights:\n        num_bits: 4\n        strategy: grop",
            "recipe.yaml:7: strategy must be tensor, channel, group, ",
        ),
        (GROUP + "weights:\n        num_bits: 4\n        strategy: group", "recipe.yaml:5: weights: strategy"),
        (
            GROUP + "weights:\n        num_bits: 4\n        actorder: group",
            "recipe.yaml:7: actorder: actorder='group' has been removed",
        ),
        (GROUP + "weights:\n        num_bits: 5\n        type: float", "recipe.yaml:"),
        (
            GROUP + "weights: {num_bits: 8}\n      output_activations: {num_bits: 8}",
            "recipe.yaml:6: output_activations {'num_bits': 8} is not supported",
        ),
        (
            GROUP + "weights: {num_bits: 4, group_size: 32}\n      format: tar",
            "recipe.yaml:6: format must be 'dense', ",
        ),
        (
            f"GPTQModifier:\n  config_groups:\n    g: {{targets: Linear, weights: {{{WEIGHTS}, actorder: static}}}}\n"
            "  actorder: null",
            "recipe.yaml:4: actorder null contradicts 'static' in g",
        ),
    ],
)
def test_errors_say_where_and_what(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(text)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing\.yaml' cannot be read: .*No such file"):
        Recipe.from_file(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(RecipeError, match=r"binary\.yaml' cannot be read: "):
        Recipe.from_file(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "GPTQModifier:\n  scheme: W4A16\n  targets:\n    - Linear\n    - Conv1D\n",
            "recipe.yaml:5: the target 'Conv1D' matches no module (the model has model.layers.0.self_attn.q_proj, "
            "model.layers.0.mlp.down_proj, model.layers.1.self_attn.q_proj and 2 more)",
        ),
        ("GPTQModifier: {scheme: W4A16, targets: 're:q_proj'}", "recipe.yaml:1: the target 're:q_proj' matches no"),
        ("GPTQModifier: {scheme: W4A16, ignore: [Linear]}", "recipe.yaml: the recipe ignores every module"),
        (
            "QuantizationModifier:\n  scheme: W8A8\n  targets: 're:.*mlp'\nGPTQModifier:\n  scheme: W4A16\n",
            "recipe.yaml:4: GPTQModifier and the QuantizationModifier on line 1 both match model.layers.0.mlp.down_proj"
            " (add it to ignore in one of them)",
        ),
        (
            "GPTQModifier:\n  scheme:\n    W4A16: 're:.*mlp'\n    W8A16: 're:.*down'\n",
            "recipe.yaml:4: this group and the one on line 3 both match model.layers.0.mlp.down_proj",
        ),
        (
            "GPTQModifier:\n  scheme: W4A16\n  ignore: ['re:.*mlp']\nQuantizationModifier:\n  scheme: W8A8\n"
            "  ignore: ['re:.*attn', lm_head]\n",
            "recipe.yaml:4: this group and the one on line 1 both match model.layers.0.self_attn.q_proj",
        ),
        (
            "GPTQModifier:\n  scheme: W4A16\n  targets: 're:.*mlp'\n  ignore: ['re:.*0.mlp']\nQuantizationModifier:\n"
            "  scheme: W8A8\n  ignore: ['re:.*attn', lm_head, 're:.*1.mlp']\n",
            "recipe.yaml:5: readers of the checkpoint would assign model.layers.0.mlp.down_proj to the group on line 3",
        ),
    ],
)
def test_assignments_that_cannot_be(text: str, message: str) -> None:
    recipe = read(text)
    with pytest.raises(RecipeError) as caught:
        recipe.assign(LINEARS)
    assert message in str(caught.value)


def test_an_ignore_pattern_without_match_is_fine() -> None:
    assert summary(read("QuantizationModifier: {scheme: W8A16, ignore: [lm_head, nothing]}")) == dict.fromkeys(
        DECODER, ("rtn", 8, 0)
    )


def test_importing_loads_no_large_library() -> None:
    code = "import sys, runtime.recipe.recipe; print({'torch', 'compressed_tensors', 'pydantic'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "set()\n"


BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(9))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 10)}]}}\n" for n in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "recipe.yaml:.: the file has more than 1000 values, with aliases expanded"),
        (MERGE_BOMB, "recipe.yaml:.: the file has more than 1000 values, with aliases expanded"),
        ("a:\n" + "- 1\n" * 1000, "recipe.yaml:.*: the file has more than 1000 values"),
        ("a: &a [*a]", "recipe.yaml: not valid YAML: it is nested too deeply"),
        ("a: &a {<<: *a}", "recipe.yaml: not valid YAML: it is nested too deeply"),
        ("a: " + "[" * 2000 + "]" * 2000, "recipe.yaml: not valid YAML: it is nested too deeply"),
    ],
)
def test_a_file_cannot_stand_for_more_than_is_allowed(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml, "MAX_VALUES", 1000)
    with pytest.raises(RecipeError, match=f"^{message}"):
        read(text)


def test_each_use_of_an_alias_has_its_own_line() -> None:
    with pytest.raises(RecipeError, match=r"^recipe.yaml:4: 're:\(' is not a valid"):
        read("GPTQModifier:\n  scheme: &s\n    're:('\n  ignore: *s\n")


def test_null_lists_are_empty() -> None:
    (modifier,) = read("GPTQModifier: {scheme: W4A16, ignore: null, sequential_targets: null}").modifiers
    assert (modifier.ignore, modifier.sequential_targets) == ((), ())


def test_modifiers_are_frozen() -> None:
    (modifier,) = read(ONE_LINE).modifiers
    with pytest.raises(ValidationError, match="Instance is frozen"):
        modifier.min_tokens = 3


def test_rescaling_comes_before_rounding_in_the_file_s_order() -> None:
    recipe = read("""
quant_stage:
  quant_modifiers:
    SmoothQuantModifier: {smoothing_strength: 8e-1, ignore: ['re:.*mlp']}
    AWQModifier:
      duo_scaling: both
      n_grid: 10
      mappings: [{smooth_layer: a, balance_layers: [b, 're:c']}]
    GPTQModifier: {scheme: W8A8, min_tokens: 100, fallback: rtn, refine: 2, batched_quantization: 4}
""")
    smoothing, scaling = recipe.transforms
    assert (smoothing.algorithm, smoothing.smoothing_strength, smoothing.ignore) == ("smoothquant", 0.8, ("re:.*mlp",))
    assert (scaling.algorithm, scaling.duo_scaling, scaling.n_grid) == ("awq", "both", 10)
    (mapping,) = scaling.mappings
    assert (mapping.smooth_layer, mapping.balance_layers, mapping.line) == ("a", ("b", "re:c"), 8)
    (modifier,) = recipe.modifiers
    assert (modifier.min_tokens, modifier.groups[0].options) == (
        100,
        GptqOptions(dampening_frac=0.01, block_size=128, actorder="static", fallback="rtn", refine=2),
    )


def test_the_older_awq_modifier_rounds_too() -> None:
    recipe = read("AWQModifier: {scheme: W4A16_ASYM, targets: Linear, ignore: [lm_head], n_grid: 4}")
    assert [transform.n_grid for transform in recipe.transforms] == [4]
    assert [(modifier.algorithm, modifier.ignore) for modifier in recipe.modifiers] == [("rtn", ("lm_head",))]


def test_observers_are_the_modifier_s_or_the_scheme_s() -> None:
    recipe = read("GPTQModifier: {scheme: FP8, observer: {weights: MSE, input: minmax}}")
    scheme = recipe.groups[0].scheme
    assert (scheme.weights.observer, scheme.input_activations.observer) == ("mse", "minmax")
    plain = read("GPTQModifier: {scheme: FP8}").groups[0].scheme
    assert plain.input_activations.observer == "static_minmax"


def test_the_key_value_cache_has_a_scheme_of_its_own() -> None:
    text = "QuantizationModifier: {scheme: FP8, kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor}}"
    assert read(text).cache is not None
    assert read("QuantizationModifier: {scheme: FP8}").cache is None


def test_awq_searches_ranges_for_what_is_rounded_to_nearest_by_min_max_alone() -> None:
    def clips(*modifiers: str) -> bool:
        return next(iter(read("\n".join(modifiers)).assign({"a": "Linear"}).values())).clip

    assert clips("AWQModifier: {}", "QuantizationModifier: {scheme: W4A16}")
    assert not clips("AWQModifier: {clip: false}", "QuantizationModifier: {scheme: W4A16}")
    assert not clips("AWQModifier: {}", "QuantizationModifier: {scheme: W4A16, weight_observer: mse}")
    assert not clips("AWQModifier: {}", "GPTQModifier: {scheme: W4A16}")
    assert not clips("SmoothQuantModifier: {}", "QuantizationModifier: {scheme: W4A16}")
