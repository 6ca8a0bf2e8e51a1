"""Fifteen architectures with mixtures of experts: apart they are the model, and what is written is read back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import runtime
from runtime.artifact.manifest import ExpertStack
from runtime.checkpoint.names import checkpoint_name
from runtime.checkpoint.reader import Checkpoint
from runtime.errors import ArtifactError, RecipeError, WeightsError
from runtime.experts.checkpoint_view import StoredStack, split_checkpoint
from runtime.experts.split import SplitArtifact, split_experts
from runtime.model.dense_experts import DenseExperts
from runtime.model.experts import Experts, Mixture, Stack
from runtime.weights.parameters import Weights
from seqbuild.manifest.experts.probe import ExpertProbe
from seqbuild.manifest.experts.program import stacks_from_program
from seqbuild.verify.running import EAGER_EXPERTS, configured
from tests.runtime.small import (
    EXPERTS,
    GROUPED_EXPERTS,
    LATENT_HEADS,
    NARROW_W4,
    RECIPES,
    VOCABULARY,
    Small,
    StopError,
    Stopping,
    calibrate,
    directory_bytes,
    load_transformers,
    make_small,
    read_tensors,
    recipe,
    run_transformers,
    run_weights,
    token_batches,
    unpacked,
)
from tests.sweep import sweep
from tests.tiny_models import run_chain

NUM_EXPERTS = 4
SIZES = {**EXPERTS, "num_hidden_layers": 2}
HYBRID = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "mamba_expand": 1,
    "mamba_dt_rank": 16,
}
# Text alone: no token is one of an image's.
ERNIE = {
    **SIZES,
    "head_dim": 8,
    "moe_intermediate_size": [16, 32],
    "moe_num_experts": NUM_EXPERTS,
    "moe_k": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    "tie_word_embeddings": False,
    "moe_num_shared_experts": 1,
}
ERNIE_TOWER = {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48}
STEP = {
    **SIZES,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "share_expert_dim": 16,
    "n_routed_experts": NUM_EXPERTS,
    "mlp_layer_types": ["sparse", "sparse"],
    "swiglu_limits": [None, 0.05],
    "sliding_window": 16,
}
STEP_TOWER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28}
MODELS: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": NUM_EXPERTS}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**GROUPED_EXPERTS, **LATENT_HEADS, "num_key_value_heads": 4},
    ),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**GROUPED_EXPERTS, "head_dim": 8}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {"num_local_experts": NUM_EXPERTS, "head_dim": 8, "intermediate_size": 32},
    ),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {"num_local_experts": NUM_EXPERTS}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": NUM_EXPERTS}),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"num_local_experts": NUM_EXPERTS, "intermediate_size_mlp": 48, "head_dim": 8, "num_experts_per_tok": 1},
    ),
    "dbrx": (
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": NUM_EXPERTS, "moe_top_k": 2},
        },
    ),
    "longcat_flash": (
        "LongcatFlashForCausalLM",
        "LongcatFlashConfig",
        {
            **LATENT_HEADS,
            "head_dim": 16,
            "num_layers": 1,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": NUM_EXPERTS,
            "zero_expert_num": 2,
            "moe_topk": 3,
            "num_key_value_heads": 4,
        },
    ),
    "step3p7": (
        "Step3p7ForConditionalGeneration",
        "Step3p7Config",
        {"text_config": STEP, "vision_config": STEP_TOWER, "image_token_id": 1},
    ),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VLMoeConfig",
        {"text_config": ERNIE, "vision_config": ERNIE_TOWER, "tie_word_embeddings": False},
    ),
    # A checkpoint that has gates and what they open by turns, in one tensor for all experts.
    "inkling2_text": (
        "Inkling2ForCausalLM",
        "Inkling2TextConfig",
        {
            "n_routed_experts": NUM_EXPERTS,
            "moe_intermediate_size": 16,
            "head_dim": 16,
            "swa_head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "sliding_window_size": 16,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "unpadded_vocab_size": VOCABULARY,
            "rel_extent": 64,
        },
    ),
    "jamba": ("JambaForCausalLM", "JambaConfig", {**HYBRID, "num_experts": NUM_EXPERTS}),
}
STACKED = (
    "gpt_oss",
    "granitemoe",
    "llama4",
    "dbrx",
    "step3p7",
    "inkling2_text",
)  # those that a checkpoint holds stacked
# transformers 5.24 refuses such checkpoints: it wants tensors for LongCat's experts without weights and finds them not
# quantized, and its conversion of Ernie's experts takes none that are packed.
REFUSED = ("longcat_flash", "ernie4_5_vl_moe")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Small]:
    known: dict[str, Small] = {}

    def make(name: str) -> Small:
        if name not in known:
            class_name, config, sizes = MODELS[name]
            is_seeing = "vision_config" in sizes
            all_sizes = sizes if is_seeing else {**SIZES, **sizes}
            root = tmp_path_factory.mktemp(name)
            known[name] = make_small(root, class_name, config, all_sizes, text_only=is_seeing)
        return known[name]

    return make


def gptq(*ignore: str) -> Any:
    """All Linear modules but these; of Jamba's `dt_proj` and LongCat's router the model takes the weight alone, and
    Inkling's `weight_proj` has a name that says nothing of a module.
    """
    ignored = ", ".join(["lm_head", "'re:.*dt_proj'", "'re:.*classifier'", "'re:.*[.]weight_proj'", *ignore])
    return recipe(NARROW_W4.replace("lm_head", ignored), modifier="GPTQModifier")


def matrices(small: Small) -> list[str]:
    """Names under which the matrices of experts that text reaches are to be written, without what is stored of each."""
    artifact = split_experts(small.load(), Checkpoint(small.weights))
    assert isinstance(artifact, SplitArtifact)
    entries = artifact.manifest.parameters
    used = [name for entry in artifact.manifest.subgraphs for name in entry.parameters]
    return [
        entries[f"{name}.{part}"].sources[0].removesuffix(".weight")
        for name, split in artifact.mixtures.items()
        for stack in split.stacks.values()
        for parts in stack.parts
        for part in parts
        if part.endswith(".weight") and f"{name}.{part}" in used
    ]


def stacked_again(name: str, found: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The stacked tensors of a checkpoint from what was written for single experts, as each architecture has them."""
    owners = dict.fromkeys(re.sub(r"\.\d+\.gate_proj.*", "", key) for key in found if ".gate_proj.weight_packed" in key)
    for owner in [owner for owner in owners if owner.endswith("experts")]:
        each = [
            {part: unpacked(dict(found), f"{owner}.{expert}.{part}_proj").float() for part in ("gate", "up", "down")}
            for expert in range(NUM_EXPERTS)
        ]
        layer = owner.removesuffix(".experts")
        if name == "dbrx":
            for own, part in (("w1", "gate"), ("v1", "up")):
                yield f"{owner}.mlp.{own}", torch.cat([e[part] for e in each])
            yield f"{owner}.mlp.w2", torch.cat([e["down"].T for e in each])
            continue
        if name == "inkling2_text":
            by_turns = [torch.stack([e["gate"], e["up"]], 1).flatten(0, 1) for e in each]
            layer = layer.replace("model.layers", "model.llm.layers")
            yield f"{layer}.experts.w13_weight", torch.stack(by_turns)
            yield f"{layer}.experts.w2_weight", torch.stack([e["down"] for e in each])
            continue
        if name == "step3p7":
            moe = layer.replace(".mlp", ".moe")
            yield from ((f"{moe}.{part}_proj.weight", torch.stack([e[part] for e in each])) for part in each[0])
            continue
        if name == "granitemoe":
            yield f"{layer}.input_linear.weight", torch.stack([torch.cat([e["gate"], e["up"]]) for e in each])
            yield f"{layer}.output_linear.weight", torch.stack([e["down"] for e in each])
            continue
        yield f"{owner}.down_proj", torch.stack([e["down"].T for e in each]).contiguous()
        if name == "llama4":
            yield f"{owner}.gate_up_proj", torch.stack([torch.cat([e["gate"].T, e["up"].T], 1) for e in each])
            continue
        joined = torch.stack([torch.empty_like(torch.cat([e["gate"].T, e["up"].T], 1)) for e in each])
        bias = torch.empty(NUM_EXPERTS, joined.shape[-1])
        for expert, e in enumerate(each):
            joined[expert, :, 0::2], joined[expert, :, 1::2] = e["gate"].T, e["up"].T
            bias[expert, 0::2] = found[f"{owner}.{expert}.gate_proj.bias"]
            bias[expert, 1::2] = found[f"{owner}.{expert}.up_proj.bias"]
        yield f"{owner}.gate_up_proj", joined
        yield f"{owner}.gate_up_proj_bias", bias
        down = [found[f"{owner}.{expert}.down_proj.bias"] for expert in range(NUM_EXPERTS)]
        yield f"{owner}.down_proj_bias", torch.stack(down)


def plain_again(name: str, small: Small, quantized: Path, target: Path) -> Path:
    """A plain checkpoint of the weights that a quantized one stands for, put together by hand."""
    shutil.copytree(small.weights, target)
    found, before = read_tensors(quantized), read_tensors(small.weights)
    tensors = {key: found[key] for key in before if key in found}
    for key in before:
        module = key.removesuffix(".weight")
        if f"{module}.weight_packed" in found:
            tensors[key] = unpacked(found, module).float()
    if name in STACKED:
        tensors.update(stacked_again(name, found))
    assert sorted(tensors) == sorted(before)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / "model.safetensors")
    return target


@pytest.mark.parametrize("name", sweep(MODELS, *STACKED, "qwen3_moe"))
def test_apart_they_are_the_model_to_the_bit(made: Callable[[str], Small], name: str) -> None:
    small = made(name)
    checkpoint = Checkpoint(small.weights)
    artifact = split_experts(small.load(), checkpoint)
    assert isinstance(artifact, SplitArtifact)
    model = artifact.empty_model(torch.float32)
    source = Weights(artifact, checkpoint, torch.float32, model)
    source.load(model, artifact.manifest.parameters, torch.device("cpu"))
    whole = load_transformers(small.weights)
    for parameter in whole.parameters():
        parameter.data = parameter.data.clone()  # where numbers lie in memory can change the last bits of a product
    for batch in token_batches(((2, 23), (1, 7))):
        with torch.no_grad(), configured(whole, EAGER_EXPERTS):
            expected = whole(**batch, use_cache=False).logits
        assert torch.equal(run_chain(artifact.subgraphs, model, dict(batch))["logits"], expected)


@pytest.mark.parametrize("name", sweep(MODELS, *STACKED, "qwen3_moe"))
def test_every_matrix_is_quantized_by_itself(made: Callable[[str], Small], name: str, tmp_path: Path) -> None:
    small = made(name)
    result = calibrate(small, gptq(), tmp_path / "out")
    found, names = read_tensors(tmp_path / "out"), matrices(small)
    assert len(names) % (3 * NUM_EXPERTS) == 0
    for key in names:
        assert f"{key}.weight_packed" in found
        assert f"{key}.weight" not in found
    experts = [module for module in result.modules if re.search(r"experts\.\d+\.", module.name)]
    assert len(experts) == len(names)
    assert all(module.algorithm == "gptq" and module.num_tokens > 0 for module in experts)
    assert not any("not quantized" in remark for remark in result.remarks)
    (batch,) = token_batches(((2, 23),))
    again = run_weights(small, tmp_path / "out", batch)["logits"]
    plain = tmp_path / "out"
    if name in STACKED + REFUSED:
        plain = plain_again(name, small, tmp_path / "out", tmp_path / "plain")
    torch.testing.assert_close(again, run_transformers(plain, batch))


class TestStackedInTheCheckpoint:
    """What is one tensor there comes out as one for each matrix."""

    @pytest.fixture(params=STACKED)
    def small(self, request: pytest.FixtureRequest, made: Callable[[str], Small]) -> Small:
        return made(request.param)

    @pytest.fixture(params=sweep(STACKED, "gpt_oss", "dbrx"))
    def usual(self, request: pytest.FixtureRequest, made: Callable[[str], Small]) -> Small:
        """One that takes gates by turns and has biases, one whose experts stand below each other."""
        return made(request.param)

    def test_each_tensor_is_read_once(self, small: Small) -> None:
        artifact = split_experts(small.load(), Checkpoint(small.weights))
        model = artifact.empty_model(torch.float32)
        source = Weights(artifact, Checkpoint(small.weights), torch.float32, model)
        used = dict.fromkeys(name for entry in artifact.manifest.subgraphs for name in entry.parameters)
        source.load(model, list(used), torch.device("cpu"))
        wanted = {
            key: tensor for key, tensor in read_tensors(small.weights).items() if not re.match("v(ision|it)", key)
        }
        assert source.checkpoint.bytes_read == sum(tensor.nbytes for tensor in wanted.values())

    def test_layers_that_are_ignored_stay_as_they_are(self, small: Small, tmp_path: Path) -> None:
        calibrate(small, gptq("'re:.*(layers|blocks)[.]0[.].*experts.*'"), tmp_path / "out")
        found, before = read_tensors(tmp_path / "out"), read_tensors(small.weights)
        first = [key for key in before if re.search(r"(layers|blocks)\.0\.", key)]
        stacks = [key for key in first if before[key].dim() == 3 or ".experts.mlp." in key]
        assert stacks
        for key in stacks:
            assert torch.equal(found[key], before[key])
        ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
        assert any(re.match(r"re:.*(layers|blocks)\\\.0\\\.", pattern) for pattern in ignored)
        (batch,) = token_batches(((2, 23),))
        assert torch.isfinite(run_weights(small, tmp_path / "out", batch)["logits"]).all()

    def test_memory_for_statistics_changes_nothing(self, usual: Small, tmp_path: Path) -> None:
        for bound in (None, 1):
            calibrate(usual, gptq(), tmp_path / str(bound), statistics_memory=bound)
        assert directory_bytes(tmp_path / "None") == directory_bytes(tmp_path / "1")

    def test_an_interrupted_run_goes_on(self, usual: Small, tmp_path: Path) -> None:
        calibrate(usual, gptq(), tmp_path / "whole")
        with pytest.raises(StopError):
            calibrate(usual, gptq(), tmp_path / "out", watchers=[Stopping()])
        assert calibrate(usual, gptq(), tmp_path / "out", resume=True).resumed_at > 0
        assert directory_bytes(tmp_path / "out") == directory_bytes(tmp_path / "whole")

    def test_all_tokens_are_seen_or_only_an_experts_own(self, usual: Small, tmp_path: Path) -> None:
        total = sum(batch["input_ids"].numel() for batch in token_batches())
        config = json.loads((usual.weights / "config.json").read_text())
        per_token = config.get("text_config", config)["num_experts_per_tok"]
        for is_all in (True, False):
            result = calibrate(usual, gptq(), tmp_path / str(is_all), moe_calibrate_all_experts=is_all)
            for last in ("gate_proj", "down_proj"):
                counts = [m.num_tokens for m in result.modules if re.search(rf"\.0\..*\bexperts\.\d+\.{last}", m.name)]
                assert sum(counts) == (NUM_EXPERTS if is_all else per_token) * total

    def test_inputs_are_rounded_as_readers_round_them(self, small: Small, tmp_path: Path) -> None:
        text = RECIPES["FP8_DYNAMIC"].replace("lm_head", "lm_head, 're:.*[.]weight_proj'")
        calibrate(small, recipe(text), tmp_path / "out")
        (batch,) = token_batches(((2, 23),))
        rounded = run_weights(small, tmp_path / "out", batch)["logits"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Mixture, "watched", lambda *args, **options: {})
            plain = run_weights(small, tmp_path / "out", batch)["logits"]
        assert not torch.equal(rounded, plain)

    def test_the_plan_needs_no_checkpoint(self, usual: Small, tmp_path: Path) -> None:
        from runtime.planning.request import plan_artifact

        plan, _, _ = plan_artifact(usual.load(), num_samples=8, seq_len=32, batch_size=2, recipe=gptq())
        result = calibrate(usual, gptq(), tmp_path / "out")
        assert plan.output_bytes == result.num_bytes


def test_experts_without_weights_need_none(made: Callable[[str], Small], tmp_path: Path) -> None:
    """Transformers saves some for them; LongCat's own checkpoints have none."""
    small = made("longcat_flash")
    shutil.copytree(small.weights, tmp_path / "model")
    spare = re.compile(rf"experts\.({NUM_EXPERTS}|{NUM_EXPERTS + 1})\.")
    kept = {key: tensor for key, tensor in read_tensors(small.weights).items() if not spare.search(key)}
    assert len(read_tensors(small.weights)) - len(kept) == 4
    save_file(kept, tmp_path / "model" / "model.safetensors")
    calibrate(small, gptq(), tmp_path / "whole")
    calibrate(Small(weights=tmp_path / "model", artifact=small.artifact), gptq(), tmp_path / "out")
    found, before = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "whole")
    assert sorted(found) == sorted(key for key in before if not spare.search(key))
    assert all(torch.equal(found[key], before[key]) for key in found)


def test_a_weight_whose_name_is_no_modules_is_refused(made: Callable[[str], Small], tmp_path: Path) -> None:
    plan = recipe(NARROW_W4.replace("Linear", "'re:.*weight_proj'"))
    with pytest.raises(RecipeError, match=r"weight of .*weight_proj has the name 'model\.llm.*weight_proj'"):
        calibrate(made("inkling2_text"), plan, tmp_path / "out")


def test_what_stays_stacked_is_said(tmp_path: Path) -> None:
    sizes = {**SIZES, "num_local_experts": NUM_EXPERTS, "kv_channels": 8}
    small = make_small(tmp_path, "JetMoeForCausalLM", "JetMoeConfig", sizes)
    result = calibrate(small, gptq(), tmp_path / "out")
    assert any("because the model's routing code is not supported" in remark for remark in result.remarks)


# What one expert does

_WIDE, _NARROW = 6, 4  # features of the layer and of an expert


def _experts(program: Callable[..., torch.Tensor], **shapes: tuple[int, ...]) -> dict[str, ExpertStack]:
    module = Experts(num_experts=2, stacked=list(shapes), inputs=("a", "b", "c"), accumulator="hidden", is_column=True)
    module.__dict__["program"] = lambda self, *args, run: {"output": program(*args)}
    probe = ExpertProbe(module, {name: (2, *shape) for name, shape in shapes.items()})
    return {stack.name: stack for stack in stacks_from_program(probe)}


_LINEAR, _MM = torch.ops.aten.linear.default, torch.ops.aten.mm.default
_SILU = nn.functional.silu


def test_the_gate_is_what_switches_off() -> None:
    def swapped(states: Any, weights: Any, up: Any, down: Any) -> Any:
        one, other = _LINEAR(states, up).chunk(2, -1)
        return _LINEAR(one * _SILU(other), down) * weights

    found = _experts(swapped, both=(2 * _NARROW, _WIDE), down=(_WIDE, _NARROW))
    assert found["both"].parts == ("up_proj.weight", "gate_proj.weight")
    assert not found["both"].is_interleaved
    assert found["down"].parts == ("down_proj.weight",)


def test_a_matrix_without_a_gate_goes_up() -> None:
    def plain(states: Any, weights: Any, up: Any, down: Any) -> Any:
        return _MM(torch.relu(_MM(states, up)), down) * weights

    found = _experts(plain, up=(_WIDE, _NARROW), down=(_NARROW, _WIDE))
    assert found["up"].parts == ("up_proj.weight",)
    assert found["up"].is_transposed


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(lambda x, w, a, b: _LINEAR(x, a), id="one product"),
        pytest.param(lambda x, w, a, b: _LINEAR(_LINEAR(x, a).view(2, 2, _NARROW).sum(1), b), id="none is the gate"),
        pytest.param(lambda x, w, a, b: _LINEAR(_LINEAR(x, a).cumsum(-1)[:, :_NARROW], b), id="all depends on all"),
        pytest.param(lambda x, w, a, b: _LINEAR(x + _LINEAR(x, a)[:, :_WIDE], a), id="one matrix twice"),
        pytest.param(lambda x, w, a, b: x / 0, id="an error"),
    ],
)
def test_what_is_something_else_is_left(program: Any) -> None:
    found = _experts(program, first=(2 * _NARROW, _WIDE), second=(_WIDE, _NARROW))
    assert found == {}


def test_parts_of_a_stack_are_taken_as_they_are_joined() -> None:
    own = torch.arange(24).reshape(4, 6)
    for axis in (0, 1):
        for is_transposed in (False, True):
            for is_interleaved in (False, True):
                parts = (("0.a.weight", "0.b.weight"),)
                stack = Stack(parts=parts, axis=axis, is_transposed=is_transposed, is_interleaved=is_interleaved)
                assert torch.equal(stack.join([stack.take(own, 0), stack.take(own, 1)]), own)


def test_a_stack_that_is_turned_when_it_is_loaded_is_turned_expert_by_expert(tmp_path: Path) -> None:
    stored = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)  # qwen3_vl_moe's checkpoint has [E, I, O], the model [E, O, I]
    save_file({"x": stored}, tmp_path / "model.safetensors")
    stack = Stack(parts=(("0.a.weight", "0.b.weight"), ("1.a.weight", "1.b.weight")), axis=0, is_transposed=False)
    stored_stack = StoredStack(
        sources=("x",),
        shape=(2, 4, 3),
        stack=stack,
        prefix="m",
        program=lambda self, source_0, *, run: {"value": source_0.transpose(1, 2)},
    )
    seen = split_checkpoint(Checkpoint(tmp_path), [stored_stack])
    assert list(seen) == ["m.0.a.weight", "m.0.b.weight", "m.1.a.weight", "m.1.b.weight"]
    for expert in range(2):
        both = torch.cat([seen.read(f"m.{expert}.{own}.weight") for own in ("a", "b")])
        assert torch.equal(both, stored[expert].T)
    assert seen.bytes_read == stored.nbytes


def relaid(small: Small, **changes: Any) -> runtime.Artifact:
    """An artifact whose experts' first stack is said to be composed in another way."""
    artifact = small.load()
    (layout,) = artifact.manifest.expert_layouts
    first, *rest = layout.stacks
    changed = replace(layout, stacks=(replace(first, **changes), *rest), pairs=())
    artifact.manifest = replace(artifact.manifest, expert_layouts=(changed,))
    return artifact


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": ("up_proj.weight", "gate_proj.weight")},
        {"parts": ("a.weight", "b.weight", "c.weight", "d.weight")},
        {"is_interleaved": True},
        {"is_transposed": True},
        {"axis": 1},
        {"input": 1},
    ],
)
def test_a_layout_that_lies_changes_names_and_not_the_model(
    made: Callable[[str], Small], changes: dict[str, Any]
) -> None:
    small = made("granitemoe")
    batch = token_batches(((2, 11),))[0]
    outputs = []
    for artifact in (relaid(small), relaid(small, **changes)):
        split, checkpoint = split_experts(artifact, Checkpoint(small.weights)), Checkpoint(small.weights)
        model = split.empty_model(torch.float32)
        Weights(split, checkpoint, torch.float32, model).load(model, split.manifest.parameters, torch.device("cpu"))
        outputs.append(run_chain(split.subgraphs, model, dict(batch))["logits"])
    assert torch.equal(*outputs)


def test_a_module_name_that_is_taken_is_refused(made: Callable[[str], Small]) -> None:
    small = made("granitemoe")
    split = split_experts(relaid(small, parts=("forward.weight", "up_proj.weight")), Checkpoint(small.weights))
    with pytest.raises(ArtifactError, match=r"the experts .* cannot be split: .*attribute 'forward' already exists"):
        split.empty_model(torch.float32)


def test_stacks_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 4, 3)}, tmp_path / "model.safetensors")
    stack = Stack(parts=(("0.a.weight",), ("1.a.weight",)), axis=0, is_transposed=False)
    stored = StoredStack(sources=("x",), shape=(2, 4, 5), stack=stack, prefix="m", program=None)
    with pytest.raises(WeightsError, match=r"has shape \[2, 4, 3\], the artifact expects \[2, 4, 5\] for 2 experts"):
        split_checkpoint(Checkpoint(tmp_path), [stored])
    with pytest.raises(WeightsError, match=r"the artifact expects \[8, 5\] for 2 experts"):
        split_checkpoint(Checkpoint(tmp_path), [replace(stored, is_flat=True)])
    made_otherwise: Any = lambda self, source_0, *, run: {"value": source_0.sum(0, keepdim=True)[:, :2]}  # noqa: E731
    seen = split_checkpoint(Checkpoint(tmp_path), [replace(stored, program=made_otherwise)])
    with pytest.raises(ArtifactError, match=r"makes \[2, 3\] of one expert's slice"):
        seen.read("m.0.a.weight")


@pytest.mark.parametrize(
    ("key", "name", "expected"),
    [
        (
            "model.layers.3.moe.input_linear.weight",
            "model.layers.3.moe.experts.gate_up_proj",
            "model.layers.3.moe.experts",
        ),
        (
            "language_model.model.layers.3.a.b",
            "model.language_model.layers.3.mlp.b",
            "language_model.model.layers.3.mlp",
        ),
        ("experts.b", "mlp.experts.b", "mlp.experts"),
    ],
)
def test_the_checkpoints_name_goes_as_far_as_the_layer(key: str, name: str, expected: str) -> None:
    assert checkpoint_name(key, name) == expected


def test_dense_experts_without_hooks_only_calculate(made: Callable[[str], Small]) -> None:
    model = made("llama4").load().empty_model()
    assert sum(isinstance(module, DenseExperts) for module in model.modules()) == 2
