"""What `calibrate` says about readers that do not load what it is asked to make; tests/clients tries the readers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import runtime
from runtime.artifact.manifest import ScaleGroup
from runtime.formats.presets import scheme_from_preset
from runtime.quantize.fused_layers import mixed_layers
from runtime.quantize.reader_limits import (
    CACHE,
    DENSE,
    EXPERT,
    LIMITS,
    RENAMED_EXPERT,
    SEPARATE_EXPERT,
    UNQUANTIZED_EXPERT,
    reader_limits,
)
from runtime.recipe.recipe import Assignment
from tests.runtime.small import DEEPSEEK, EXPERTS, NARROW, Small, calibrate, recipe

_FOUR = "{num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 16}"
_EIGHT = "{num_bits: 8, type: int, symmetric: true, strategy: group, group_size: 16}"


STACKED = {UNQUANTIZED_EXPERT: ["mlp.experts.gate_up_proj"]}


def job(preset: str, group: int = 0) -> Assignment:
    return Assignment(scheme=scheme_from_preset(preset, ["Linear"]), algorithm="rtn", options=None, group=group)


def jobs_of(presets: Mapping[str, str]) -> dict[str, Assignment]:
    order = list(dict.fromkeys(presets.values()))
    return {name: job(preset, order.index(preset)) for name, preset in presets.items()}


class TestReaders:
    """One table, a pure function."""

    @staticmethod
    def told(preset: str, place: str, model_type: str = "any_model") -> str:
        return "\n".join(reader_limits(model_type, {"a.b": place}, {"a.b": job(preset)}))

    @pytest.mark.parametrize(
        "preset", ["W4A16", "W3A16", "W8A8", "W4A8", "FP8", "FP8_BLOCK", "NVFP4", "MXFP4", "MXFP8"]
    )
    def test_nothing_is_said_of_what_all_read(self, preset: str) -> None:
        assert not self.told(preset, DENSE)

    @pytest.mark.parametrize(
        ("preset", "place", "reader", "consequence"),
        [
            ("W4A16_ASYM", DENSE, "transformers 5.24", "dequantize=True"),
            ("W4A16_ASYM", EXPERT, "transformers 5.17 and 5.24", "does not load experts"),
            ("W8A8", EXPERT, "transformers 5.17 and 5.24", "does not load experts"),
            ("FP8_BLOCK", EXPERT, "transformers 5.17 and 5.24", "does not load experts"),
            ("MXFP8", EXPERT, "transformers 5.17 and 5.24", "does not load experts"),
            ("NVFP4", EXPERT, "transformers 5.17 and 5.24", "wrong numbers"),
            ("NVFP4A16", EXPERT, "transformers 5.17 and 5.24", "wrong numbers"),
            ("FP8_DYNAMIC", EXPERT, "transformers 5.17 and 5.24", "does not quantize the inputs"),
            ("MXFP4", EXPERT, "transformers 5.17 and 5.24", "does not quantize the inputs"),
            ("W4A16", RENAMED_EXPERT, "transformers 5.17 and 5.24", "at random"),
            ("W4A8", EXPERT, "vLLM 0.32", "does not load experts"),
            ("W4A8", SEPARATE_EXPERT, "vLLM 0.32", "does not load experts"),
        ],
    )
    def test_what_a_reader_does_not_load(self, preset: str, place: str, reader: str, consequence: str) -> None:
        lines = [line for line in self.told(preset, place).splitlines() if line.startswith(reader)]
        assert len(lines) == 1
        assert consequence in lines[0]
        assert lines[0].endswith(": a.b")

    def test_vllm_does_not_load_gpt_oss_experts_and_no_others_fail(self) -> None:
        assert "vLLM 0.32 does not load these experts" in self.told("W4A16", RENAMED_EXPERT, "gpt_oss")
        assert "vLLM" not in self.told("W4A16", RENAMED_EXPERT, "granitemoe")
        assert "vLLM" not in self.told("W4A16", DENSE, "gpt_oss")

    @pytest.mark.parametrize(("preset", "count"), [("W4A16", 2), ("W8A8", 2), ("FP8_DYNAMIC", 0), ("NVFP4A16", 0)])
    def test_experts_that_stay_beside_integers(self, preset: str, count: int) -> None:
        texts = list(reader_limits("qwen3_moe", {}, {"a.b": job(preset)}, STACKED))
        assert len(texts) == count
        assert all(text.endswith(": mlp.experts.gate_up_proj") and "not quantized" in text for text in texts)

    def test_experts_of_one_of_several_groups(self) -> None:
        two = {"experts.0.w1": job("W4A16"), "attention.q_proj": job("W4A16", 1)}
        (text,) = reader_limits("mixtral", {"experts.0.w1": EXPERT}, two)
        assert "does not load these experts if the config has several groups" in text
        assert text.endswith(": experts.0.w1")
        assert not list(reader_limits("llama", {}, two))

    def test_a_cache_is_named_by_its_attention(self) -> None:
        texts = list(reader_limits("llama", {}, {"a.b": job("W4A16")}, {CACHE: ["layers.0.self_attn"]}))
        (text,) = texts
        assert text.startswith("transformers 5.24 ignores the scales of a key-value cache")
        assert text.endswith(": layers.0.self_attn")

    def test_a_row_lists_its_modules_once(self) -> None:
        names = [f"layers.{number}.experts.0.up_proj" for number in range(5)]
        places, jobs = dict.fromkeys(names, EXPERT), jobs_of(dict.fromkeys(names, "W8A8"))
        (line,) = reader_limits("qwen3_moe", places, jobs)
        assert line.endswith(f": 5 modules, {names[0]}, {names[1]}, {names[2]} and 2 more")

    def test_every_row_can_be_met(self) -> None:
        """A row behind another that covers it would never be said."""
        met = set()
        for model_type in ("any_model", *(name for limit in LIMITS for name in limit.model_types)):
            for place in (DENSE, EXPERT, RENAMED_EXPERT, SEPARATE_EXPERT):
                for preset in runtime.formats.presets.PRESETS:
                    met.update(self.told(preset, place, model_type).splitlines())
            two = {"a.b": job("W4A16"), "c": job("W4A16", 1)}
            met.update(reader_limits(model_type, {"a.b": EXPERT}, two))
            for place in (UNQUANTIZED_EXPERT, CACHE):
                met.update(reader_limits(model_type, {}, {"c": job("W4A16")}, {place: ["a.b"]}))
        texts = {line.removesuffix(": a.b") for line in met}
        # compressed-tensors 0.19 has no preset of six bits.
        has_six_bits = any(preset.startswith("MXFP6") for preset in runtime.formats.presets.PRESETS)
        limits = [limit for limit in LIMITS if has_six_bits or not limit.scheme.startswith("mxfp6")]
        assert {f"{limit.reader} {limit.versions} {limit.consequence}" for limit in limits} == texts


def group_of(*names: str) -> ScaleGroup:
    return ScaleGroup(subgraph=0, modules=names)


class TestFused:
    """Modules that vLLM loads as one layer."""

    @staticmethod
    def told(
        presets: Mapping[str, str],
        left: Sequence[str] = (),
        groups: Sequence[ScaleGroup] = (),
        experts: Mapping[str, Sequence[str]] | None = None,
    ) -> list[str]:
        names = [*presets, *left]
        return list(mixed_layers(names, groups, experts or {}, jobs_of(presets)))

    @pytest.mark.parametrize(
        "owns",
        [
            ("q_proj", "k_proj", "v_proj"),
            ("query", "key", "value"),
            ("gate_proj", "up_proj"),
            ("w1", "w3"),
            ("q_a_proj", "kv_a_proj_with_mqa"),
            ("in_proj_qkv", "in_proj_z"),
            ("c_fc_0", "c_fc_1"),
        ],
    )
    def test_different_schemes(self, owns: tuple[str, ...]) -> None:
        same = {f"layers.0.x.{own}": "W4A16" for own in owns}
        assert not self.told(same)
        last = list(same)[-1]
        (text,) = self.told({**same, last: "W8A16"})
        assert all(name in text for name in same)
        (text,) = self.told({name: preset for name, preset in same.items() if name != last}, left=[last])
        assert f"{last} (not quantized)" in text

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("W4A16", "W4A16_ASYM"),
            ("FP8", "FP8_DYNAMIC"),
            ("W4A16", "W4A8"),
            ("NVFP4", "NVFP4A16"),
            ("FP8_DYNAMIC", "FP8_BLOCK"),
        ],
    )
    def test_any_difference_counts(self, first: str, second: str) -> None:
        assert self.told({"a.gate_proj": first, "a.up_proj": second})

    def test_groups_of_one_scheme_are_no_difference(self) -> None:
        jobs = {"a.q_proj": job("W4A16", 0), "a.k_proj": job("W4A16", 1), "a.v_proj": job("W4A16", 0)}
        assert not list(mixed_layers(list(jobs), (), {}, jobs))

    def test_what_is_not_loaded_as_one_may_differ(self) -> None:
        presets = {"a.q_proj": "W4A16", "a.k_proj": "W4A16", "a.v_proj": "W4A16", "a.o_proj": "W8A16"}
        presets |= {"m.gate_proj": "W8A16", "m.up_proj": "W8A16", "m.down_proj": "W4A16"}
        assert not self.told(presets, left=["m.gate", "lm_head"])

    def test_siblings_are_those_that_read_one_tensor(self) -> None:
        """The queries of cross-attention read another one than its keys and values."""
        presets = {"a.q_proj": "W8A16", "a.k_proj": "W4A16", "a.v_proj": "W4A16"}
        groups = [group_of("a.q_proj"), group_of("a.k_proj", "a.v_proj")]
        assert not self.told(presets, groups=groups)
        assert self.told({**presets, "a.q_proj": "W4A16", "a.v_proj": "W8A16"}, groups=groups)

    def test_layers_that_differ_alike_are_one_message(self) -> None:
        presets = {f"layers.{n}.{own}": preset for n in range(4) for own, preset in (("w1", "W4A16"), ("w3", "W8A16"))}
        (text,) = self.told(presets)
        assert "and 3 more layers" in text

    def test_experts_of_a_layer_are_one(self) -> None:
        names = [f"mlp.experts.{number}.{own}" for number in range(3) for own in ("gate_proj", "up_proj", "down_proj")]
        presets = dict.fromkeys(names, "W4A16")
        experts = {"mlp.experts": names}
        assert not self.told(presets, experts=experts)
        (text,) = self.told({**presets, names[2]: "W8A16"}, experts=experts)
        assert names[2] in text
        del presets[names[-1]]
        (text,) = self.told(presets, left=[names[-1]], experts=experts)
        assert f"{names[-1]} (not quantized)" in text


def mixed(first: str, second: str, ignore: str = "lm_head") -> runtime.Recipe:
    groups = f"a: {{targets: ['{first}'], weights: {_FOUR}}}, b: {{targets: ['{second}'], weights: {_EIGHT}}}"
    return recipe(f"config_groups: {{{groups}}}, ignore: ['{ignore}']")


def warnings_of(small: Small, plan: runtime.Recipe, out: Path, **options: Any) -> list[str]:
    return [line for line in calibrate(small, plan, out, **options).remarks if "vLLM" in line or "transformers" in line]


def test_calibrate_names_modules_that_vllm_fuses(narrow_llama: Small, tmp_path: Path) -> None:
    told: list[str] = []
    plan = mixed("re:.*(q|k|o|gate|up|down)_proj$", "re:.*v_proj$")
    with pytest.raises(KeyboardInterrupt):  # before anything has run
        calibrate(narrow_llama, plan, tmp_path / "out", watchers=[Interrupting(told)])
    (text,) = (line for line in told if "vLLM" in line)
    assert text.startswith("warning: vLLM 0.32 loads q_proj, k_proj and v_proj as one layer")
    assert "model.layers.0.self_attn.v_proj (8 bit int by group of 16)" in text
    assert not warnings_of(narrow_llama, mixed("re:.*self_attn.*", "re:.*mlp.*"), tmp_path / "apart")


class Interrupting:
    """Collects warnings, and ends the run with its first step."""

    def __init__(self, told: list[str]) -> None:
        self.told = told

    def tell(self, kind: str, **facts: Any) -> None:
        if kind == "warning":
            self.told.append(facts["text"])
        elif self.told:
            raise KeyboardInterrupt


def test_calibrate_names_what_is_fused_in_latent_attention(small: Callable[..., Small], tmp_path: Path) -> None:
    deepseek = small("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK)
    plan = mixed("re:.*(q_a_proj|o_proj)$", "re:.*kv_a_proj_with_mqa$")
    (text,) = (line for line in warnings_of(deepseek, plan, tmp_path / "out") if "vLLM" in line)
    assert "q_a_proj and kv_a_proj_with_mqa as one layer" in text


def test_calibrate_names_experts_with_another_scheme(qwen3_moe: Small, tmp_path: Path) -> None:
    plan = recipe(
        f"config_groups: {{a: {{targets: ['re:.*experts.*'], weights: {_FOUR}}}}}, ignore: ['re:.*3.up_proj']"
    )
    texts = warnings_of(qwen3_moe, plan, tmp_path / "out")
    assert any("all experts of model.layers.0.mlp.experts as one layer" in text for text in texts)
    assert any("model.layers.0.mlp.experts.3.up_proj (not quantized)" in text for text in texts)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("W8A8", "does not load experts with this scheme"), ("NVFP4A16", "computes wrong numbers"), ("FP8_DYNAMIC", "")],
)
def test_calibrate_says_what_transformers_does_with_mixtures(
    scheme: str, words: str, qwen3_moe: Small, tmp_path: Path
) -> None:
    plan = recipe(f"targets: Linear, scheme: {scheme}, ignore: [lm_head, 're:.*mlp.gate$']")
    (text,) = warnings_of(qwen3_moe, plan, tmp_path / "out")
    assert text.startswith("warning: transformers 5.17 and 5.24 ")
    assert words in text
    assert "model.layers.0.mlp.experts.0." in text


def test_calibrate_says_who_does_not_read_gpt_oss(small: Callable[..., Small], tmp_path: Path) -> None:
    sizes = {**EXPERTS, "num_local_experts": 4, "head_dim": 8, "hidden_size": 32, "intermediate_size": 32}
    gpt_oss = small("GptOssForCausalLM", "GptOssConfig", sizes)
    plan = recipe("targets: Linear, scheme: FP8_DYNAMIC, ignore: [lm_head, 're:.*router$']")
    texts = warnings_of(gpt_oss, plan, tmp_path / "out")
    assert [text.split(" ")[1] for text in texts] == ["transformers", "vLLM"]
    assert "initializes these experts at random" in texts[0]
    assert "does not load these experts" in texts[1]


def test_the_example_of_mixed_bits_is_read_by_all(small: Callable[..., Small], tmp_path: Path) -> None:
    llama = small("LlamaForCausalLM", "LlamaConfig", {**NARROW, "hidden_size": 128, "intermediate_size": 128})
    plan = runtime.Recipe.from_file(Path(runtime.__file__).parent / "recipe" / "files" / "mixed_bits.yaml")
    assert not warnings_of(llama, plan, tmp_path / "out")
