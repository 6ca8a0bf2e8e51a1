"""Models, data and recipes with which runs of different numbers of workers are compared."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from runtime.data.token_file import DataOrigin, save_tokens
from tests.runtime.small import NARROW_W4, VOCABULARY, Small

LENGTHS = tuple(192 if number % 7 == 2 else 256 for number in range(23))  # 5696 tokens: 5 lanes of 4 or 5 samples
_INTEGERS = "{num_bits: 8, type: int, strategy: channel, symmetric: true}"
_GROUPS = "{num_bits: 4, type: int, strategy: group, group_size: 128, symmetric: true}"
_STATIC = "num_bits: 8, type: float, strategy: tensor, symmetric: true, dynamic: false"
_HEADS = f"targets: ['re:.*self_attn.*_proj'], weights: {_GROUPS}"
_MLP = f"targets: ['re:.*mlp.*'], weights: {_INTEGERS}, input_activations: {{{_STATIC}, observer: minmax}}"
_ALL = f"targets: [Linear], weights: {_INTEGERS}, input_activations: {{{_STATIC}, observer: static_minmax}}"
GPTQ, AWQ, SMOOTH, ROUTED, FLOATS = "gptq", "awq", "smoothquant", "routed experts", "experts in floats"
DENSE = {
    # Inputs of the MLP, keys and values have scales of a moving average.
    GPTQ: (
        "SpinQuantModifier: {rotations: [R3, R4]}\n"
        f"GPTQModifier: {{config_groups: {{a: {{{_HEADS}}}, b: {{{_MLP}}}}}, ignore: [lm_head], "
        f"kv_cache_scheme: {{{_STATIC}}}}}"
    ),
    AWQ: "AWQModifier: {}\nQuantizationModifier: {targets: Linear, scheme: W4A16_ASYM, ignore: [lm_head]}",
    SMOOTH: (
        "SpinQuantModifier: {transform_type: random-hadamard, seed: 1}\n"  # unties the head
        f"SmoothQuantModifier: {{}}\n"
        f"GPTQModifier: {{config_groups: {{a: {{{_ALL}}}}}, ignore: [lm_head], target: original}}"
    ),
}
MIXTURE = {
    ROUTED: f"GPTQModifier: {{{NARROW_W4}, fallback: rtn, target: original}}",
    FLOATS: "QuIPModifier: {}\nQuantizationModifier: {targets: Linear, scheme: NVFP4, ignore: [lm_head]}",
}


class Workshop:
    """A folder with models, data and recipes, and the command lines for them.

    Args:
        folder: exists.
        dense: the model of the recipes `DENSE`.
        mixture: the model of the recipes `MIXTURE`.
        lengths: of the samples.
        device: of the runs.
    """

    def __init__(
        self, folder: Path, dense: Small, mixture: Small, lengths: Sequence[int] = LENGTHS, device: str = "cpu"
    ) -> None:
        self.folder = folder
        self.device = device
        self.models = {**dict.fromkeys(DENSE, dense), **dict.fromkeys(MIXTURE, mixture)}
        self.data = write_samples(folder / "tokens.safetensors", lengths)
        for name, text in {**DENSE, **MIXTURE}.items():
            (folder / f"{name}.yaml").write_text(text)

    def out(self, name: str, size: int) -> Path:
        """The output of a run with so many workers; 0 for the single process."""
        return self.folder / f"{name}-{size}"

    def command(self, name: str, out: Path, *more: str) -> list[str]:
        """The command line of a calibration, named by its recipe."""
        model = self.models[name]
        paths = {"--weights": model.weights, "--data": self.data, "--recipe": self.folder / f"{name}.yaml", "-o": out}
        command = ["calibrate", str(model.artifact), *(str(part) for pair in paths.items() for part in pair)]
        command += ["--batch-size", "4", "--max-shard-size", "200KB", "--device", self.device, "--json"]
        command += more
        return command if name != ROUTED else [*command, "--no-moe-calibrate-all-experts"]


def write_samples(path: Path, lengths: Sequence[int]) -> Path:
    """Write a token file with random samples of these lengths."""
    generator = torch.Generator().manual_seed(3)
    samples = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths]
    origin = DataOrigin(tokenizer="bytes", tokenizer_digest="", vocab_size=VOCABULARY, sources=())
    save_tokens(path, samples, seq_len=max(lengths), origin=origin)
    return path


def unfinished(out: Path) -> Path:
    """The directory of an interrupted run."""
    return out.parent / f".{out.name}.run.partial"


def copy_unfinished(source: Path, target: Path) -> Path:
    """Copy an interrupted run, so that it can be resumed more than once."""
    shutil.copytree(unfinished(source), unfinished(target))
    return target


def files_of(directory: Path) -> dict[str, str]:
    """The sha256 of each file of a checkpoint."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}
