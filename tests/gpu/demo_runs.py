"""The demo model on CUDA: its batches of text, and the options of a GPTQ run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import runtime
from runtime.data.inputs import model_inputs
from seqbuild.build import build

DEMO = Path(__file__).resolve().parents[2] / "demo"
RECIPE = "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}"


def demo_artifact(folder: Path) -> runtime.Artifact:
    """Compile the demo model."""
    return runtime.load(build(DEMO / "model", out=folder).path)


def demo_batches(
    artifact: runtime.Artifact, name: str, *, num_samples: int, seq_len: int = 256, batch_size: int = 8
) -> list[dict[str, torch.Tensor]]:
    """Batches of the text `calib` or `eval`."""
    text = DEMO / "text" / f"{name}.jsonl"
    tokens = runtime.load_tokens(text, tokenizer_dir=DEMO / "model", num_samples=num_samples, seq_len=seq_len)
    return [model_inputs(artifact.manifest, batch) for batch in runtime.batches(tokens.samples, batch_size)]


def demo_options(folder: Path, **sizes: int) -> dict[str, Any]:
    """The arguments of `runtime.calibrate` but for the output directory; sizes are those of `demo_batches`."""
    artifact = demo_artifact(folder)
    return {
        "artifact": artifact,
        "weights": DEMO / "model",
        "recipe": runtime.Recipe.from_text(RECIPE, "test"),
        "batches": demo_batches(artifact, "calib", **sizes),
        "device": "cuda",
    }
