"""What a program can make of opaque steps: real artifacts, to which lines have been added and whose digests all fit."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

import runtime
from runtime.artifact.encoding import sha256
from runtime.artifact.manifest import MANIFEST_NAME, Manifest
from runtime.chain import check
from runtime.cli.app import main
from runtime.errors import ArtifactError, TraceError
from runtime.language.opaque import step_call_problem, why_refused
from runtime.language.opaque_calls import GuardedStep
from runtime.planning.request import plan_artifact
from runtime.recipe.recipe import Recipe
from seqbuild.build import build
from seqbuild.sample.inputs import default_sample
from tests.attacks.attack import OWNED, watched
from tests.zoo import cases, small_model

LLAVA = "transformers.models.llava.modeling_llava"
FEATURES = f"{LLAVA}:LlavaModel.get_image_features"
COVERAGE = Path(__file__).parents[2] / "docs" / "coverage.md"
CASES = {case.name: case for case in cases()}
Compiled = Callable[..., Path]


def tampered(
    root: Path, line: str, opaque: Sequence[str], objects: Sequence[str], before: str = "    return {"
) -> Path:
    """Put a line into the first program, and make manifest and digests say so."""
    manifest = Manifest.from_bytes((root / MANIFEST_NAME).read_bytes())
    first = manifest.subgraphs[0]
    text = (root / first.file).read_text()
    data = text.replace(before, f"    {line}\n{before}", 1).encode()
    assert data.decode() != text
    (root / first.file).write_bytes(data)
    entry = replace(
        first,
        opaque=tuple(dict.fromkeys((*first.opaque, *opaque))),
        objects=tuple(dict.fromkeys((*first.objects, *objects))),
    )
    files = tuple(
        replace(file, bytes=len(data), sha256=sha256(data)) if file.path == first.file else file
        for file in manifest.files
    )
    changed = replace(manifest, subgraphs=(entry, *manifest.subgraphs[1:]), files=files)
    (root / MANIFEST_NAME).write_bytes(changed.to_bytes())
    return root


@pytest.fixture(scope="module")
def llava(compiled: Compiled) -> Path:
    return compiled("image-text-to-text/llava", attn_implementation="eager", leaves="target")


def copied(source: Path, place: Path) -> Path:
    import shutil

    return Path(shutil.copytree(source, place / source.name))


@pytest.fixture(scope="module")
def granite_speech(compiled: Compiled) -> Path:
    return compiled("seq2seq/granite_speech", attn_implementation="eager", leaves="target", text_only=True)


@pytest.mark.parametrize("module", ["", "model"])
def test_generate_with_code_of_its_own_is_never_called(
    granite_speech: Path,
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`custom_generate` would be executed, `trust_remote_code` is what the artifact says and not the user."""
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "evil" / "custom_generate"
    evil.mkdir(parents=True)
    (evil / "generate.py").write_text(
        f"open({str(tmp_path / OWNED)!r}, 'w')\ndef generate(*args, **kwargs): return 0\n"
    )
    root = copied(granite_speech, tmp_path)
    step = "transformers.models.granite_speech.modeling_granite_speech:GraniteSpeechForConditionalGeneration.generate"
    arguments = f'self.get_submodule("{module}"), custom_generate="{evil.parent}", trust_remote_code=True'
    tampered(root, f'evil = run.opaque["{step}"]({arguments})', (step,), (module,))
    for command in (["check", str(root)], ["plan", str(root), "--samples", "1", "--seq-len", "8"]):
        with watched(root) as seen:
            assert main(command) == 2
        assert "custom_generate" in capsys.readouterr().err
        assert seen == [] and not (tmp_path / OWNED).exists()
    with pytest.raises(ArtifactError, match="custom_generate"):
        runtime.load(root, allow_version_skew=True, trust_remote_code=True)


def test_the_compiler_writes_no_step_that_hosts_refuse(tmp_path: Path) -> None:
    """Here the model itself has the method that would have to be called whole."""
    config = small_model(CASES["image-text-to-text/llava"]).config
    config.architectures = ["LlavaModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(TraceError, match="the whole model as an argument"):
        build(tmp_path, out=tmp_path / "artifacts", attn_implementation="eager", leaves="target")
    assert not list((tmp_path / "artifacts").glob("*/manifest.msgpack"))


def test_steps_of_an_ordinary_artifact_run(llava: Path) -> None:
    assert FEATURES in check(llava)[0].opaque_steps
    artifact = runtime.load(llava)
    model = small_model(CASES["image-text-to-text/llava"])
    sample = default_sample(model)
    values: dict[str, Any] = dict(sample)
    with torch.no_grad():
        for subgraph in artifact.subgraphs:
            values |= subgraph.forward(model, **{name: values[name] for name in subgraph.input_names})
        assert torch.equal(values["logits"], model(**sample).logits)


class Other(nn.Module):
    """Has what the step calls, and more than that."""

    def vision_tower(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("it was called")


def refused(step: GuardedStep, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        step(*args, **kwargs)
    return str(caught.value)


def test_a_step_is_handed_its_own_module_and_data_only() -> None:
    model = small_model(CASES["image-text-to-text/llava"])
    called: list[Any] = []
    step = GuardedStep(FEATURES, lambda *args, **kwargs: called.append((args, kwargs)))
    own, pixels = model.get_submodule("model"), torch.ones(1)
    assert "is called with a Other" in refused(step, Other(), pixels)
    assert "is called with a LlavaForConditionalGeneration" in refused(step, model, pixels)
    assert "does not accept the string '/etc/passwd'" in refused(step, own, pixels, "/etc/passwd")
    assert "the key 'debug_io'" in refused(step, own, pixels, image_sizes={"a": [{"debug_io": True}]})
    assert "accepts only data" in refused(step, own, pixels, print)
    assert "accepts only data" in refused(step, own, pixels, Path)
    assert "accepts only data" in refused(step, own, pixels, (own,))
    assert "accepts only data" in refused(step, own, pixels, {"a": sys})
    assert "accepts only data" in refused(step, own, pixels, Path("/etc/passwd"))
    assert called == []
    step(own, pixels, vision_feature_layer=-1, image_sizes={"a": (pixels, None, 1.5)})
    assert len(called) == 1


@pytest.fixture(scope="module")
def mistral(compiled: Compiled) -> Path:
    return compiled("causal LM/mistral", attn_implementation="eager", leaves="target")


@pytest.mark.parametrize("error", [OSError("a file"), ImportError("a module"), ArtifactError("a step"), KeyError(1)])
def test_what_code_raises_ends_a_plan(error: Exception, mistral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan does without what needs values. What else goes wrong in an artifact's code must be seen."""
    artifact = runtime.load(mistral)
    recipe = Recipe.from_text("QuantizationModifier: {targets: Linear, scheme: FP8}", "a recipe")
    sizes: dict[str, Any] = {"num_samples": 1, "seq_len": 8, "batch_size": 1, "recipe": recipe}
    plan_artifact(artifact, **sizes)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(MistralDecoderLayer, "forward", fail)
    with pytest.raises((type(error), ArtifactError), match=str(error)):
        plan_artifact(artifact, **sizes)
    monkeypatch.setattr(MistralDecoderLayer, "forward", lambda *args, **kwargs: args[1].sum().item())
    assert any(step.is_estimated for step in plan_artifact(artifact, **sizes).plan.steps)


STEPS = [
    "llava.modeling_llava:LlavaModel.get_image_features",
    "qwen2_vl.modeling_qwen2_vl:Qwen2VLModel.get_rope_index",
    "big_bird.modeling_big_bird:BigBirdLayer.set_attention_type",
    "blt.modeling_blt:BltPatcher.patch_lengths_from_entropies",
    "dinov2.modeling_dinov2:Dinov2Embeddings.interpolate_pos_encoding",
    "longt5.modeling_longt5:_split_into_blocks",
    "llama.modeling_llama:LlamaRotaryEmbedding.forward",
    "llama.modeling_llama:apply_rotary_pos_emb",
]


@pytest.mark.parametrize("name", STEPS)
def test_calculations_of_a_forward_are_allowed(name: str) -> None:
    assert why_refused(f"transformers.models.{name}") == ""


def test_masks_are_what_the_models_forward_calls() -> None:
    path = "transformers.masking_utils:create_causal_mask"
    assert why_refused(path, ("transformers.models.llama.modeling_llama",)) == ""
    assert "no forward" in why_refused(path)


def covered() -> Iterator[tuple[str, str]]:
    """Class of the model and name of each function that docs/coverage.md says to be called whole."""
    for line in COVERAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 12 and "/" in cells[1]:
            names = dict.fromkeys(name for cell in (cells[8], cells[10]) for name in cell.split(", "))
            yield from ((cells[2], name) for name in names if re.match(r"_?[a-z]|\w+\.", name))


@pytest.mark.wide
def test_every_step_of_the_coverage_table_is_allowed() -> None:
    import transformers

    folder = Path(transformers.__file__).parent / "models"
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(folder.glob("*/modeling_*.py"))}

    def homes(statement: str) -> list[Path]:
        return [file for file, text in texts.items() if f"\n{statement}" in text]

    paths: dict[str, None] = {}
    for class_name, name in covered():
        owner, _, method = name.rpartition(".")
        places = (
            homes(f"class {owner}(")
            if owner
            else [f for f in homes(f"def {method}(") if f in homes(f"class {class_name}(")]
        )
        for file in places:
            paths[f"transformers.models.{file.parent.name}.{file.stem}:{name}"] = None
    assert len(paths) > 100
    assert {path: why for path in paths if (why := why_refused(path))} == {}


@pytest.mark.parametrize(("word", "is_accepted"), [("full", True), ("default", True), ("video", False), ("x", False)])
def test_a_step_accepts_the_alternative_of_a_word_in_its_code(word: str, is_accepted: bool) -> None:
    path = "transformers.models.llava_onevision.modeling_llava_onevision:LlavaOnevisionModel.get_image_features"
    call = ast.parse(f"f(part, x, sizes, vision_feature_select_strategy={word!r})", mode="eval").body
    assert isinstance(call, ast.Call)
    problem = step_call_problem(call, path)
    assert problem == "" if is_accepted else word in problem
