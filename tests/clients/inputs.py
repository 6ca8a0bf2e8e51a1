"""Dequantize the checkpoints of AutoRound, GPTQModel and ModelOpt, and compare with what these programs compute.

    python tests/clients/inputs.py [--folder .clients] [--only PATTERN] [--python PYTHON]

The exit code is 1 if a weight differs in a bit. Checkpoints are kept in the folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from clients.environments import python_of  # noqa: E402
from clients.make_inputs import CASES  # noqa: E402
from clients.models import DEMO  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import runtime  # noqa: E402
from runtime.checkpoint.reader import Checkpoint  # noqa: E402
from runtime.errors import SeqbuildError  # noqa: E402

SCRIPT = Path(__file__).with_name("make_inputs.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".clients", help="environments and checkpoints")
    parser.add_argument("--only", default="", help="a regular expression for the name of a case")
    parser.add_argument("--model", type=Path, default=DEMO, help="the model to quantize; default: the demo's")
    parser.add_argument("--python", type=Path, help="an interpreter that has these programs")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    python = arguments.python or python_of("exporters", folder)
    num_wrong = 0
    for name, (program, _) in CASES.items():
        if not re.search(arguments.only, name):
            continue
        out = folder / "work" / "inputs" / re.sub(r"\W+", "-", name)
        failure = made(python, name, arguments.model, out) or compared(out)
        num_wrong += bool(failure)
        print(
            f"{name:26} {program:10} {'UNEXPECTED: ' if failure else ''}{failure or 'equal in every bit'}", flush=True
        )
    print(f"{num_wrong} unexpected")
    return int(num_wrong > 0)


def made(python: Path, name: str, model: Path, out: Path) -> str:
    """Make a checkpoint unless it is there; return the last line of an error."""
    if (out / "truth.safetensors").is_file():
        return ""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, SCRIPT, name, model, out], env=environment, capture_output=True, text=True)
    return "" if not done.returncode else f"not made: {(done.stderr.strip().splitlines() or ['?'])[-1][:200]}"


def compared(out: Path) -> str:
    """Dequantize a checkpoint; say how it differs from what the other program computes."""
    truth = load_file(out / "truth.safetensors")
    dtype = str(next(iter(truth.values())).dtype).removeprefix("torch.")
    plain = out / f"plain-{os.getpid()}"
    try:
        result = runtime.dequantize(out / "checkpoint", out=plain, dtype=dtype)
        found = Checkpoint(plain)
        differing = [key for key, weight in truth.items() if not torch.equal(found.read(key), weight)]
    except SeqbuildError as error:
        return str(error).splitlines()[0][:200]
    finally:
        shutil.rmtree(plain, ignore_errors=True)
    if differing or result.num_dequantized != len(truth):
        return f"{len(differing)} of {len(truth)} weights differ, {result.num_dequantized} were dequantized"
    return ""


if __name__ == "__main__":
    sys.exit(main())
