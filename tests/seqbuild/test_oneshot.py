"""One call from Python: a model in memory gives the bytes that the same model on disk gives."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

import seqbuild
from runtime.errors import ModelError
from runtime.provenance.record import read_record
from runtime.streaming.report import Calibration
from seqbuild.modifiers import GPTQModifier, QuantizationModifier
from seqbuild.onecall.loaded_model import loaded_model
from seqbuild.onecall.saved_tensors import saved_tensors
from tests.own_code_model import write_own_code_model
from tests.tiny_models import ZOO, tiny_model

GROUPS_OF_16 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
GROUP = {"targets": ["Linear"], "weights": GROUPS_OF_16}
RECIPE = [GPTQModifier(config_groups={"all": GROUP}, ignore=["lm_head", "re:.*gate$"])]
ROUNDING = QuantizationModifier(config_groups={"all": GROUP}, ignore=["lm_head"])


@dataclass(frozen=True)
class Workshop:
    """Where a test's models and artifacts are."""

    root: Path

    def run(self, model: Any, name: str, recipe: Any = RECIPE, **options: Any) -> Calibration:
        options.setdefault("dataset", rows())
        where = {"output_dir": self.root / name, "artifacts": self.root / "artifacts"}
        found: Calibration = seqbuild.oneshot(model, recipe=recipe, **where, **options)
        return found

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / name / "model.safetensors")


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


def rows(count: int = 6) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [12 + 4 * (index % 2) for index in range(count)]
    return [{"input_ids": torch.randint(3, 128, (length,), generator=generator).tolist()} for length in lengths]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype
        assert tensor.shape == other[key].shape
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[key].reshape(-1).view(torch.uint8)), key


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_hidden_layers": 2}),
    "tied": ("qwen3", {"num_hidden_layers": 2, "dtype": torch.bfloat16}),
    "experts": ("qwen3_moe", {"num_hidden_layers": 2}),
    "encoder and decoder": ("t5", {"num_layers": 1, "decoder_start_token_id": 0, "pad_token_id": 0}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_gives_the_bytes_of_the_same_model_on_disk(name: str, workshop: Workshop) -> None:
    kind, changes = MODELS[name]
    model = tiny_model(kind, attention="sdpa" if kind != "t5" else "eager", **changes)
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = None
    model.save_pretrained(workshop.root / "before")
    loaded = type(model).from_pretrained(workshop.root / "before", dtype="auto").train()
    with torch.no_grad():  # the values in memory count, not those of the directory it was loaded from
        for parameter in loaded.parameters():
            parameter.mul_(1.5)
    next(loaded.parameters()).requires_grad_(False)
    before = _state(loaded)
    in_memory = workshop.run(loaded, "in memory")
    assert _state(loaded) == before
    loaded.save_pretrained(workshop.root / "after")
    on_disk = workshop.run(workshop.root / "after", "from disk")
    assert_equal(workshop.tensors("in memory"), workshop.tensors("from disk"))
    assert in_memory.modules == on_disk.modules
    assert len(in_memory.modules) > 3
    configs = [json.loads((workshop.root / place / "config.json").read_text()) for place in ("in memory", "from disk")]
    assert configs[0] == configs[1]
    records = [read_record(workshop.root / place) for place in ("in memory", "from disk")]
    assert [record.weights.form for record in records] == ["tensors", "files"]
    assert records[0].weights.sha256 == digest_of_tensors(workshop.root / "after" / "model.safetensors")
    parts = [(one.modules, one.recipe, one.artifact, one.data, one.options, one.warnings) for one in records]
    assert parts[0] == parts[1]


def digest_of_tensors(path: Path) -> str:
    """The digest of a model in memory, from the file that it is saved to."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    header.pop("__metadata__", None)
    lines = []
    for name in sorted(header):
        first, last = (begin + offset for offset in header[name]["data_offsets"])
        digest = hashlib.sha256(data[first:last]).hexdigest()
        lines.append(f"{digest}  {name} {header[name]['dtype']} {header[name]['shape']}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _state(model: PreTrainedModel) -> Any:
    """All that a caller can see of a model."""
    tensors = {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    return tensors, flags, [module.training for module in model.modules()], copy.deepcopy(model.config.to_dict())


def test_the_quantized_model_is_returned(workshop: Workshop, byte_tokenizer_dir: Path) -> None:
    model = tiny_model("llama", attention="sdpa", num_hidden_layers=2, vocab_size=258, max_position_embeddings=64)
    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer_dir)
    texts = [f"Text number {number} of a few." for number in range(4)]
    options: dict[str, Any] = {"recipe": ROUNDING, "artifacts": workshop.root / "artifacts", "tokenizer": tokenizer}
    found = seqbuild.oneshot(model, texts, load=True, **options)
    assert type(found) is type(model)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        error = (found(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()
    assert 0 < error < 0.6
    lines: list[str] = []
    out = workshop.root / "out"
    seqbuild.oneshot(model, texts, output_dir=out, log_dir=workshop.root / "log", progress=lines.append, **options)
    assert lines[0].startswith("artifact: ")
    assert "found in" in lines[0]
    assert (out / "tokenizer.json").is_file()
    (log,) = (workshop.root / "log").iterdir()
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "end"


def test_without_a_data_set_the_built_in_text_is_used_if_the_recipe_needs_data(
    workshop: Workshop, byte_tokenizer_dir: Path
) -> None:
    model = tiny_model("llama", attention="sdpa", num_hidden_layers=2, vocab_size=258, max_position_embeddings=64)
    assert workshop.run(model, "without data", ROUNDING, dataset=None).modules
    options = {"dataset": None, "tokenizer": byte_tokenizer_dir, "num_calibration_samples": 3}
    with pytest.warns(UserWarning, match="built-in text is used"):
        done = workshop.run(model, "built-in", **options)
    assert done.modules[0].num_tokens == 3 * 64
    model.save_pretrained(workshop.root / "model")
    with pytest.warns(UserWarning, match="built-in text is used"):
        workshop.run(workshop.root / "model", "from disk", **options)
    assert_equal(workshop.tensors("built-in"), workshop.tensors("from disk"))
    assert (workshop.root / "from disk" / "tokenizer.json").is_file()


def test_a_model_with_its_own_code_is_compiled_if_trusted(workshop: Workshop) -> None:
    from transformers import AutoModelForCausalLM

    directory = write_own_code_model(workshop.root / "model", with_weights=True)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    with pytest.raises(ModelError, match="trust"):
        workshop.run(model, "refused", ROUNDING, dataset=None)
    workshop.run(model, "in memory", ROUNDING, dataset=None, trust_remote_code_model=True)
    workshop.run(directory, "from disk", ROUNDING, dataset=None, trust_remote_code_model=True)
    assert_equal(workshop.tensors("in memory"), workshop.tensors("from disk"))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_tensors_have_the_names_and_values_that_transformers_saves(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    held = saved_tensors(model)
    assert_equal({key: one.get().contiguous() for key, one in held.items()}, load_file(tmp_path / "model.safetensors"))
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert all(one.get().untyped_storage().data_ptr() in own for one in held.values()), "a tensor was copied"


def test_a_checkpoint_in_memory_reads_as_one_on_disk(tmp_path: Path) -> None:
    from runtime.checkpoint.reader import Checkpoint

    model = tiny_model("mixtral", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    disk = Checkpoint(tmp_path)
    with loaded_model(model) as loaded:
        memory = loaded.checkpoint
        assert list(memory) == list(disk)
        assert memory.total_bytes == sum(disk.num_bytes(key) for key in disk)
        for key in disk:
            assert memory.stored(key) == disk.stored(key)
            assert torch.equal(memory.read(key), disk.read(key))
            assert torch.equal(memory.read_part(key, 1), disk.read_part(key, 1))
            assert b"".join(memory.pieces(key)) == b"".join(disk.pieces(key))
            assert torch.equal(torch.cat(list(memory.looked_at(key))), torch.cat(list(disk.looked_at(key))))
            assert len(memory.sample(key, 7)) == len(disk.sample(key, 7)) == 7
        table, other = memory.table("model.embed_tokens.weight"), disk.table("model.embed_tokens.weight")
        assert table is not None
        assert other is not None
        assert torch.equal(
            table.looked_up(torch.tensor([[5, 2], [2, 9]])), other.looked_up(torch.tensor([[5, 2], [2, 9]]))
        )
        assert memory.table("model.norm.weight") is None
        memory.read("model.norm.weight").zero_()
    assert bool(model.model.norm.weight.all()), "the caller's model was changed"


def test_a_model_of_a_relative_path_has_the_name_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    model.config.name_or_path = ".."
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    with loaded_model(model) as loaded:
        assert loaded.source.name == tmp_path.name


def _without_values(model: PreTrainedModel) -> PreTrainedModel:
    return model.to("meta")


def _with_another_layer(model: PreTrainedModel) -> PreTrainedModel:
    class Doubled(torch.nn.Linear):
        pass

    model.lm_head = Doubled(32, 128, bias=False)
    return model


def _with_a_patched_forward(model: PreTrainedModel) -> PreTrainedModel:
    model.model.norm.forward = lambda hidden: hidden
    return model


def _of_an_own_class(model: PreTrainedModel) -> PreTrainedModel:
    class Changed(type(model)):  # type: ignore[misc]
        pass

    model.__class__ = Changed
    return model


def _marked_as_quantized(model: PreTrainedModel) -> PreTrainedModel:
    model.config.quantization_config = {"quant_method": "gptq"}
    return model


def _with_a_tensor_of_another_kind(model: PreTrainedModel) -> PreTrainedModel:
    class Sharded(torch.nn.Parameter):
        pass

    model.lm_head._parameters["weight"] = Sharded(model.lm_head.weight.detach())
    return model


CHANGED: dict[Callable[[PreTrainedModel], PreTrainedModel], str] = {
    _without_values: "has no values",
    _with_another_layer: r"lm_head of the model is .*Doubled, which its config does not describe",
    _with_a_patched_forward: "model.norm of the model has a replaced forward",
    _of_an_own_class: "is not a class of transformers",
    _marked_as_quantized: "quantized already",
    _with_a_tensor_of_another_kind: r"lm_head.weight of the model is .*Sharded, not a plain tensor",
}


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__)
def test_a_model_that_its_config_does_not_describe_is_rejected(
    change: Callable[[PreTrainedModel], PreTrainedModel],
) -> None:
    model = change(tiny_model("llama"))
    with pytest.raises(ModelError, match=CHANGED[change]), loaded_model(model):
        pass


def test_offloaded_weights_are_read_from_where_they_are(tmp_path: Path) -> None:
    from accelerate import cpu_offload, disk_offload

    model = tiny_model("qwen3")
    expected = {key: one.get().clone() for key, one in saved_tensors(model).items()}
    for offload in (lambda one: cpu_offload(one), lambda one: disk_offload(one, str(tmp_path))):
        offloaded = copy.deepcopy(model)
        offload(offloaded)
        assert offloaded.model.embed_tokens.weight.is_meta
        with loaded_model(offloaded) as loaded:
            assert_equal({key: loaded.checkpoint.read(key) for key in loaded.checkpoint}, expected)
