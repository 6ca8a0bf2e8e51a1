"""Compare the seconds that `plan` predicts with those that a run takes.

    python tests/bench/bench_plan.py                                   # the demo model and 6 layers of 1.1B widths
    python tests/bench/bench_plan.py --threads 1 --recipe gptq --phases
    python tests/bench/bench_plan.py --artifact DIR --weights DIR --data FILE --recipe FILE.yaml --batch-size 4

For each number of threads the machine is measured (`plan --measure --save-machine`), then each recipe is planned with
the rates of that file, and run `--rounds` times; the quickest run counts. `predicted / wall` should be between 0.8 and
1.25 on a machine that does nothing else; on a busy one compare with processor seconds (of one thread). `--phases` adds
the processor seconds of each phase of one more run (tests/bench/limit_phases.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_limit import RECIPES, prepared
from processes import Cost, measure
from random_models import ROOT

_HEAD = "ignore: [lm_head]"
MORE = {
    "w8a8": f"SmoothQuantModifier: {{}}\n    GPTQModifier: {{targets: Linear, scheme: W8A8, {_HEAD}}}\n",
    "nvfp4a4": f"QuantizationModifier: {{targets: Linear, scheme: NVFP4, {_HEAD}}}\n",
}
DEFAULT_RECIPES = ("gptq", "awq", "fp8")
# The phases of limit_phases.py, by phase of a plan.
PARTS = {
    "start": ("imports",),
    "load": ("reading",),
    "measure": ("measuring forwards",),
    "statistics": ("Hessians",),
    "solve": (
        *("factorization", "reordering", "block updates", "columns", "output sizes", "search", "clipping"),
        *("rounding to nearest", "packing"),
    ),
    "propagate": ("propagating forwards",),
    "write": ("writing",),
    "other": ("rest", "threads", "trimming"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model that is run: its artifact, its weights, and a token file or nothing."""

    name: str
    artifact: Path
    weights: Path
    tokens: Path


def main() -> None:
    """Measure, plan and run, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, help="with --weights and --data, instead of the default models")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", type=Path, help="token file")
    known = ", ".join((*RECIPES, *MORE))
    parser.add_argument("--recipe", action="append", help=f"YAML file, or one of {known}; by default gptq, awq and fp8")
    parser.add_argument("--threads", type=int, action="append", help="by default 1 and 2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--machine", type=Path, help="rates that were measured before, for one number of threads")
    parser.add_argument("--phases", action="store_true")
    parser.add_argument("-o", "--out", type=Path, help="write all figures as JSON")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-"))
    found: list[dict[str, Any]] = []
    try:
        cases = list(cases_of(options, folder))
        print(f"{'model':<10}{'recipe':<10}{'threads':>8}{'predicted':>11}{'wall':>8}{'cpu':>8}{'ratio':>7}{'/cpu':>7}")
        for threads in options.threads or (1, 2):
            machine = options.machine or measured(threads, folder)
            for case in cases:
                for recipe in options.recipe or DEFAULT_RECIPES:
                    found.append(compared(case, recipe, threads, machine, options, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ratios = [entry["predicted"] / entry["wall"] for entry in found]
    print(f"predicted / wall: {min(ratios):.2f} to {max(ratios):.2f}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def cases_of(options: argparse.Namespace, folder: Path) -> Iterator[Case]:
    """The given model, or those that are made here."""
    if options.artifact:
        yield Case(
            name=options.artifact.name[:9], artifact=options.artifact, weights=options.weights, tokens=options.data
        )
        return
    for size in ("demo", "1b"):
        setup = prepared(size, 6, folder / size)
        yield Case(name=size, artifact=setup.artifact, weights=setup.model, tokens=setup.tokens)


def measured(threads: int, folder: Path) -> Path:
    """Measure this machine, with any artifact."""
    target = folder / f"machine-{threads}.json"
    script = "from runtime.cli import plan; import torch; from pathlib import Path; "
    script += "from runtime.planning.measure import measure; import sys; "
    script += "measure(torch.device('cpu')).write(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(target)], env=environment(threads), check=True)
    return target


def environment(threads: int) -> dict[str, str]:
    """Of a run."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def compared(
    case: Case, recipe: str, threads: int, machine: Path, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Plan and run one recipe, and print both."""
    path, out = folder / "recipe.yaml", folder / "out"
    text = (RECIPES | MORE).get(recipe)
    path.write_text(f"quant_stage:\n  quant_modifiers:\n    {text}" if text else Path(recipe).read_text())
    shared = ["--recipe", str(path), "--device", "cpu", "--batch-size", str(options.batch_size)]
    shared += ["--data", str(case.tokens)]
    seconds = planned(["plan", str(case.artifact), *shared, "--machine", str(machine), "--json"], threads)
    command = ["calibrate", str(case.artifact), "--weights", str(case.weights), *shared, "-o", str(out)]
    costs: list[Cost] = []
    for _ in range(options.rounds):
        costs.append(measure([sys.executable, "-m", "runtime", *command], threads, cwd=ROOT))
        shutil.rmtree(out)
    wall_s, cpu_s = min(cost.wall_s for cost in costs), min(cost.cpu_s for cost in costs)
    predicted = seconds["total"]
    name = Path(recipe).stem
    print(
        f"{case.name:<10}{name:<10}{threads:>8}{predicted:>11.1f}{wall_s:>8.1f}{cpu_s:>8.1f}"
        f"{predicted / wall_s:>7.2f}{predicted / cpu_s:>7.2f}",
        flush=True,
    )
    if options.phases:
        by_phase(command, threads, seconds["phases"])
        shutil.rmtree(out)
    return {
        "model": case.name,
        "recipe": name,
        "threads": threads,
        "predicted": predicted,
        "wall": wall_s,
        "cpu": cpu_s,
    }


def planned(command: list[str], threads: int) -> dict[str, Any]:
    """The predicted seconds."""
    line = [sys.executable, "-m", "runtime", *command]
    result = subprocess.run(line, env=environment(threads), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(result.stdout)["seconds"]
    return found


def by_phase(command: list[str], threads: int, predicted: dict[str, float]) -> None:
    """Run once more and print the processor seconds of each phase beside the predicted ones."""
    script = Path(__file__).with_name("limit_phases.py")
    line = [sys.executable, str(script), *command]
    result = subprocess.run(line, env=environment(threads), cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    for phase, parts in PARTS.items():
        print(
            f"{'':<20}{phase:<14}{predicted.get(phase, 0.0):>8.2f}{sum(found.get(part, 0.0) for part in parts):>10.2f}"
        )


if __name__ == "__main__":
    main()
