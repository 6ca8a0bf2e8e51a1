"""The same as the two command lines, from Python.

    python examples/python_api.py MODEL_DIR CALIBRATION.jsonl OUT_DIR

MODEL_DIR holds config.json, tokenizer and safetensors weights of a causal language model; demo/model will do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import runtime
import seqbuild
from runtime.data.inputs import model_inputs
from runtime.recipe.named import recipe_of


def main(model_dir: str, text: str, out: str) -> None:
    # Build side: no weights are read. The second time the artifact is found, not traced again.
    path = seqbuild.compile_model(model_dir)

    # Host side: everything is checked before any of it is executed.
    artifact = runtime.load(path)
    for index, subgraph in enumerate(artifact.subgraphs):
        print(index, subgraph.entry.targets, "takes", subgraph.input_names, "frees", subgraph.consumed_names)

    tokens = runtime.load_tokens(text, tokenizer_dir=Path(model_dir), num_samples=128, seq_len=256)
    batches = [model_inputs(artifact.manifest, batch) for batch in runtime.batches(tokens.samples, batch_size=8)]
    result = runtime.calibrate(
        artifact, weights=model_dir, recipe=recipe_of("W4A16"), batches=batches, out=out, progress=print
    )
    worst = max(result.modules, key=lambda module: module.loss)
    print(f"{result.num_bytes:,} bytes in {result.path}; largest error in {worst.name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
