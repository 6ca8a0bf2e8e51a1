"""Compare whole runs on one core with the time that the same work takes at the core's measured rates.

    python tests/bench/bench_limit.py [--size 1b|demo] [--recipe NAME] [--rounds 3] [--before REPOSITORY]
                                      [--peer-python PYTHON] [-o FILE.json]

The rates are those of large float32 and bf16 products, of copies in memory, of reads from the page cache and of writes
to it, all in processor seconds of one thread. The work is counted by the planner (`runtime.planning`): the products of
both passes, half of each symmetric Hessian (T I^2 operations), factorizations (I^3 / 3), solves (O I^2), the products
of a search over the candidates that the recipe states, and the bytes of weights. The share of a phase is the limit over
the measured time; it can exceed 1 where a search leaves out candidates. Imports and bookkeeping have no work.

A recipe without data has one limit: a program that imports torch, reads each tensor, converts it to one byte per number
and writes it.

Size 1b has 6 layers of the widths of a Llama of 1.1 B parameters and 8 samples of 128 tokens; demo has the model of
`make demo` and 128 samples of 256 tokens. `--before` runs another checkout in turns with this one, and compares
medians of whole runs; `--peer-python` does the same with llm-compressor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import bench_peer
import torch
from processes import Cost, measure, medians
from random_models import LLAMA_1B, ROOT, make_llama

import runtime

_HEAD = "ignore: [lm_head]"
RECIPES = {
    "gptq": f"GPTQModifier: {{targets: Linear, scheme: W4A16, {_HEAD}}}\n",
    "awq": f"AWQModifier: {{targets: Linear, scheme: W4A16_ASYM, {_HEAD}}}\n",
    "fp8": f"QuantizationModifier: {{targets: Linear, scheme: FP8_DYNAMIC, {_HEAD}}}\n",
    "rtn": f"QuantizationModifier: {{targets: Linear, scheme: W4A16, {_HEAD}}}\n",
    "nvfp4": f"QuantizationModifier: {{targets: Linear, scheme: NVFP4A16, {_HEAD}}}\n",
    "mxfp4": f"QuantizationModifier: {{targets: Linear, scheme: MXFP4A16, {_HEAD}}}\n",
    "fp8_block": f"QuantizationModifier: {{targets: Linear, scheme: FP8_BLOCK, {_HEAD}}}\n",
}
WITHOUT_DATA = ("fp8", "rtn", "nvfp4", "mxfp4", "fp8_block")
_BYTES = 2**27
# Read each tensor, convert it to one byte per number, and write that share of its bytes.
MOVE = """
import sys, tempfile
from pathlib import Path
import torch
from safetensors import safe_open
model, share = Path(sys.argv[1]), float(sys.argv[2])
with tempfile.TemporaryFile(buffering=0) as out:
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                narrow = tensor.to(torch.float8_e4m3fn).view(torch.uint8).flatten()
                out.write(narrow[: int(tensor.nbytes * share)].numpy().data)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreRates:
    """The rates of one core: operations, and bytes, per processor second. A copied byte is read and written."""

    float32: float
    bfloat16: float
    copying: float
    reading: float
    writing: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What is run: a compiled model, its checkpoint, and token file, with the size of the data."""

    artifact: Path
    model: Path
    tokens: Path
    num_samples: int
    seq_len: int


def main() -> None:
    """Measure the core, then run each size and recipe, and print a table of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("1b", "demo"), action="append", help="by default both")
    parser.add_argument("--recipe", choices=RECIPES, action="append", help="by default all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6, help="of size 1b")
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--peer-python", help="an interpreter that has llm-compressor (for gptq)")
    parser.add_argument("--phases", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("-o", "--out", type=Path, help="write all figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = core_rates()
    print(
        f"one core: {rates.float32 / 1e9:.0f} GFLOP/s in float32, {rates.bfloat16 / 1e9:.0f} in bf16; "
        f"{rates.copying / 1e9:.1f} GB/s copied, {rates.reading / 1e9:.1f} read, {rates.writing / 1e9:.1f} written\n"
    )
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-"))
    found: list[dict[str, Any]] = []
    try:
        for size in options.size or ("1b", "demo"):
            setup = prepared(size, options.layers, folder / size)
            for recipe in options.recipe or RECIPES:
                found.append({"size": size, "recipe": recipe, **compared(setup, recipe, rates, options, folder)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if options.out:
        options.out.write_text(json.dumps({"rates": asdict(rates), "runs": found}, indent=2) + "\n")


def prepared(size: str, num_layers: int, folder: Path) -> Setup:
    """Make or find the model, compile it and tokenize the text."""
    from seqbuild.build import build
    from seqbuild.ship.tokens import tokenize_files

    folder.mkdir()
    is_demo = size == "demo"
    num_samples, seq_len = (128, 256) if is_demo else (8, 128)
    config = LLAMA_1B | {"num_hidden_layers": num_layers}
    model = ROOT / "demo" / "model" if is_demo else make_llama(folder / "model", config)
    tokens = folder / "calib.safetensors"
    text = ROOT / "demo" / "text" / "calib.jsonl"
    tokenize_files(model, [text], pack=True, out=tokens, num_samples=num_samples, seq_len=seq_len)
    artifact = build(model, out=folder).path
    return Setup(artifact=artifact, model=model, tokens=tokens, num_samples=num_samples, seq_len=seq_len)


def compared(setup: Setup, recipe: str, rates: CoreRates, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a recipe `rounds` times here and in the other places in turns, then once more by phase."""
    path, out = folder / "recipe.yaml", folder / "out"
    path.write_text(f"quant_stage:\n  quant_modifiers:\n    {RECIPES[recipe]}")
    command = ["calibrate", str(setup.artifact), "--weights", str(setup.model), "--recipe", str(path)]
    command += ["-o", str(out), "--device", "cpu"]
    command += [] if recipe in WITHOUT_DATA else ["--data", str(setup.tokens)]
    runs = {"now": ([sys.executable, "-m", "runtime", *command], ROOT)}
    if options.before:
        runs["before"] = ([sys.executable, "-m", "runtime", *command], options.before.resolve())
    if options.peer_python and recipe == "gptq":
        script = folder / "peer.py"
        script.write_text(bench_peer.PEER)
        parts = [str(script), str(setup.model), str(setup.tokens), str(path), str(out)]
        runs["llm-compressor"] = ([options.peer_python, *parts], ROOT)
    costs: dict[str, list[Cost]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, (line, place) in runs.items():
            costs[name].append(measure(line, 1, cwd=place))
            shutil.rmtree(out)
    found = {name: medians(several) for name, several in costs.items()}
    phases = by_phase(command, out) if options.phases else {}
    limits = limits_of(setup, recipe, path, rates)
    report(f"{recipe}, {setup.model.parent.name if setup.num_samples == 8 else 'demo'}", found, phases, limits)
    return {"costs": {name: asdict(cost) for name, cost in found.items()}, "phases": phases, "limits": limits}


def by_phase(command: list[str], out: Path) -> dict[str, float]:
    """Run once, in another process, and return the processor seconds of each phase."""
    script = Path(__file__).with_name("limit_phases.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    line = [sys.executable, str(script), *command]
    result = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(out)
    phases: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return phases


def limits_of(setup: Setup, recipe: str, path: Path, rates: CoreRates) -> dict[str, float]:
    """Count the work of a run by phase, and return its seconds at the core's rates."""
    planned = runtime.plan_artifact(
        runtime.load(setup.artifact),
        num_samples=setup.num_samples,
        seq_len=setup.seq_len,
        batch_size=8,
        recipe=runtime.Recipe.from_file(path),
        device_type="cpu",
        workers=2,  # so that the work is described; it is that of all workers
    ).plan
    assert planned.distribution is not None, "a plan of several workers describes their work"
    works = planned.distribution.works
    solves = [(work.inputs[solve.source].width, solve) for work in works for solve in work.solves]
    in_bytes, out_bytes = planned.read_bytes, planned.output_bytes
    operations = {
        "measuring forwards": sum(work.measured.operations for work in works) / rates.bfloat16,
        "propagating forwards": sum(work.propagated.operations for work in works) / rates.bfloat16,
        "Hessians": sum(
            entry.num_tokens * entry.width**2 for work in works for entry in work.inputs if entry.has_hessian
        )
        / rates.float32,
        "factorization": sum(width**3 / 3 for width, _ in solves) / rates.float32,
        "block updates": sum(tile.num_rows * width**2 for width, solve in solves for tile in solve.tiles)
        / rates.float32,
        "search": sum(
            2 * search.num_candidates * search.num_rows * search.width**2 for work in works for search in work.searches
        )
        / rates.float32,
        "reading": in_bytes / rates.reading,
        "writing": out_bytes / rates.writing,
    }
    if recipe in WITHOUT_DATA:
        return {"a program that moves bytes": moving_seconds(setup, out_bytes / in_bytes)}
    return {name: seconds for name, seconds in operations.items() if seconds}


def moving_seconds(setup: Setup, share: float) -> float:
    """The processor seconds of a program that only moves the weights, with the import of torch."""
    command = [sys.executable, "-c", MOVE, str(setup.model), str(share)]
    return min(measure(command, 1).cpu_s for _ in range(3))


def report(title: str, costs: dict[str, Cost], phases: dict[str, float], limits: dict[str, float]) -> None:
    """Print the phases beside their limits, the whole run, and the ratios."""
    print(f"{title:<24}{'measured, s':>12}{'limit, s':>12}{'share':>8}")
    for name in sorted(phases.keys() | limits.keys(), key=lambda name: -phases.get(name, 0.0)):
        measured, limit = phases.get(name, 0.0), limits.get(name, 0.0)
        share = f"{limit / measured:>8.0%}" if limit and measured else f"{'':>8}"
        print(f"{name:<24}{measured:>12.2f}{limit:>12.2f}{share}")
    now, limit = costs["now"], sum(limits.values())
    print(
        f"{'whole run':<24}{now.cpu_s:>12.2f}{limit:>12.2f}{limit / now.cpu_s:>8.0%}   {now.peak_bytes / 1e6:.0f} MB, "
        f"{now.page_faults / 1e3:.0f} thousand page faults"
    )
    for name, cost in costs.items():
        if name != "now":
            ratio = f"{cost.cpu_s / now.cpu_s:.2f} times, peak {cost.peak_bytes / now.peak_bytes:.2f} times"
            print(f"{name:<24}{cost.cpu_s:>12.2f}{'':>20}   {cost.peak_bytes / 1e6:.0f} MB ({ratio})")
    print(flush=True)


def core_rates() -> CoreRates:
    """Measure this core now."""
    narrow = [torch.randn(2048, 2048).bfloat16() for _ in range(2)]
    wide = [torch.randn(2048, 2048) for _ in range(2)]
    linear = torch.nn.functional.linear
    source, target = torch.ones(_BYTES, dtype=torch.uint8), torch.zeros(_BYTES, dtype=torch.uint8)
    reading, writing = file_rates()
    return CoreRates(
        float32=2 * 2048**3 / best(lambda: product(*wide)),
        bfloat16=2 * 2048**3 / best(lambda: linear(*narrow)),
        copying=2 * _BYTES / best(lambda: target.copy_(source)),
        reading=reading,
        writing=writing,
    )


def product(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Multiply with the faster of torch's libraries, as the runtime does."""
    from runtime.algorithms.products import multiplied

    return multiplied(first, second)


def file_rates() -> tuple[float, float]:
    """The bytes per processor second that are read from the page cache into memory, and written from memory to it."""
    data = memoryview(bytearray(os.urandom(2**20) * (_BYTES // 2**20)))
    with tempfile.TemporaryDirectory(prefix="seqbuild-bench-") as folder:
        path = Path(folder) / "data"

        def write() -> None:
            with path.open("wb", buffering=0) as file:
                file.write(data)

        def read() -> None:
            with path.open("rb", buffering=0) as file:
                file.readinto(data)

        write_s = best(write)
        return _BYTES / best(read), _BYTES / write_s


def best(call: Callable[[], Any], times: int = 5) -> float:
    """The fewest processor seconds of several calls: other processes only add to them."""
    seconds = []
    for _ in range(times):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    main()
