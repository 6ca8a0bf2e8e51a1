"""Experts of a mixture, quantized: perplexity on a trained model, and memory on a synthetic layer of many.

    python tests/bench/bench_experts.py MODEL CALIB.jsonl EVAL.jsonl    # a trained mixture, W4A16
    python tests/bench/bench_experts.py --memory                        # 64 experts, statistics bounded and not

Each run is a process of its own; peaks are its resident memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

_GROUPS = "{{num_bits: {bits}, type: int, symmetric: true, strategy: group, group_size: 128}}"
_RECIPE = "{modifier}: {{config_groups: {{a: {{targets: [Linear], weights: " + _GROUPS + "}}}}, ignore: [lm_head]}}\n"
_RUNS = {
    "round to nearest": ("QuantizationModifier", []),
    "GPTQ, all tokens": ("GPTQModifier", []),
    "GPTQ, routed tokens": ("GPTQModifier", ["--no-moe-calibrate-all-experts"]),
}
_MEASURED = """
import resource, sys
import runtime.cli.app
code = runtime.cli.app.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)
sys.exit(code)
"""
# A layer of 64 experts: Gram matrices of 64 * 512 * 512 * 4 bytes, 67 MB, besides that of their common input.
_WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "num_experts_per_tok": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def run(*arguments: object) -> tuple[str, float]:
    """A command of the runtime in a process of its own: what it printed, and its peak in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout, float(done.stderr.splitlines()[-1])


def recipe(folder: Path, modifier: str, bits: int) -> Path:
    """A recipe file of one modifier."""
    path = folder / f"{modifier}-{bits}.yaml"
    text = _RECIPE.format(modifier=modifier, bits=bits)
    if modifier == "GPTQModifier":  # of routed tokens, some experts may see none
        text = text.replace("ignore:", "fallback: rtn, ignore:")
    path.write_text(text)
    return path


def quality(model: Path, calibration: Path, evaluation: Path, folder: Path) -> None:
    """Perplexities, a line each."""
    from seqbuild.build import build

    artifact = build(model, out=folder).path
    common = ["--seq-len", 256]

    def perplexity(weights: Path) -> float:
        out, _ = run("evaluate", artifact, "--weights", weights, "--data", evaluation, *common, "--json")
        return float(json.loads(out)["perplexity"])

    print(f"{'original':<32}{perplexity(model):10.3f}")
    for bits in (4, 3):
        for name, (modifier, options) in _RUNS.items():
            out = folder / f"{name}-{bits}"
            source = ["--weights", model, "--recipe", recipe(folder, modifier, bits), "-o", out]
            data = ["--data", calibration, "--samples", 128, *common, "--tokenizer", model]
            text, _ = run("calibrate", artifact, *source, *data, *options, "--json")
            fewest = min(module["num_tokens"] for module in json.loads(text)["modules"])
            print(f"{f'{name}, {bits} bits':<32}{perplexity(out):10.3f}   fewest tokens {fewest}", flush=True)


def memory(folder: Path) -> None:
    """Peaks with and without a bound."""
    import torch
    import transformers

    from runtime.data.token_file import DataOrigin, save_tokens
    from seqbuild.build import build

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**_WIDE, dtype="float32")
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder / "model")
    artifact = build(folder / "model", out=folder).path
    ids = list(torch.randint(3, 512, (16, 128)))
    origin = DataOrigin(tokenizer="none", tokenizer_digest="", vocab_size=512, sources=())
    save_tokens(folder / "tokens.safetensors", ids, seq_len=128, origin=origin)
    digests = set()
    for bound in (None, "32MiB", "8MiB"):
        out = folder / f"out-{bound}"
        source = ["--weights", folder / "model", "--recipe", recipe(folder, "GPTQModifier", 4), "-o", out]
        options = [] if bound is None else ["--statistics-memory", bound]
        _, peak = run("calibrate", artifact, *source, "--data", folder / "tokens.safetensors", *options, "--json")
        digests.add((out / "model.safetensors").read_bytes())
        print(f"statistics bounded by {bound or 'nothing':<8} peak {peak:8.1f} MiB", flush=True)
    print("the checkpoints are the same bytes" if len(digests) == 1 else "THE CHECKPOINTS DIFFER")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path)
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.paths:
            quality(*arguments.paths, Path(folder))
        if arguments.memory or not arguments.paths:
            memory(Path(folder))


if __name__ == "__main__":
    main()
