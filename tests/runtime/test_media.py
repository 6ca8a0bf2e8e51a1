"""Models that see and hear are calibrated with images and sounds, by their real processors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import runtime
import seqbuild.cli.app
from runtime.cli.batches import BatchOptions, make_batches
from runtime.data.named_tensors import NamedSamples
from runtime.data.options import DataOptions
from runtime.data.token_file import read_token_file
from runtime.errors import DataError
from runtime.quantize.statistics import InputStatistics
from seqbuild.build import build
from seqbuild.sample.inputs import default_sample
from seqbuild.ship.tokens import tokenize_files
from tests.runtime.place import Run, assert_refused
from tests.runtime.small import Small, Stop, directory_bytes, nameless_bytes, recipe, run_weights, stop_at

pytest.importorskip("PIL")
pytest.importorskip("soundfile")
pytest.importorskip("soxr")

from PIL import Image

from tests.runtime.media_models import read_sound, rows_of, save, write_image, write_video

QUESTION = {"type": "text", "text": "What is it?"}
# Everything but the layers of the language model.
_NOT_TEXT = "lm_head, proj_out, 're:.*(vision|visual|audio_tower|projector|encoder).*'"
GPTQ = recipe(f"targets: Linear, scheme: W4A16, ignore: [{_NOT_TEXT}]", modifier="GPTQModifier")


def _has_torchvision() -> bool:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # one for another torch lacks its operators
        return False
    return True


needs_torchvision = pytest.mark.skipif(not _has_torchvision(), reason="needs torchvision")
families = pytest.mark.parametrize(
    "family",
    [
        "gemma3",
        "llava",
        "whisper",
        pytest.param("qwen2_5_vl", marks=needs_torchvision),
        pytest.param("qwen3_vl", marks=[needs_torchvision, pytest.mark.wide]),
        pytest.param("qwen2_audio", marks=pytest.mark.wide),
    ],
)


@dataclass(frozen=True)
class Seeing:
    """A model with its processor, rows of data, the token file of these, and the artifact compiled for it."""

    folder: Path
    small: Small

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def data(self) -> Path:
        return self.folder / "data.safetensors"

    def batches(self, data: Path | None = None, batch_size: int = 4) -> list[dict[str, torch.Tensor]]:
        options = DataOptions(sources=(data or self.data,))
        chosen = BatchOptions(data=options, tokenizer=None, weights=self.small.weights, batch_size=batch_size)
        return make_batches(self.small.load(), chosen)

    def samples(self) -> NamedSamples:
        found = read_token_file(self.data)
        assert isinstance(found, NamedSamples)
        return found

    def load_model(self) -> Any:
        config = transformers.AutoConfig.from_pretrained(self.small.weights)
        return getattr(transformers, config.architectures[0]).from_pretrained(self.small.weights).eval()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_dir: Path) -> Callable[[str], Seeing]:
    made: dict[str, Seeing] = {}

    def make(family: str) -> Seeing:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            weights = save(family, byte_tokenizer_dir, folder / "model")
            rows = rows_of(family, folder)
            tokenize_files(weights, [rows], num_samples=None, seq_len=256, pack=True, out=folder / "data.safetensors")
            # Layers are traced through where that takes seconds.
            leaves = "auto" if family in ("gemma3", "whisper") else "target"
            path = build(weights, out=folder / "art", sample=folder / "data.safetensors", leaves=leaves).path
            made[family] = Seeing(folder, Small(weights, path))
        return made[family]

    return make


def _of_transformers(family: str, place: Seeing) -> Iterator[Mapping[str, Any]]:
    """The inputs that the processor makes by transformers' own way from messages to tensors."""
    processor = transformers.AutoProcessor.from_pretrained(place.small.weights)
    for line in place.rows.read_text().splitlines():
        row = json.loads(line)
        if family == "whisper":
            sound = read_sound(place.folder / row["audio"])
            yield processor(audio=sound, sampling_rate=16000, text=row["text"], return_tensors="pt")
            continue
        kind = next((kind for kind in ("image", "audio") if kind in row), "")
        messages = row.get("messages") or [
            {"role": "user", "content": [{"type": kind, kind: row[kind]}, {"type": "text", "text": row["text"]}]}
        ]
        for message in messages:
            if isinstance(message["content"], str):
                message["content"] = [{"type": "text", "text": message["content"]}]
            for part in message["content"]:
                part |= {"image": Image.open(place.folder / part["image"])} if "image" in part else {}
                part |= {"audio": read_sound(place.folder / part["audio"])} if "audio" in part else {}
        yield processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")


@families
def test_samples_are_what_the_processor_makes(family: str, seeing: Callable[[str], Seeing]) -> None:
    place = seeing(family)
    samples = place.samples().samples
    expected = list(_of_transformers(family, place))
    assert len(samples) == len(expected)
    for sample, theirs in zip(samples, expected, strict=True):
        # Whisper's labels begin with the token that the decoder begins with, which the shift adds.
        labels = theirs["labels"][:, 1:] if family == "whisper" else sample["labels"]
        assert torch.equal(sample["labels"], labels)
        if family == "whisper":
            assert torch.equal(sample["decoder_input_ids"], theirs["labels"][:, :-1])
        assert sample.keys() - {"labels", "decoder_input_ids"} == theirs.keys() - {"labels"}
        assert all(torch.equal(sample[name], theirs[name]) for name in theirs.keys() - {"labels"})


@families
def test_the_generated_sample_has_the_inputs_of_the_processor(family: str, seeing: Callable[[str], Seeing]) -> None:
    place = seeing(family)
    model = place.load_model()
    generated = default_sample(model)
    sample = max(place.samples().samples, key=len)
    stand_ins = {"decoder_attention_mask"} if family == "whisper" else set()
    assert generated.keys() - stand_ins == sample.keys() - {"labels"}
    for name in generated.keys() - stand_ins:
        assert generated[name].dim() == sample[name].dim(), name
        assert generated[name].is_floating_point() == sample[name].is_floating_point(), name


@families
def test_chain_equals_the_model_on_the_inputs_of_the_processor(family: str, seeing: Callable[[str], Seeing]) -> None:
    place = seeing(family)
    model = place.load_model()
    names = {entry.name for entry in place.small.load().manifest.inputs}
    for batch in place.batches():
        inputs = {name: value for name, value in batch.items() if name in names}
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits
        found = run_weights(place.small, place.small.weights, inputs)["logits"]
        assert torch.equal(found, expected)


@families
def test_statistics_are_those_of_the_model(
    family: str, seeing: Callable[[str], Seeing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first measured input has the second moments of the original model, called with each row alone."""
    place = seeing(family)
    seen: list[tuple[InputStatistics, torch.Tensor]] = []
    add = InputStatistics.add

    def recording(
        self: InputStatistics, inputs: torch.Tensor, counts: torch.Tensor | None, originals: torch.Tensor | None
    ) -> None:
        rows = inputs.flatten(0, -2)
        seen.append((self, rows if counts is None else rows[counts.flatten()]))
        add(self, inputs, counts, originals)

    monkeypatch.setattr(InputStatistics, "add", recording)
    batches = place.batches()
    result = runtime.calibrate(
        place.small.load(), weights=place.small.weights, recipe=GPTQ, batches=batches, out=tmp_path / "out"
    )
    first = torch.cat([rows for statistics, rows in seen if statistics is seen[0][0]])
    model, expected = place.load_model(), list[torch.Tensor]()
    module = model.get_submodule(result.modules[0].name)
    module.register_forward_pre_hook(lambda _, args, kwargs: expected.append(args[0].flatten(0, -2)), with_kwargs=True)
    for sample in place.samples().samples:
        with torch.no_grad():
            model(**{name: value for name, value in sample.items() if name != "labels"}, use_cache=False)
    theirs = torch.cat(expected)
    assert first.shape == theirs.shape
    torch.testing.assert_close(first.T @ first, theirs.T @ theirs, rtol=1e-4, atol=1e-3)
    tokens = sum(sample["labels"].numel() for sample in place.samples().samples)
    assert {module.num_tokens for module in result.modules} == {tokens}


@families
def test_plan_and_evaluate_take_the_data(family: str, seeing: Callable[[str], Seeing], run: Run) -> None:
    place = seeing(family)
    code, out, _ = run(["plan", str(place.small.artifact), "--data", str(place.data), "--json"])
    assert code == 0
    facts = json.loads(out)
    assert not any("assumed" in line for line in facts["remarks"])
    code, out, _ = run(
        [
            "evaluate",
            str(place.small.artifact),
            "--weights",
            str(place.small.weights),
            "--data",
            str(place.data),
            "--json",
        ]
    )
    assert code == 0
    model, total, count = place.load_model(), 0.0, 0
    for sample in place.samples().samples:
        labels = sample["labels"] if family == "whisper" else sample["labels"][:, 1:]
        with torch.no_grad():
            logits = model(**{name: value for name, value in sample.items() if name != "labels"}).logits
        logits = logits if family == "whisper" else logits[:, :-1]
        total += float(torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum"))
        count += int((labels != -100).sum())
    found = json.loads(out)
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(float(torch.tensor(total / count, dtype=torch.float64).exp()), rel=1e-3)


def test_a_stopped_run_gives_the_same_bytes(
    seeing: Callable[[str], Seeing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = seeing("llava")
    options: dict[str, Any] = {"weights": place.small.weights, "recipe": GPTQ, "batches": place.batches()}
    runtime.calibrate(place.small.load(), out=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(Stop):
            runtime.calibrate(place.small.load(), out=tmp_path / "stopped", **options)
    found = runtime.calibrate(place.small.load(), out=tmp_path / "stopped", resume=True, **options)
    assert found.resumed_at
    assert directory_bytes(tmp_path / "stopped") == directory_bytes(tmp_path / "whole")


def test_commands_take_rows_and_token_files_alike(seeing: Callable[[str], Seeing], tmp_path: Path, run: Run) -> None:
    place = seeing("gemma3")
    data = tmp_path / "again.safetensors"
    command = ["data", str(place.small.weights), str(place.rows), "-o", str(data), "--seq-len", "256"]
    code, out, _ = run(command, seqbuild.cli.app.main)
    assert code == 0
    assert "4 samples" in out and "pixel_values [1, 3, 56, 56] in 3 samples" in out
    assert data.read_bytes() == place.data.read_bytes()
    (tmp_path / "recipe.yaml").write_text(GPTQ.text)
    for name, source in (("rows", place.rows), ("file", data)):
        command = ["calibrate", str(place.small.artifact), "--weights", str(place.small.weights), "--data", str(source)]
        code, _, err = run([*command, "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / name)])
        assert code == 0, err
    assert nameless_bytes(tmp_path / "rows") == nameless_bytes(tmp_path / "file")


def test_texts_run_with_images_and_are_padded(seeing: Callable[[str], Seeing]) -> None:
    place = seeing("llava")
    batches = place.batches()
    both = batches[0]
    assert len(both["input_ids"]) == 2 and len(both["pixel_values"]) == 1
    assert not bool(both["attention_mask"].all())
    assert [len(batch["pixel_values"]) for batch in batches] == [1, 2]


def test_uncovered_sizes_and_inputs_are_named(seeing: Callable[[str], Seeing], tmp_path: Path) -> None:
    place = seeing("gemma3")
    write_image(tmp_path / "a.png", 60, 60)
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "a.png", "text": "x"}))
    processor = json.loads((place.small.weights / "processor_config.json").read_text())
    processor["image_processor"]["size"] = {"height": 84, "width": 84}
    other = tmp_path / "other"
    other.mkdir()
    for file in place.small.weights.glob("*.json*"):
        (other / file.name).write_bytes(file.read_bytes())
    (other / "chat_template.jinja").write_bytes((place.small.weights / "chat_template.jinja").read_bytes())
    (other / "processor_config.json").write_text(json.dumps(processor))
    data = tmp_path / "x.safetensors"
    tokenize_files(other, [tmp_path / "x.jsonl"], num_samples=None, seq_len=256, pack=True, out=data)
    with pytest.raises(DataError, match=r"pixel_values_2 = 84.*valid only if .*seqbuild compile MODEL --sample"):
        place.batches(data)
    text = build(place.small.weights, out=tmp_path / "text", text_only=True, leaves="target").path
    with pytest.raises(DataError, match=r"sample 0 has pixel_values \[1, 3, 56, 56\], but the inputs .* --sample"):
        Seeing(place.folder, Small(place.small.weights, text)).batches()


@needs_torchvision
@pytest.mark.wide
def test_videos_and_images(byte_tokenizer_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    weights = save("qwen2_5_vl", byte_tokenizer_dir, tmp_path / "model")
    write_video(tmp_path / "a.mp4", frames=12, width=64, height=48)
    write_video(tmp_path / "b.mp4", frames=20, width=48, height=64)
    write_image(tmp_path / "a.png", 60, 60)
    parts = [[{"type": "video", "video": name}, QUESTION] for name in ("a.mp4", "b.mp4")]
    parts += [[{"type": "image", "image": "a.png"}, QUESTION]] * 2
    rows = [{"messages": [{"role": "user", "content": content}]} for content in parts]
    rows.append({"messages": [{"role": "user", "content": "Nothing to see."}]})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = tmp_path / "data.safetensors"
    tokenize_files(weights, [tmp_path / "rows.jsonl"], num_samples=None, seq_len=512, pack=True, out=data)
    artifact = build(weights, out=tmp_path / "art", sample=data, leaves="target").path
    place = Seeing(tmp_path, Small(weights, artifact))
    runtime.calibrate(place.small.load(), weights=weights, recipe=GPTQ, batches=place.batches(), out=tmp_path / "out")
    model = place.load_model()
    names = {entry.name for entry in place.small.load().manifest.inputs}
    assert {"pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"} <= names
    for batch in place.batches():
        inputs = {name: value for name, value in batch.items() if name in names}
        with torch.no_grad():
            expected = model(**inputs, use_cache=False).logits
        assert torch.equal(run_weights(place.small, weights, inputs)["logits"], expected)


def test_quantize_in_one_call(seeing: Callable[[str], Seeing], tmp_path: Path, run: Run) -> None:
    place = seeing("gemma3")
    command = ["quantize", str(place.small.weights), "--scheme", "W4A16", "--data", str(place.rows)]
    command += ["--artifacts", str(tmp_path / "art"), "-o", str(tmp_path / "out"), "--json"]
    code, out, err = run(command, seqbuild.cli.app.main)
    assert code == 0, err
    assert json.loads(out)
    options: dict[str, Any] = {"weights": place.small.weights, "recipe": GPTQ, "batches": place.batches(batch_size=8)}
    runtime.calibrate(place.small.load(), out=tmp_path / "same", **options)
    made, same = (directory_bytes(tmp_path / name) for name in ("out", "same"))
    assert made["model.safetensors"] == same["model.safetensors"]


def test_rows_are_refused(seeing: Callable[[str], Seeing], tmp_path: Path, run: Run) -> None:
    place = seeing("gemma3")

    def refuse(row: dict[str, Any], *parts: str, model: Path = place.small.weights, seq_len: int = 256) -> None:
        (tmp_path / "x.jsonl").write_text(json.dumps(row))
        command = ["data", str(model), str(tmp_path / "x.jsonl"), "-o", str(tmp_path / "x.safetensors")]
        assert_refused(run([*command, "--seq-len", str(seq_len)], seqbuild.cli.app.main), *parts, program="seqbuild")
        assert not (tmp_path / "x.safetensors").exists()

    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "code.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n")
    write_image(tmp_path / "a.png", 60, 60)
    text = {"text": "x"}
    refuse(text | {"image": "https://host/a.png"}, "https://host/a.png", "nothing is downloaded")
    refuse(text | {"image": "missing.png"}, "missing.png of line 1", "No such file", str(tmp_path))
    refuse(text | {"image": "broken.png"}, "broken.png", "cannot be decoded")
    refuse(text | {"image": "code.eps"}, "code.eps", "cannot be decoded")
    refuse(text | {"image": "data:image/png;base64,@@"}, "not valid base64")
    refuse(text | {"audio": "a.wav"}, "has audio data, but Gemma3Processor has no feature_extractor")
    refuse({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type image without a file")
    refuse({"image": "a.png", "text": "a"}, "would cut the media", seq_len=8)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (bare / name).write_bytes((place.small.weights / name).read_bytes())
    refuse(text | {"image": "a.png"}, "bare has no processor", model=bare)
    stated = json.loads((place.small.weights / "processor_config.json").read_text())
    (bare / "processor_config.json").write_text(json.dumps(stated | {"processor_class": "BertModel"}))
    refuse(text | {"image": "a.png"}, "names BertModel as a processor", model=bare)


def test_missing_packages_are_named(
    seeing: Callable[[str], Seeing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    place = seeing("gemma3")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(DataError, match=r"a.png of line 1 .* requires the package pillow .*seqbuild-llm\[media\]"):
        tokenize_files(
            place.small.weights, [place.rows], num_samples=None, seq_len=256, pack=True, out=tmp_path / "x.safetensors"
        )
