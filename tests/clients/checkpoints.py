"""Make the checkpoints that other programs read, and what the runtime computes from them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from clients.models import DEMO, MODELS, ROOT, make_model
from clients.schemes import recipe_text

import runtime
from runtime.calibration import calibrate
from runtime.checkpoint.reader import Checkpoint
from runtime.data.inputs import model_inputs
from runtime.errors import SeqbuildError
from runtime.evaluation import evaluate
from runtime.experts.split import split_experts
from runtime.formats.rounded_inputs import input_quantization
from runtime.weights.parameters import Weights
from seqbuild.build import build

NUM_WINDOWS, WINDOW = 8, 128


@dataclass(frozen=True, kw_only=True)
class Made:
    """A checkpoint, or why there is none; what the runtime computes from it, and what the run warned of."""

    model: str
    scheme: str
    directory: Path
    error: str = ""
    logprobs: list[list[float]] | None = None
    perplexity: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model} | {self.scheme}"


class Workshop:
    """Models, artifacts and checkpoints in a folder, reused while it is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        samples = runtime.load_tokens(ROOT / "demo/text/eval.jsonl", tokenizer_dir=DEMO, num_samples=8, seq_len=WINDOW)
        text = torch.stack([torch.as_tensor(ids) for ids in samples.samples])
        generator = torch.Generator().manual_seed(2)
        self.windows = {
            "text": text,
            "random": torch.randint(3, 512, (NUM_WINDOWS, WINDOW), generator=generator),
        }

    def windows_of(self, model: str) -> str:
        """Which windows a model is given."""
        return "text" if MODELS[model] is None else "random"

    def make(self, model: str, scheme: str) -> Made:
        """Quantize, and compute; scheme "" is the original."""
        source = make_model(model, self.folder / "models" / model.split()[0])
        artifact = runtime.load(build(source, out=self.folder / "artifacts").path)
        if not scheme:
            return self._computed(artifact, Made(model=model, scheme="", directory=source))
        out = self.folder / "checkpoints" / f"{model}-{scheme}".replace(" ", "_")
        shutil.rmtree(out, ignore_errors=True)
        known = MODELS[model]
        ignore = ("lm_head",) if known is None else known.ignore
        ids_BS = self.windows[self.windows_of(model)]
        batches = [model_inputs(artifact.manifest, batch) for batch in runtime.batches(list(ids_BS), 4)]
        recipe = runtime.Recipe.from_text(recipe_text(scheme, ignore), "recipe.yaml")
        try:
            result = calibrate(artifact, weights=source, recipe=recipe, batches=batches, out=out)
        except SeqbuildError as error:
            return Made(model=model, scheme=scheme, directory=out, error=str(error).splitlines()[0])
        found = Made(model=model, scheme=scheme, directory=out, warnings=result.remarks)
        return self._computed(artifact, found)

    def without_input_rounding(self, made: Made) -> Made:
        """A copy whose config does not say that inputs are rounded, which is what some readers compute."""
        out = made.directory.with_name(made.directory.name + "-inputs")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made.directory, out)
        config = json.loads((out / "config.json").read_text())
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None
        (out / "config.json").write_text(json.dumps(config))
        source = make_model(made.model, self.folder / "models" / made.model.split()[0])
        artifact = runtime.load(build(source, out=self.folder / "artifacts").path)
        return self._computed(artifact, Made(model=made.model, scheme=made.scheme, directory=out))

    def _computed(self, artifact: runtime.Artifact, made: Made) -> Made:
        ids_BS = self.windows[self.windows_of(made.model)]
        inputs = model_inputs(artifact.manifest, next(iter(runtime.batches(list(ids_BS), len(ids_BS)))))
        measured = evaluate(artifact, weights=made.directory, batches=[inputs])
        logits = _logits(artifact, made.directory, inputs).float()
        found = logits[:, :-1].log_softmax(-1).gather(-1, ids_BS[:, 1:, None])[..., 0]
        fields = {key: getattr(made, key) for key in ("model", "scheme", "directory", "error", "warnings")}
        return Made(**fields, logprobs=found.tolist(), perplexity=measured.perplexity)


def _logits(artifact: runtime.Artifact, directory: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    checkpoint = Checkpoint(directory)
    if checkpoint.is_quantized:
        artifact = split_experts(artifact, checkpoint)
    dtype = getattr(torch, artifact.manifest.model.dtype)
    model = artifact.empty_model(dtype)
    source = Weights(artifact, checkpoint, dtype, model)
    source.load(model, artifact.manifest.parameters, torch.device("cpu"))
    for name in artifact.manifest.parameters:
        source.load_input_parts(model, name)
    values, outputs = dict(inputs), {}
    with torch.no_grad(), input_quantization(model, source.schemes):
        for subgraph in artifact.subgraphs:
            outputs = subgraph.forward(model, **{name: values[name] for name in subgraph.input_names})
            values.update(outputs)
    logits: torch.Tensor = outputs["logits"]
    return logits
