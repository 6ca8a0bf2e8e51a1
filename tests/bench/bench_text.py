"""Perplexity of a quantized model by the text that calibrated it: the built-in text, other texts, random tokens.

    python tests/bench/bench_text.py MODEL --calib builtin --calib random --calib own=CALIB.jsonl --eval own=EVAL.jsonl

Without arguments: the demo model, the built-in text, the demo's text and random tokens. Every calibration has the same
number and length of samples. Each recipe runs once per calibration text, and the result is evaluated on each evaluation
text and on the built-in one. Rounding to nearest needs no text and is printed for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import runtime
from runtime.data.samples import TokenData, batches
from seqbuild.build import build
from seqbuild.text import builtin_evaluation_text, builtin_text

DEMO = Path(__file__).parents[2] / "demo"
SAMPLES, SEQ_LEN = 128, 256
_MODIFIER = "{name}: {{targets: [Linear], scheme: {scheme}, ignore: {ignore}{extra}}}\n"
# name: modifiers before the quantizing one, that modifier, scheme
RECIPES = {
    "GPTQ W4A16": ("", "GPTQModifier", "W4A16"),
    "GPTQ W3A16": ("", "GPTQModifier", "W3A16"),
    "GPTQ W2A16": ("", "GPTQModifier", "W2A16"),
    "AWQ W4A16_ASYM": ("AWQModifier: {}\n", "QuantizationModifier", "W4A16_ASYM"),
}
# Routers stay in full precision, and experts without tokens are rounded to nearest.
IGNORE = r"[lm_head, 're:.*mlp\.gate$']"
BUILTIN, RANDOM = "builtin", "random"


def tokens(text: Path, model: Path, samples: int | None) -> TokenData:
    return runtime.load_tokens(text, tokenizer_dir=model, num_samples=samples, seq_len=SEQ_LEN)


def calibrations(chosen: argparse.Namespace, vocab_size: int) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Name and samples of each calibration text."""
    for name, path in chosen.calib:
        if name == RANDOM:
            generator = torch.Generator().manual_seed(chosen.seed)
            yield name, list(torch.randint(vocab_size, (SAMPLES, SEQ_LEN), generator=generator))
        else:
            yield name, list(tokens(path, chosen.model, SAMPLES).samples)


def named(value: str) -> tuple[str, Path]:
    """Read NAME=PATH, or one of the names that need no path."""
    name, _, path = value.partition("=")
    if not path and name not in (BUILTIN, RANDOM):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, {BUILTIN} or {RANDOM}; got {value!r}")
    return name, Path(path) if path else builtin_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=DEMO / "model")
    parser.add_argument("--calib", type=named, action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--eval", type=named, action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--eval-samples", type=int, help="windows of each evaluation text; all by default")
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    parser.add_argument("--seed", type=int, default=0, help="of the random tokens")
    chosen = parser.parse_args()
    if not chosen.calib:
        chosen.calib = [(BUILTIN, builtin_text()), ("demo", DEMO / "text" / "calib.jsonl"), (RANDOM, Path())]
        chosen.eval = chosen.eval or [("demo", DEMO / "text" / "eval.jsonl")]
    with tempfile.TemporaryDirectory() as directory:
        bench(chosen, Path(directory))


def bench(chosen: argparse.Namespace, folder: Path) -> None:
    chosen.artifact = build(chosen.model, out=folder / "artifacts").path
    artifact = runtime.load(chosen.artifact)
    chosen.eval.append((BUILTIN, builtin_evaluation_text()))
    judges = [(name, tokens(path, chosen.model, chosen.eval_samples)) for name, path in chosen.eval]

    def judge(weights: Path, *labels: str) -> None:
        found = (
            runtime.evaluate(artifact, weights=weights, batches=batches(data.samples, 8)).perplexity
            for _, data in judges
        )
        print("".join(f"{label:<18}" for label in labels) + "".join(f"{value:>14.3f}" for value in found), flush=True)

    print(f"{'recipe':<18}{'calibrated on':<18}" + "".join(f"{'on ' + name:>14}" for name, _ in judges))
    judge(chosen.model, "original", "")
    texts = list(calibrations(chosen, judges[0][1].origin.vocab_size))
    for bits in (4, 3, 2):
        recipe = _MODIFIER.format(name="QuantizationModifier", scheme=f"W{bits}A16", ignore=IGNORE, extra="")
        judge(quantized(chosen, recipe, None, folder / f"rtn-{bits}"), f"nearest W{bits}A16", "")
    for name, (before, modifier, scheme) in RECIPES.items():
        if chosen.only not in name:
            continue
        extra = ", fallback: rtn" if modifier == "GPTQModifier" else ""
        recipe = before + _MODIFIER.format(name=modifier, scheme=scheme, ignore=IGNORE, extra=extra)
        for text, samples in texts:
            out = folder / f"{text} {name}".replace(" ", "-")
            judge(quantized(chosen, recipe, samples, out), name, text)


def quantized(chosen: argparse.Namespace, recipe: str, samples: list[torch.Tensor] | None, out: Path) -> Path:
    """Calibrate into `out`; without samples, round to nearest."""
    runtime.calibrate(
        runtime.load(chosen.artifact),
        weights=chosen.model,
        recipe=runtime.Recipe.from_text(recipe, out.name),
        batches=[] if samples is None else batches(samples, 8),
        out=out,
    )
    return out


if __name__ == "__main__":
    main()
