"""Peak memory: it does not grow with depth, the plan foretells it, and the peer needs a multiple.

    python tests/bench/bench_memory.py [--depths 8 16 32] [--hidden 1024] [--samples 32] [--seq-len 256]
    python tests/bench/bench_memory.py --peer-python PYTHON        # also the 1.1 B Llama beside llm-compressor

Llamas of random bf16 weights, in shards, one width and several depths, GPTQ W4A16 on the CPU, each run in a process of
its own. What `plan` says is taken from another process before. Limits: peaks of all depths within 10 %, each plan
within 15 % of what was measured, llm-compressor at 4 times ours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_peer
from processes import measure
from random_models import LLAMA_1B, make_llama

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
DEPTH_LIMIT, PLAN_LIMIT = 0.10, 0.15
RECIPES = {
    "gptq": "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n",
    "rtn": "QuantizationModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n",
    "awq": "AWQModifier: {}\nQuantizationModifier: {targets: Linear, scheme: W4A16_ASYM, ignore: [lm_head]}\n",
    "smoothquant": "SmoothQuantModifier: {}\nGPTQModifier: {targets: Linear, scheme: W8A8, ignore: [lm_head]}\n",
    "static": "QuantizationModifier: {config_groups: {all: {targets: [Linear], "
    "weights: {num_bits: 8, strategy: channel}, "
    "input_activations: {num_bits: 8, strategy: tensor, dynamic: false}}}, ignore: [lm_head]}\n",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Measured and planned, in bytes."""

    measured: int
    planned: int

    @property
    def error(self) -> float:
        """How far the plan is off, of what was measured."""
        return self.planned / self.measured - 1


def main() -> None:
    """One line a depth, then the spread, then the peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--recipe", choices=RECIPES, default="gptq", help="each is planned, and run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--activation-memory", help="handed on to both commands")
    parser.add_argument("--peer-python", help="an interpreter that has llm-compressor")
    options = parser.parse_args()
    peaks = []
    for depth in options.depths:
        config = sized(options.hidden, depth)
        peak = one(config, options)
        peaks.append(peak.measured)
        over = "" if abs(peak.error) <= PLAN_LIMIT else "  OVER THE LIMIT"
        print(
            f"{depth} layers: {peak.measured / 1e6:.0f} MB peak, {peak.planned / 1e6:.0f} MB planned, "
            f"{peak.error:+.1%}{over}",
            flush=True,
        )
    spread = max(peaks) / min(peaks) - 1
    print(f"depths differ by {spread:.1%}{'' if spread <= DEPTH_LIMIT else '  OVER THE LIMIT'}", flush=True)
    if options.peer_python:
        beside_peer(options)


def sized(hidden: int, depth: int) -> dict[str, Any]:
    """A Llama of this width and depth."""
    return LLAMA_1B | {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(hidden // 256, 1),
        "num_hidden_layers": depth,
    }


def one(config: dict[str, Any], options: Namespace) -> Peak:
    """Make a model, plan its calibration, run it."""
    from seqbuild.build import build
    from seqbuild.ship.tokens import tokenize_files

    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-"))
    try:
        model = make_llama(folder / "model", config)
        artifact = build(model, out=folder).path
        tokens, recipe = folder / "calib.safetensors", folder / "recipe.yaml"
        text = ROOT / "demo" / "text" / "calib.jsonl"
        tokenize_files(model, [text], pack=True, out=tokens, num_samples=options.samples, seq_len=options.seq_len)
        recipe.write_text(RECIPES[options.recipe])
        common = ["--recipe", str(recipe), "--device", "cpu", "--batch-size", str(options.batch_size)]
        if options.activation_memory is not None:
            common += ["--activation-memory", options.activation_memory]
        command = [sys.executable, "-m", "runtime", "calibrate", str(artifact), "--weights", str(model)]
        command += ["--data", str(tokens), "-o", str(folder / "out"), *common]
        planned = plan(artifact, options, common)
        return Peak(measured=measure(command, options.threads, cwd=ROOT).peak_bytes, planned=planned)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plan(artifact: Path, options: Namespace, common: list[str]) -> int:
    """The host memory that the command line foretells."""
    command = [sys.executable, "-m", "runtime", "plan", str(artifact), "--json", *common]
    command += ["--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return int(json.loads(said)["total"]["peak_host_bytes"])


def beside_peer(options: Namespace) -> None:
    """The 1.1 B Llama with both tools, 8 samples of 128 tokens."""
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-"))
    try:
        bench_peer.run(
            Namespace(
                model=None,
                random="1b",
                data=ROOT / "demo" / "text" / "calib.jsonl",
                samples=8,
                seq_len=128,
                rounds=1,
                threads=options.threads,
                recipe=["GPTQ W4A16"],
                peer_python=options.peer_python,
            ),
            folder,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
