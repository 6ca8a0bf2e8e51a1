"""Compare llm-compressor's sequential pipeline with `pipeline="seqbuild"`, in an environment of its own.

    python tests/clients/pipelines.py [--folder .clients] [--python PYTHON]

The exit code is 1 if a tensor of a quantized model differs, or if a pipeline does not run the model as a plain call.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from clients.environments import python_of  # noqa: E402


def main() -> int:
    """Run the comparison and judge each line of its output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".clients", help="environments and models")
    parser.add_argument("--python", type=Path, help="an interpreter that has llm-compressor")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    work = folder / "work" / "pipelines"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    command = [arguments.python or python_of("llmcompressor", folder), Path(__file__).with_name("oneshot_pipeline.py")]
    # One thread: with several, sums of a mixture's experts depend on how its rows are divided.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, work], env=environment, stdout=subprocess.PIPE, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    num_wrong = 0
    for result in results:
        num_differing = len(result["differing"])
        verdict = f"{num_differing} of {result['tensors']} tensors differ" if num_differing else "equal"
        if not result["sequential_is_plain"]:
            verdict += "; without a stated attention, the sequential pipeline leaves out the causal mask"
        is_wrong = bool(num_differing) or not (result["compared_with_plain"] and result["seqbuild_is_plain"])
        num_wrong += is_wrong
        seconds = " ".join(f"{name} {result[f'{name}_s']:.2f} s" for name in ("traced", "compiled", "loaded"))
        mark = "UNEXPECTED: " if is_wrong else ""
        print(f"{result['model']:11} {result['recipe']:34} {seconds}  {mark}{verdict}")
    print(f"{len(results)} comparisons, {num_wrong} unexpected")
    return int(done.returncode != 0 or num_wrong > 0 or not results)


if __name__ == "__main__":
    sys.exit(main())
