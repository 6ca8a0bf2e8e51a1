"""Perplexity and time of quantized models beside llm-compressor's, on the same tokens, in one go.

    python tests/bench/bench_quality.py MODEL CALIB.jsonl EVAL.jsonl --peer /path/to/python [--only "GPTQ W2"]

Both tools get the same windows of the calibration text as token ids; each recipe runs in a process of its own, whose
processor time is counted. Every checkpoint, ours and theirs, is then loaded by transformers in the peer's environment
and evaluated by the same code. Results are printed as they come, and kept in --out as JSON, so that a bench that was
stopped goes on. `--peer` is a Python with llm-compressor; without it only ours run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NUM_SAMPLES, SEQ_LEN = 128, 256


def _int(bits: int) -> str:
    return f"{{targets: [Linear], weights: {{num_bits: {bits}, type: int, strategy: group, group_size: 128}}}}"


def _only(modifier: str, scheme: str, extra: str = "") -> str:
    return f"{modifier}: {{targets: Linear, scheme: {scheme}, ignore: [lm_head]{extra}}}\n"


def _staged(recipe: str) -> str:
    """The peer passes over what stands outside of a stage."""
    lines = (f"    {line}" for line in recipe.splitlines())
    return "\n".join(("bench_stage:", "  bench_modifiers:", *lines, ""))


_SMOOTH = "SmoothQuantModifier: {smoothing_strength: 0.8}\n"
_NEAREST = "QuantizationModifier"
# name: recipe that both tools run
SHARED = {
    "RTN W4A16": _only(_NEAREST, "W4A16"),
    "GPTQ W4A16": _only("GPTQModifier", "W4A16"),
    "GPTQ W8A8": _only("GPTQModifier", "W8A8"),
    "SmoothQuant + GPTQ W8A8": _SMOOTH + _only("GPTQModifier", "W8A8"),
    "FP8_DYNAMIC": _only(_NEAREST, "FP8_DYNAMIC"),
    "GPTQ W3A16": _only("GPTQModifier", "W3A16"),
    "GPTQ W2A16": _only("GPTQModifier", "W2A16"),
    "AWQ W4A16_ASYM": "AWQModifier: {}\n" + _only(_NEAREST, "W4A16_ASYM"),
    "AWQ W3A16": "AWQModifier: {}\n" + _only(_NEAREST, "W3A16"),
    "AWQ W2A16": "AWQModifier: {}\n" + _only(_NEAREST, "W2A16"),
}
# name: recipe that only ours runs
OWN = {
    "AWQ + GPTQ W2A16": "AWQModifier: {duo_scaling: both}\n" + _only("GPTQModifier", "W2A16"),
    "AWQ + GPTQ W3A16": "AWQModifier: {duo_scaling: both}\n" + _only("GPTQModifier", "W3A16"),
    "GPTQ W2A16, refined": _only("GPTQModifier", "W2A16", ", refine: 4"),
    "AWQ W2A16, imatrix_mse": "AWQModifier: {duo_scaling: both}\n"
    + _only(_NEAREST, "W2A16", ", weight_observer: imatrix_mse"),
}

PEER = """
import json, sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
import llmcompressor.pipelines.cache as cache
if not torch.cuda.is_available():  # it pins memory for an accelerator that is not there
    for owner in (cache.IntermediatesCache,):
        owner.pin_memory = lambda self, *args, **kwargs: None
from llmcompressor import oneshot
model, tokens, recipe, out = sys.argv[1:]
ids = json.load(open(tokens))
data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
oneshot(model=loaded, dataset=data, recipe=recipe, num_calibration_samples=len(ids), max_seq_length=len(ids[0]),
        shuffle_calibration_samples=False, batch_size=1)
loaded.save_pretrained(out, save_compressed=True)
"""

OURS = """
import json, sys, torch, runtime
artifact, weights, tokens, recipe, out = sys.argv[1:]
ids = torch.tensor(json.load(open(tokens)))
runtime.calibrate(runtime.load(artifact), weights=weights, recipe=runtime.Recipe.from_file(recipe),
                  batches=runtime.batches(list(ids), 8), out=out)
"""

JUDGE = """
import json, math, sys, torch
from transformers import AutoModelForCausalLM
path, tokens = sys.argv[1:]
ids = torch.tensor(json.load(open(tokens)))
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
total, count = 0.0, 0
with torch.no_grad():
    for part in ids.split(8):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        count += part[:, 1:].numel()
print(json.dumps(math.exp(total / count)))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("--peer", type=Path, help="a Python with llm-compressor")
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    parser.add_argument("--out", type=Path, help="JSON file of results; those that it has are not made again")
    parser.add_argument("--samples", type=int, default=NUM_SAMPLES)
    parser.add_argument("--eval-samples", type=int)
    chosen = parser.parse_args()
    known = json.loads(chosen.out.read_text()) if chosen.out and chosen.out.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen, Path(folder), known)
        bench.judged("unquantized", "", chosen.model)
        for name, recipe in SHARED.items():
            if chosen.only in name:
                bench.one(name, recipe, "ours")
                if chosen.peer:
                    bench.one(name, recipe, "peer")
        for name, recipe in OWN.items():
            if chosen.only in name:
                bench.one(name, recipe, "ours")


class Bench:
    """Runs recipes and judges what comes out.

    Args:
        chosen: the command line.
        folder: for artifacts and checkpoints.
        known: results of an earlier bench.
    """

    def __init__(self, chosen: argparse.Namespace, folder: Path, known: dict[str, Any]) -> None:
        self.chosen, self.folder, self.known = chosen, folder, known
        self.judge = str(chosen.peer or sys.executable)
        self.calib = self._tokens("calib", chosen.calib, chosen.samples)
        self.eval = self._tokens("eval", chosen.eval, chosen.eval_samples)
        from seqbuild.build import build

        self.artifact = build(chosen.model, out=folder / "artifacts").path

    def one(self, name: str, recipe: str, tool: str) -> None:
        """Quantize by a recipe with one of the tools, and judge the checkpoint."""
        if f"{name} | {tool}" in self.known:
            self.judged(name, tool, Path())
            return
        plan, out = self.folder / "recipe.yaml", self.folder / f"{tool} {name}".replace(" ", "-")
        plan.write_text(_staged(recipe))
        if tool == "ours":
            command = [sys.executable, "-c", OURS, self.artifact, self.chosen.model, self.calib, plan, out]
        else:
            command = [self.chosen.peer, "-c", PEER, self.chosen.model, self.calib, plan, out]
        usage = run([str(part) for part in command])
        self.judged(name, tool, out, **usage)

    def judged(self, name: str, tool: str, path: Path, **usage: float) -> None:
        """Print a checkpoint's perplexity, and keep it."""
        key = f"{name} | {tool}"
        if key not in self.known:
            text = subprocess.run(
                [self.judge, "-c", JUDGE, str(path), str(self.eval)], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            self.known[key] = {"perplexity": json.loads(text.splitlines()[-1]), **usage}
            if self.chosen.out:
                self.chosen.out.write_text(json.dumps(self.known, indent=1))
        found = self.known[key]
        print(f"{key:40} {found['perplexity']:9.4f} {found.get('cpu_s', 0.0):8.1f} s of processor", flush=True)

    def _tokens(self, name: str, path: Path, samples: int | None) -> Path:
        import runtime

        data = runtime.load_tokens(path, tokenizer_dir=self.chosen.model, num_samples=samples, seq_len=SEQ_LEN)
        target = self.folder / f"{name}.json"
        target.write_text(json.dumps([sample.tolist() for sample in data.samples]))
        return target


def run(command: list[str]) -> dict[str, float]:
    """Run a process and say what processor time it took, imports included."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    after = os.times()
    return {"cpu_s": after.children_user + after.children_system - before.children_user - before.children_system}


if __name__ == "__main__":
    main()
