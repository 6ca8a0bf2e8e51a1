"""Time of AWQ per layer, and its searches beside exhaustive ones, which try all candidates on all rows in float32.

    python tests/bench/bench_awq.py MODEL [--data TOKENS] [--recipe RECIPE] [--samples 8] [--length 128]

MODEL is a directory with a checkpoint; without --data (made by `seqbuild data`) tokens are random. Each search of the
run is repeated exhaustively. Printed are the share of searches that choose the same s, the loss of all searches over
that of the exhaustive ones, and processor seconds of one thread: of the searches, of the exhaustive ones, and of the
run for each layer without those.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import runtime
from runtime.algorithms import awq
from runtime.quantize import smoothing
from seqbuild.build import build

RECIPE = "AWQModifier: {targets: Linear, scheme: W4A16_ASYM, ignore: [lm_head]}\n"


class Searches:
    """Searches, with an exhaustive one after each."""

    def __init__(self) -> None:
        self.num_equal = self.num = 0
        self.loss = self.least = self.seconds = self.exhaustive_seconds = 0.0

    def __call__(self, weights: Iterable[torch.Tensor], *args: Any, **options: Any) -> awq.ScaleSearch:
        read = list(weights)
        started = time.process_time()
        found = awq.search_scales(read, *args, **options)
        middle = time.process_time()
        options["race_dtype"] = torch.float32
        with mock.patch.object(awq, "_ERRORS", float("inf")):
            best = awq.search_scales(read, *args, **options)
        ended = time.process_time()
        is_equal = torch.equal(found.scale_I, best.scale_I)
        self.num += 1
        self.num_equal += is_equal
        # A loss in the precision of the race is only compared where the choice differs.
        self.loss += best.loss if is_equal else found.loss
        self.least += best.loss
        self.seconds += middle - started
        self.exhaustive_seconds += ended - middle
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    searches = Searches()
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(smoothing, "search_scales", searches):
        artifact = runtime.load(build(chosen.model, out=Path(folder) / "artifacts").path)
        if chosen.data:
            samples = list(runtime.load_tokens(chosen.data, num_samples=chosen.samples).samples)
        else:
            generator = torch.Generator().manual_seed(0)
            samples = list(torch.randint(2, 250, (chosen.samples, chosen.length), generator=generator))
        text = chosen.recipe.read_text() if chosen.recipe else RECIPE
        started = time.process_time()
        runtime.calibrate(
            artifact,
            weights=chosen.model,
            recipe=runtime.Recipe.from_text(text, "recipe.yaml"),
            batches=runtime.batches(samples, 8),
            out=Path(folder) / "out",
        )
        seconds = time.process_time() - started - searches.exhaustive_seconds
    num_layers = sum(1 for subgraph in artifact.manifest.subgraphs if "layers." in " ".join(subgraph.parameters))
    print(f"same choice: {searches.num_equal} of {searches.num} searches")
    print(f"loss over the least: {searches.loss / searches.least - 1:+.4%}")
    print(f"searches {searches.seconds:.2f} s, exhaustive {searches.exhaustive_seconds:.2f} s")
    print(f"run without these {seconds:.2f} s, {seconds / max(num_layers, 1):.2f} s for each of {num_layers} layers")


if __name__ == "__main__":
    main()
