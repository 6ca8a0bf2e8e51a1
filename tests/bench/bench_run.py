"""Whole runs side by side with llm-compressor: same model, samples and scheme, process start to checkpoint on disk.

    python tests/bench/bench_run.py [--model DIR] [--data FILE.jsonl] [--samples 128] [--seq-len 256] [--rounds 3]
                                    [--peer-python PYTHON] [--threads 1]

Both tools get the same token windows, batch size 1 is the peer's and 8 ours, each tool's default. Runs alternate;
medians are compared. Without an interpreter that has llm-compressor, only our own figures are printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from processes import run_process

ROOT = Path(__file__).resolve().parents[2]

RECIPES = {
    "round-to-nearest W4A16": ("QuantizationModifier", ""),
    "GPTQ W4A16": ("GPTQModifier", ", dampening_frac: 0.01"),
}

PEER = """
import sys
from datasets import Dataset
from llmcompressor import oneshot
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
model_dir, tokens, recipe, out = sys.argv[1:]
with safe_open(tokens, "pt") as file:
    ids, offsets = file.get_tensor("tokens"), file.get_tensor("offsets").tolist()
rows = [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:])]
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(model_dir)
oneshot(model=model, processor=tokenizer, dataset=data, recipe=recipe, max_seq_length=len(rows[0]),
        num_calibration_samples=len(rows), shuffle_calibration_samples=False)
model.save_pretrained(out, save_compressed=True)
tokenizer.save_pretrained(out)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one process took: seconds on the clock, processor seconds, peak resident megabytes."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def measure(command: list[str], threads: int) -> Cost:
    """Run a command and ask the kernel what it took."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    wall_s, usage = run_process(command, environment, cwd=ROOT)
    return Cost(wall_s=wall_s, cpu_s=usage.ru_utime + usage.ru_stime, peak_mb=usage.ru_maxrss / 1000)


def medians(costs: list[Cost]) -> Cost:
    """The median of each figure."""
    return Cost(
        wall_s=statistics.median(cost.wall_s for cost in costs),
        cpu_s=statistics.median(cost.cpu_s for cost in costs),
        peak_mb=statistics.median(cost.peak_mb for cost in costs),
    )


def peer_interpreter(stated: str | None) -> str | None:
    """An interpreter that has llm-compressor, if there is one."""
    if stated:
        return stated
    return sys.executable if importlib.util.find_spec("llmcompressor") else None


def main() -> None:
    """Compile, then time each recipe with both tools and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model")
    parser.add_argument("--data", type=Path, default=ROOT / "demo" / "text" / "calib.jsonl")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-python", help="an interpreter that has llm-compressor")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-"))
    try:
        run(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(options: argparse.Namespace, folder: Path) -> None:
    """All recipes."""
    from seqbuild.build import build
    from seqbuild.data import tokenize_files

    artifact = build(options.model, out=folder).path
    tokens = folder / "calib.safetensors"
    lengths = {"num_samples": options.samples, "seq_len": options.seq_len}
    tokenize_files(options.model, [options.data], pack=True, out=tokens, **lengths)
    (folder / "peer.py").write_text(PEER)
    peer = peer_interpreter(options.peer_python)
    for label, (modifier, extra) in RECIPES.items():
        recipe = folder / "recipe.yaml"
        body = f"{{targets: Linear, scheme: W4A16, ignore: [lm_head]{extra}}}"
        recipe.write_text(f"quant_stage:\n  quant_modifiers:\n    {modifier}: {body}\n")
        ours: list[Cost] = []
        theirs: list[Cost] = []
        for number in range(options.rounds):
            out = folder / f"ours-{modifier}-{number}"
            command = [sys.executable, "-m", "runtime", "calibrate", str(artifact), "--weights", str(options.model)]
            command += ["--data", str(tokens), "--recipe", str(recipe), "-o", str(out), "--device", "cpu"]
            ours.append(measure(command, options.threads))
            if peer:
                out = folder / f"peer-{modifier}-{number}"
                command = [peer, str(folder / "peer.py"), str(options.model), str(tokens), str(recipe), str(out)]
                theirs.append(measure(command, options.threads))
        report(label, medians(ours), medians(theirs) if theirs else None)


def report(label: str, ours: Cost, theirs: Cost | None) -> None:
    """One line for each figure, the peer's over ours as a ratio."""
    print(f"{label}: ours {ours.wall_s:.1f} s wall, {ours.cpu_s:.1f} s processor, {ours.peak_mb:.0f} MB peak")
    if theirs is None:
        print("  llm-compressor is not installed here; name an interpreter that has it with --peer-python")
        return
    print(f"  llm-compressor {theirs.wall_s:.1f} s wall, {theirs.cpu_s:.1f} s processor, {theirs.peak_mb:.0f} MB peak")
    ratios = (theirs.wall_s / ours.wall_s, theirs.cpu_s / ours.cpu_s, theirs.peak_mb / ours.peak_mb)
    print("  theirs / ours: {:.2f} wall, {:.2f} processor, {:.2f} peak".format(*ratios), flush=True)


if __name__ == "__main__":
    main()
