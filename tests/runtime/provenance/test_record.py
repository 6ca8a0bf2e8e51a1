"""The record has canonical bytes, and a reader that rejects everything else with one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from huggingface_hub import ModelCard

from runtime.errors import WeightsError
from runtime.provenance import record as module
from runtime.provenance.card import card_text
from runtime.provenance.record import (
    RECORD_NAME,
    ArtifactFacts,
    CardFacts,
    DataFacts,
    EvaluationFacts,
    FileDigest,
    GroupFacts,
    ModelFacts,
    ModuleFacts,
    NamedDigest,
    OutputFacts,
    ProvenanceRecord,
    RecipeFacts,
    WeightsFacts,
    encode_record,
    read_record,
)

HOSTILE = "a|b`c`<script>\n# x [y](z) *w* \x1b[31m"


def record(**changes: Any) -> ProvenanceRecord:
    card = CardFacts(license="mit", language=("en", "no"), pipeline_tag="text-generation")
    model = ModelFacts(
        name="m", hub_id="owner/m", revision="ab", class_name="LlamaForCausalLM", model_type="llama", card=card
    )
    module_facts = ModuleFacts(
        name="model.layers.0.q_proj",
        algorithm="gptq",
        scheme="4 bit int weights in groups of 128",
        error=0.1,
        loss=float("nan"),
        damping=0.01,
        num_tokens=9,
        num_bytes=8,
        num_dead=1,
        fallback="",
    )
    recipe = RecipeFacts(
        sha256="cd",
        modifiers=("GPTQModifier",),
        own_modifiers=(),
        groups=(GroupFacts(name="W4A16", scheme="4 bit", num_modules=1),),
        cache="",
    )
    files = (FileDigest(name="model.safetensors", bytes=3, sha256="ef"),)
    text = (NamedDigest(name="text.jsonl", sha256="12"),)
    values = {
        "format": "seqbuild-provenance",
        "format_version": (1, 0),
        "versions": {"seqbuild": "0.2.0", "torch": "2.13.0"},
        "model": model,
        "artifact": ArtifactFacts(sha256="34", input_key="56"),
        "recipe": recipe,
        "weights": WeightsFacts(form="files", bytes=100, sha256="78", files=files),
        "data": DataFacts(sources=text, num_samples=1, num_tokens=9, settings={"seed": "0"}, inputs_sha256="9a"),
        "options": {"device": "cpu"},
        "modules": (module_facts,) * 2,
        "unquantized": ("lm_head",),
        "unreached": (),
        "num_caches": 0,
        "warnings": ("warning: ünï",),
        "serving": ("vllm serve PATH",),
        "output": OutputFacts(bytes=30, files=files),
        "evaluation": EvaluationFacts(before=10.0, after=11.0, num_tokens=8, sources=text),
        "command": "seqbuild quantize owner/m --recipe recipe.yaml -o OUT",
    }
    return ProvenanceRecord(**(values | changes))


def write(folder: Path, data: bytes) -> Path:
    (folder / RECORD_NAME).write_bytes(data)
    return folder


def test_reading_and_writing_are_inverse(tmp_path: Path) -> None:
    data = encode_record(record())
    assert encode_record(read_record(write(tmp_path, data))) == data
    lines = data.decode().splitlines()
    assert sum("q_proj" in line for line in lines) == 2  # a line for each module
    assert lines[0] == "{" and lines[-1] == "}" and "ünï" in data.decode()
    values = json.loads(data)
    assert list(values) == [field.name for field in msgspec.structs.fields(ProvenanceRecord)]
    assert values["modules"][0]["loss"] is None and values["format_version"] == [1, 0]


def test_a_later_minor_version_is_read_without_its_new_keys(tmp_path: Path) -> None:
    values = json.loads(encode_record(record())) | {"format_version": [1, 7], "new": {"a": 1}}
    values["model"]["new"] = 1
    found = read_record(write(tmp_path, json.dumps(values).encode()))
    assert found.model == record().model and found.format_version == (1, 7)


def changed(**changes: Any) -> bytes:
    return json.dumps(json.loads(encode_record(record())) | changes).encode()


REFUSED = {
    "empty": (b"", "cannot be read"),
    "no JSON": (b"{", "cannot be read"),
    "a list": (b"[]", "cannot be read"),
    "no version": (b"{}", "missing required field `format`"),
    "other format": (changed(format="x"), "its format is 'x', not 'seqbuild-provenance'"),
    "other version": (changed(format_version=[2, 3]), "has format version 2.3, and this release reads 1.0"),
    "old version": (changed(format_version=[0, 9]), "has format version 0.9, and this release reads 1.0"),
    "types": (changed(modules=[{"name": 1}]), "Expected `str`, got `int` - at `$.modules[0].name`"),
    "missing": (b'{"format": "seqbuild-provenance", "format_version": [1, 0]}', "missing required field `versions`"),
    "large numbers": (changed(num_caches=10**40), "Expected `int` <= 4611686018427387904 - at `$.num_caches`"),
    "negative numbers": (changed(num_caches=-1), "Expected `int` >= 0 - at `$.num_caches`"),
    "numbers without end": (
        changed(num_caches=1).replace(b'"num_caches": 1', b'"num_caches": 1e999'),
        "cannot be read",
    ),
    "nested": (b'{"a":' * 100_000, "cannot be read"),
    "no text": (b'{"format": "\xff"}', "cannot be read"),
    "surrogates": (changed(command="\ud800"), "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_rejected(tmp_path: Path, name: str) -> None:
    data, part = REFUSED[name]
    with pytest.raises(WeightsError) as caught:
        read_record(write(tmp_path, data))
    assert part in str(caught.value) and RECORD_NAME in str(caught.value)


def test_it_must_be_a_file_of_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match=r"has no seqbuild\.json \(pass a directory that seqbuild has quantized\)"):
        read_record(tmp_path)
    monkeypatch.setattr(module, "LARGEST_RECORD", 99)
    with pytest.raises(WeightsError, match="it has more than 99 bytes"):
        read_record(write(tmp_path, encode_record(record())))
    (tmp_path / RECORD_NAME).unlink()
    os.mkfifo(tmp_path / RECORD_NAME)
    with pytest.raises(WeightsError, match="it is a pipe"):
        read_record(tmp_path)


def test_the_card_is_one_that_the_hub_reads(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card_text(record()))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": "owner/m",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "license": "mit",
        "language": ["en", "no"],
        "pipeline_tag": "text-generation",
        "tags": ["compressed-tensors", "seqbuild"],
    }
    assert "| perplexity | 10.0000 | 11.0000 (+10.00%) |" in card.text
    assert "    vllm serve PATH\n" in card.text
    plain = ModelFacts(name="m", hub_id="", revision="", class_name="A", model_type="a", card=CardFacts())
    (tmp_path / "README.md").write_text(card_text(record(model=plain, evaluation=None, data=None, modules=())))
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert list(data) == ["library_name", "tags"]


def test_names_cannot_change_the_card() -> None:
    hostile = ModelFacts(name=HOSTILE, hub_id="", revision="", class_name="A", model_type="a", card=CardFacts())
    modules = (msgspec.structs.replace(record().modules[0], name=HOSTILE),)
    text = card_text(record(model=hostile, modules=modules, unquantized=(HOSTILE,), warnings=(HOSTILE,)))
    assert text.count("\n# ") == 1 and "<script>" not in text and "\x1b" not in text
    command = card_text(record(command="seqbuild calibrate --weights 'a\n\n# x\n---\n' -o OUT"))
    assert "\n    seqbuild calibrate --weights 'a\n\n    # x\n    ---\n    ' -o OUT\n" in command
    assert r"a\|b\`c\`\<script\> \# x \[y\](z) \*w\* " in text
