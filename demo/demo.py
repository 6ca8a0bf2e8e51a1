"""The whole idea on a small trained model: compile, calibrate, evaluate, one table.

    python demo/demo.py [--out DIR] [--device cpu]

Quantizes demo/model with GPTQ and with round-to-nearest, at 4 and at 3 bits, and measures perplexity on text that
neither training nor calibration has seen.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import runtime
from runtime.calibration import calibrate
from runtime.data.inputs import model_inputs
from runtime.evaluation import evaluate
from seqbuild.build import build

HERE = Path(__file__).resolve().parent
MODEL, TEXT, RECIPES = HERE / "model", HERE / "text", HERE / "recipes"
NUM_SAMPLES, SEQ_LEN, BATCH_SIZE = 128, 256, 16
ROUNDS = (
    ("round-to-nearest, 4 bits", "w4_rtn.yaml"),
    ("GPTQ, 4 bits", "w4_gptq.yaml"),
    ("round-to-nearest, 3 bits", "w3_rtn.yaml"),
    ("GPTQ, 3 bits", "w3_gptq.yaml"),
)


def main() -> None:
    """Run the demo and print the table."""
    parser = argparse.ArgumentParser(description="Compile, calibrate and evaluate a small trained model.")
    parser.add_argument("--out", type=Path, help="keep the quantized checkpoints here; by default they are removed")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, xpu or auto")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-demo-"))
    try:
        run(arguments.out or folder, arguments.device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(out: Path, device_name: str) -> None:
    """Compile once, then quantize and evaluate each recipe."""
    from runtime.host.devices import resolve_device

    start = time.perf_counter()
    compiled = build(MODEL, out=HERE.parent / "artifacts")
    state = "found" if compiled.is_cached else "compiled"
    print(f"{state} {compiled.path.name}: {len(compiled.manifest.subgraphs)} subgraphs, {compiled.seconds:.1f} s")
    artifact = runtime.load(compiled.path)
    device = resolve_device(device_name)
    samples = {
        name: runtime.load_tokens(
            TEXT / f"{name}.jsonl", tokenizer_dir=MODEL, num_samples=count, seq_len=SEQ_LEN
        ).samples
        for name, count in (("calib", NUM_SAMPLES), ("eval", None))
    }
    batches = {
        name: [model_inputs(artifact.manifest, batch) for batch in runtime.batches(tokens, BATCH_SIZE)]
        for name, tokens in samples.items()
    }
    original = evaluate(artifact, weights=MODEL, batches=batches["eval"], device=device)
    rows = [("original, bfloat16", original.perplexity, original.num_bytes, 0.0)]
    for label, recipe in ROUNDS:
        print(f"calibrating: {label}", flush=True)
        result = calibrate(
            artifact,
            weights=MODEL,
            recipe=runtime.Recipe.from_file(RECIPES / recipe),
            batches=batches["calib"],
            out=out / Path(recipe).stem,
            device=device,
        )
        quality = evaluate(artifact, weights=result.path, batches=batches["eval"], device=device)
        rows.append((label, quality.perplexity, quality.num_bytes, result.seconds))
    print_table(rows)
    print(f"evaluated on {original.num_tokens:,} tokens; everything took {time.perf_counter() - start:.0f} s")


def print_table(rows: list[tuple[str, float, int, float]]) -> None:
    """Perplexity, bytes and seconds, side by side."""
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    table = Table(box=MARKDOWN)
    table.add_column("weights")
    for heading in ("perplexity", "bytes", "seconds to quantize"):
        table.add_column(heading, justify="right")
    for label, perplexity, num_bytes, seconds in rows:
        table.add_row(label, f"{perplexity:.3f}", f"{num_bytes:,}", f"{seconds:.1f}" if seconds else "-")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
