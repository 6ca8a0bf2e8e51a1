"""Whole runs side by side with llm-compressor: same weights, samples and recipe, process start to checkpoint on disk.

    python tests/bench/bench_peer.py [--model DIR | --random 1b] [--data FILE.jsonl] [--samples 128] [--seq-len 256]
                                     [--rounds 3] [--threads 1] [--recipe "GPTQ W4A16"] [--peer-python PYTHON]

Nothing is installed: `--peer-python` names an interpreter that has llm-compressor; without one, only our own figures
are printed. Runs alternate, and ratios are of medians. Peak memory is resident memory, children included. The page
cache is asked to forget the checkpoint before each run, so that what is read comes from the disk, and is counted.
Batch size 1 is the peer's and 8 ours, each tool's default.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

from processes import Cost, measure, medians
from random_models import LLAMA_1B, TINY, make_llama

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RANDOM = {"1b": LLAMA_1B, "tiny": TINY}

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


def main() -> None:
    """Compile, then run each recipe with both tools and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model")
    parser.add_argument("--random", choices=RANDOM, help="a Llama of random weights in the place of --model")
    parser.add_argument("--data", type=Path, default=ROOT / "demo" / "text" / "calib.jsonl")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="by default both")
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
    from seqbuild.ship.tokens import tokenize_files

    model = make_llama(folder / "model", RANDOM[options.random]) if options.random else options.model
    artifact = build(model, out=folder).path
    tokens = folder / "calib.safetensors"
    tokenize_files(model, [options.data], pack=True, out=tokens, num_samples=options.samples, seq_len=options.seq_len)
    (folder / "peer.py").write_text(PEER)
    has_peer = options.peer_python or importlib.util.find_spec("llmcompressor")
    peer = (options.peer_python or sys.executable) if has_peer else None
    for label in options.recipe or RECIPES:
        modifier, extra = RECIPES[label]
        recipe = folder / "recipe.yaml"
        body = f"{{targets: Linear, scheme: W4A16, ignore: [lm_head]{extra}}}"
        recipe.write_text(f"quant_stage:\n  quant_modifiers:\n    {modifier}: {body}\n")
        ours: list[Cost] = []
        theirs: list[Cost] = []
        out = folder / "out"
        for _ in range(options.rounds):
            command = [sys.executable, "-m", "runtime", "calibrate", str(artifact), "--weights", str(model)]
            command += ["--data", str(tokens), "--recipe", str(recipe), "-o", str(out), "--device", "cpu"]
            ours.append(measure(command, options.threads, cwd=ROOT, cold=model))
            shutil.rmtree(out)
            if peer:
                command = [peer, str(folder / "peer.py"), str(model), str(tokens), str(recipe), str(out)]
                theirs.append(measure(command, options.threads, cwd=ROOT, cold=model))
                shutil.rmtree(out)
        report(label, medians(ours), medians(theirs) if theirs else None)


def report(label: str, ours: Cost, theirs: Cost | None) -> None:
    """A line for each tool, and their ratios."""
    print(label)
    print(f"  seqbuild        {figures(ours)}")
    if theirs is None:
        print("  llm-compressor is not here; name an interpreter that has it with --peer-python", flush=True)
        return
    print(f"  llm-compressor  {figures(theirs)}")
    names = {"wall_s": "wall", "cpu_s": "processor", "peak_bytes": "peak", "disk_bytes": "read"}
    ratios = (
        f"{getattr(theirs, name) / getattr(ours, name):.2f} {word}"
        for name, word in names.items()
        if getattr(ours, name)
    )
    print(f"  theirs / ours   {', '.join(ratios)}", flush=True)


def figures(cost: Cost) -> str:
    """All of a run's figures."""
    return (
        f"{cost.wall_s:.1f} s wall, {cost.cpu_s:.1f} s processor, {cost.peak_bytes / 1e6:.0f} MB peak, "
        f"{cost.disk_bytes / 1e6:.0f} MB from disk, {cost.call_bytes / 1e6:.0f} MB by calls"
    )


if __name__ == "__main__":
    main()
