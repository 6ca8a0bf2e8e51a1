"""Which inputs a sample has: those of a plain call, and those for whose absence a value stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import runtime
import runtime.cli.app
from runtime.artifact.manifest import MANIFEST_NAME, Manifest
from runtime.data.inputs import model_inputs
from seqbuild.build import build
from seqbuild.sample.inputs import default_sample
from seqbuild.sample.plain import plain_call
from seqbuild.sample.shape import SampleShape
from seqbuild.verify.artifact import verify_artifact
from tests.runtime.small import write_token_file
from tests.tiny_models import randomize, save_config, tiny_config, tiny_model
from tests.zoo import cases, small_model

ALL = {case.name: case for case in cases()}
TINY_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 258, "n_positions": 64}


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("causal LM/gpt-sw3", {}),
        ("causal LM/gptj", {}),
        ("causal LM/xlnet", {}),
        ("causal LM/ctrl", {}),
        ("causal LM/openai-gpt", {}),
        ("masked LM/flaubert", {}),
        ("masked LM/bert", {"token_type_ids": 0}),
        ("masked LM/layoutlm", {"token_type_ids": 0, "bbox": 0}),
        ("causal LM/xmod", {"token_type_ids": 0, "lang_ids": None}),
        ("seq2seq/mbart", {"decoder_attention_mask": 1}),
    ],
)
def test_inputs_that_a_plain_call_leaves_out(name: str, inputs: dict[str, Any]) -> None:
    model = small_model(ALL[name])
    assert plain_call(model).absent == inputs
    given = [name for name in default_sample(model) if name not in ("input_ids", "attention_mask", "decoder_input_ids")]
    assert sorted(given) == sorted(inputs)


def test_what_stands_for_absence_changes_no_bit_of_the_model_itself() -> None:
    """On the model, not on the copy that was asked, and on other inputs."""
    model = small_model(ALL["masked LM/layoutlm"])
    for seed, padding in ((11, ""), (12, "left"), (13, "right")):
        sample = default_sample(model, SampleShape(batch=2, sequence=17, padding=padding, seed=seed))
        zeros = {name: torch.zeros_like(sample[name]) for name in ("token_type_ids", "bbox")}
        plain = {name: sample[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            assert torch.equal(model(**plain).logits, model(**plain, **zeros).logits)


def test_an_embedding_of_zeros_proves_nothing() -> None:
    """A fresh model whose types are all zeros computes the same with them; trained ones do not."""

    class Typed(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.types = torch.nn.Parameter(torch.zeros(2, config.hidden_size))

        def forward(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, **kw: Any) -> Any:
            embeds = self.model.embed_tokens(input_ids)
            if token_type_ids is not None:
                embeds = embeds + self.types[token_type_ids]
            return super().forward(inputs_embeds=embeds, attention_mask=attention_mask, **kw)

    assert plain_call(Typed(tiny_config("llama"))).absent == {}


@pytest.mark.parametrize(
    ("name", "changes", "rule"),
    [
        ("bart", {"decoder_start_token_id": 2}, {"pad": 0, "start": 2}),
        ("bart", {"decoder_start_token_id": 5, "pad_token_id": 3}, {"pad": 3, "start": 5}),
        ("t5", {"decoder_start_token_id": 0}, {"pad": 0, "start": 0}),
        ("t5", {}, {}),
        ("llama", {}, {}),
    ],
)
def test_how_the_decoder_begins(name: str, changes: dict[str, Any], rule: dict[str, int]) -> None:
    assert plain_call(tiny_model(name, **changes)).decoder == rule


def test_the_wider_model_has_its_own_tokens() -> None:
    """The copy that is asked is narrow, and its tokens may have other numbers."""
    with torch.device("meta"):
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(decoder_start_token_id=49999))
    assert plain_call(model).decoder == {"pad": 1, "start": 49999}


def gpt2_with_types(folder: Path) -> tuple[Path, Path]:
    """A GPT-2 with weights, and its artifact from a sample that has token types."""
    from safetensors.torch import save_file

    config = transformers.GPT2Config(**TINY_GPT2, bos_token_id=0, eos_token_id=1)
    randomize(transformers.GPT2LMHeadModel(config)).save_pretrained(folder / "model")
    ids = torch.randint(3, 128, (3, 37))
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids // 64}, folder / "s")
    return folder / "model", build(folder / "model", sample=folder / "s", out=folder / "artifacts").path


def test_a_users_sample_may_have_them_and_then_data_must(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, path = gpt2_with_types(tmp_path)
    data = write_token_file(tmp_path / "data.safetensors", length=20)
    for command in (
        ["evaluate"],
        ["calibrate", "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")],
    ):
        (tmp_path / "recipe.yaml").write_text("GPTQModifier: {targets: Linear, scheme: W8A8}")
        code = runtime.cli.app.main(
            [command[0], str(path), *command[1:], "--weights", str(weights), "--data", str(data)]
        )
        assert code == 2
        assert "has an input 'token_type_ids', which is missing in the data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    ids = torch.randint(3, 128, (2, 20))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids // 64}
    model = transformers.GPT2LMHeadModel.from_pretrained(weights).eval()
    with torch.no_grad():
        wanted = model(**batch, labels=ids).loss.exp().item()
    assert runtime.evaluate(runtime.load(path), weights=weights, batches=[batch]).perplexity == pytest.approx(wanted)


def test_verify_says_that_batches_must_have_them(tmp_path: Path) -> None:
    _, path = gpt2_with_types(tmp_path)
    found = verify_artifact(path, shapes=(SampleShape(),))
    assert found.is_equal
    assert any("requires input token_type_ids, which a plain call omits" in remark for remark in found.remarks)


def test_verify_sees_that_a_stand_in_is_none(tmp_path: Path) -> None:
    """An artifact that says that zeros are as good as nothing, although they are not."""
    weights, path = gpt2_with_types(tmp_path)
    assert verify_artifact(path, weights=weights, shapes=(SampleShape(),)).is_equal
    data = (path / MANIFEST_NAME).read_bytes()
    manifest = Manifest.from_bytes(data)
    (entry,) = [entry for entry in manifest.inputs if entry.name == "token_type_ids"]
    object.__setattr__(entry, "absent", 0)
    (path / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    found = verify_artifact(path, weights=weights, shapes=(SampleShape(),))
    assert not found.is_equal
    assert "logits of a plain call" in found.shapes[0].result


def test_verify_sees_a_decoder_that_begins_with_another_token(tmp_path: Path) -> None:
    model = tiny_model("bart", decoder_start_token_id=2)
    model.save_pretrained(tmp_path / "model")
    path = build(tmp_path / "model", out=tmp_path / "artifacts").path
    assert verify_artifact(path, weights=tmp_path / "model", shapes=(SampleShape(),)).is_equal
    manifest = Manifest.from_bytes((path / MANIFEST_NAME).read_bytes())
    object.__setattr__(manifest, "decoder", {"start": 9, "pad": 0})
    (path / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    found = verify_artifact(path, weights=tmp_path / "model", shapes=(SampleShape(),))
    assert not found.is_equal
    assert "logits of a plain call" in found.shapes[0].result


def test_types_of_two_sentences_reach_an_encoder(tmp_path: Path) -> None:
    """What a tokenizer gives for two sentences still reaches the model."""
    path = build(save_config("bert", tmp_path / "model"), out=tmp_path / "artifacts").path
    manifest = runtime.load(path).manifest
    assert {entry.name: entry.absent for entry in manifest.inputs} == {
        "input_ids": -1,
        "attention_mask": -1,
        "token_type_ids": 0,
    }
    ids = torch.randint(3, 128, (2, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert model_inputs(manifest, given)["token_type_ids"].count_nonzero() == 0
    assert model_inputs(manifest, given | {"token_type_ids": ids % 2})["token_type_ids"].count_nonzero() > 0
