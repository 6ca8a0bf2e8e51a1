"""What portable code costs to run: the model's own forward beside the chains that were compiled from it.

A random Llama and a random mixture of experts on the CPU; each round runs a batch through the model itself, through the
chain that stops at the layers and through the portable one, in turn, so that what else the machine does falls on all.

    python tests/bench/bench_portable.py
    python tests/bench/bench_portable.py --rounds 30 --batch 2 --sequence 512
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers

import runtime
from runtime.chain import Artifact
from seqbuild.build import build
from seqbuild.verify.running import EAGER_EXPERTS, configured, run_chain, run_model, with_weights

LIMIT = 1.10
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**SIZES, "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "head_dim": 64},
    ),
}


def main() -> None:
    """One line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for name in MODELS:
        measure(name, options.rounds, options.batch, options.sequence)


def measure(name: str, rounds: int, batch: int, sequence: int) -> None:
    """Compile one model in both ways and time all three."""
    config_class, model_class, sizes = MODELS[name]
    config = getattr(transformers, config_class)(**sizes, architectures=[model_class])
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-"))
    try:
        config.save_pretrained(folder / "model")
        torch.manual_seed(0)
        model = getattr(transformers, model_class)._from_config(config, attn_implementation="sdpa").eval()
        artifacts = {leaves: load(folder, leaves) for leaves in ("target", "linear")}
        assert artifacts["linear"].manifest.is_portable
        ids = torch.randint(0, sizes["vocab_size"], (batch, sequence))
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        runs: dict[str, Callable[[], Any]] = {"model": lambda: run_model(model, sample)}
        for leaves, artifact in artifacts.items():
            runs[leaves] = chain(artifact, model, sample)
        seconds = time_in_turn(runs, rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ratios = {
        leaves: statistics.median(ours / its for ours, its in zip(seconds[leaves], seconds["model"], strict=True))
        for leaves in artifacts
    }
    over = "" if ratios["linear"] <= LIMIT else "  OVER THE LIMIT"
    print(
        f"{name}, {batch} x {sequence} tokens: {statistics.median(seconds['model']):.3f} s a batch; down to the layers "
        f"{ratios['target']:.3f}, portable {ratios['linear']:.3f} times that{over}",
        flush=True,
    )


def load(folder: Path, leaves: str) -> Artifact:
    """The model, compiled in one way."""
    return runtime.load(build(folder / "model", out=folder, attn_implementation="sdpa", leaves=leaves).path)


def chain(artifact: Artifact, model: Any, sample: Any) -> Callable[[], Any]:
    """What runs a batch through an artifact's chain with the model's weights."""
    twin = with_weights(artifact, model)

    def call() -> Any:
        with configured(twin, EAGER_EXPERTS):
            return run_chain(artifact.subgraphs, twin, sample)

    return call


def time_in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
