"""One table of what a GPU takes, beside the least that it could take, in under six minutes on a fresh machine.

    python tests/bench/bench_gpu.py -o DIR [--budget 330] [--peer-python PYTHON] [--layers 3] [--samples 512]
    python tests/bench/bench_gpu.py --device cpu --tiny        # the same code, for a machine without a GPU

    rates     products in bf16 and float32, memory, copies from and to the host, disk, one launch
    layers    GPTQ W4A16 of a few layers of the shape of Llama 3 8B with random weights, and the seconds of 32 of them
    peer      the same by llm-compressor, if --peer-python, or this interpreter, has it
    kernels   sums of Hessians, factorizations, solves with and without Triton, round-to-nearest
    schemes   GPTQ of the layers in NVFP4 and FP8, and with --cuda-graphs
    tests     the tests marked gpu

Parts run in the order of their importance, each if the budget has room for it; a part that fails is a row with the
reason. A floor is operations or bytes over the rates that were measured first. Seconds of 32 layers are extrapolated:
the first layer, and the median of the others for each other. The seconds of a layer include reading, writing and the
journal; those of a run its start and the head as well, but not the imports.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from gpu_runs import ROOT, LayerRun, run_ours, run_peer
from gpu_table import Layer, Part, Rates, Row, as_markdown, extrapolated, layer_floor, run_parts, write_table
from processes import forget
from random_models import LLAMA_8B, TINY, make_llama

from runtime.algorithms import gptq, gptq_cuda
from runtime.algorithms.hessian import HessianAccumulator
from runtime.algorithms.rtn import quantize_rtn

_CHUNK_BYTES = 2**28
NUM_LAYERS = 32  # of the extrapolation


def recipe_of(scheme: str) -> str:
    """GPTQ of all Linear modules but the head."""
    return f"GPTQModifier: {{targets: Linear, scheme: {scheme}, ignore: [lm_head]}}"


@dataclass(kw_only=True)
class Bench:
    """What is measured, where, and what the parts tell each other.

    Attributes:
        options: of the command line.
        folder: for models and checkpoints.
        device: of the measurements.
        config: of the model.
        rates: of the machine, when they are known.
        artifact: of the model, when it is compiled.
        ours: the run that llm-compressor's is compared with.
    """

    options: argparse.Namespace
    folder: Path
    device: torch.device
    config: dict[str, Any]
    rates: Rates | None = None
    artifact: Path = Path()
    ours: LayerRun | None = None

    @property
    def layer(self) -> Layer:
        """The sizes of a layer and of the data."""
        return Layer.of(self.config, self.options.samples, self.options.seq_len)

    def floor(self, operations: float, *, is_narrow: bool) -> float | None:
        """The seconds of so many operations, if rates are known."""
        if self.rates is None:
            return None
        return operations / (self.rates.narrow if is_narrow else self.rates.wide)

    def seconds(self, call: Callable[[], object], repeats: int = 3) -> float:
        """The fewest seconds of a call, with the device waited for; the first call, which compiles, does not count."""
        found = []
        for _ in range(repeats + 1):
            synchronize(self.device)
            start = time.perf_counter()
            call()
            synchronize(self.device)
            found.append(time.perf_counter() - start)
        return min(found[1:])


def main() -> None:
    """Run the parts, and print and write the table."""
    options = parsed()
    device = torch.device(options.device)
    config = dict(TINY if options.tiny else LLAMA_8B | {"vocab_size": 32000})
    config["num_hidden_layers"] = options.layers
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-", dir=options.folder))
    bench = Bench(options=options, folder=folder, device=device, config=config)
    begin, rows = time.monotonic(), []
    try:
        for row in run_parts(parts_of(bench), options.budget):
            rows.append(row)
            print("  ".join(filter(None, row.cells())), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        facts = facts_of(bench) | {"seconds": round(time.monotonic() - begin, 1)}
        print("\n" + as_markdown(rows))
        if options.out is not None:
            write_table(rows, facts, options.out)


def parsed() -> argparse.Namespace:
    """The options of the command line; without a GPU those of a rehearsal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="by default the GPU; without one the CPU, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a small model, and little data")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--budget", type=float, default=330, help="seconds for all parts")
    parser.add_argument("--peer-python", help="an interpreter that has llm-compressor")
    parser.add_argument("--folder", type=Path, help="for models and checkpoints; by default a temporary directory")
    parser.add_argument("-o", "--out", type=Path, help="a directory for table.md and table.json")
    options = parser.parse_args()
    if options.device is None:
        options.device, options.tiny = ("cuda", options.tiny) if torch.cuda.is_available() else ("cpu", True)
    options.samples = options.samples or (16 if options.tiny else 512)
    options.seq_len = options.seq_len or (64 if options.tiny else 2048)
    return options


def facts_of(bench: Bench) -> dict[str, Any]:
    """What the table was measured with."""
    is_cuda = bench.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(bench.device) if is_cuda else "cpu",
        "torch": torch.__version__,
        "triton": gptq_cuda.has_triton(),
        "model": f"{bench.options.layers} layers of hidden size {bench.config['hidden_size']}",
        "data": f"{bench.options.samples} x {bench.options.seq_len} tokens in batches of {bench.options.batch_size}",
    }


def parts_of(bench: Bench) -> list[Part]:
    """The parts, from the most important on, with the seconds that they are expected to take."""
    scale = 0.5 if bench.options.tiny else 1.0
    parts = [
        ("rates", 15, rate_rows),
        ("layers", 60, layer_rows),
        ("peer", 110, peer_rows),
        ("sums and factorizations", 15, hessian_rows),
        ("solves", 30, solve_rows),
        ("schemes", 60, scheme_rows),
        ("round-to-nearest", 5, nearest_rows),
        ("tests marked gpu", 60, test_rows),
    ]
    return [
        Part(name=name, seconds=scale * seconds, rows=lambda left, rows=rows: rows(bench, left))
        for name, seconds, rows in parts
    ]


def rate_rows(bench: Bench, left: float) -> Iterator[Row]:
    """What the machine can do."""
    size = 8192 if bench.device.type == "cuda" else 512
    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        first, second = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        products[dtype] = 2 * size**3 / bench.seconds(lambda a=first, b=second: a @ b)
    large = torch.zeros(_CHUNK_BYTES if bench.device.type == "cuda" else 2**24, dtype=torch.uint8, device=bench.device)
    pinned = torch.zeros(large.shape, dtype=torch.uint8, pin_memory=bench.device.type == "cuda")
    small = torch.zeros(1, device=bench.device)
    bench.rates = Rates(
        narrow=products[torch.bfloat16],
        wide=products[torch.float32],
        memory=2 * large.numel() / bench.seconds(lambda: large.view(torch.float32).add_(1)),
        upload=large.numel() / bench.seconds(lambda: large.copy_(pinned, non_blocking=True)),
        download=large.numel() / bench.seconds(lambda: pinned.copy_(large, non_blocking=True)),
        launch_s=bench.seconds(lambda: [small.add_(1) for _ in range(1000)]) / 1000,
        **disk_rates(bench.folder, large.numel()),
    )
    rates = bench.rates
    yield Row(what="product in bf16", measured=rates.narrow / 1e12, unit="Tflop/s")
    yield Row(what="product in float32", measured=rates.wide / 1e12, unit="Tflop/s")
    for name in ("memory", "upload", "download", "read", "write"):
        yield Row(what=f"bytes: {name}", measured=getattr(rates, name) / 1e9, unit="GB/s")
    yield Row(what="one launch", measured=rates.launch_s * 1e6, unit="us")


def disk_rates(folder: Path, num_bytes: int) -> dict[str, float]:
    """Bytes a second to a file until the disk has them, and from it after the page cache has forgotten it."""
    path, data = folder / "rate" / "data", bytes(num_bytes)
    path.parent.mkdir()
    start = time.perf_counter()
    path.write_bytes(data)
    forget(path.parent)  # after a flush
    written = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(2**24):
            pass
    read = time.perf_counter()
    path.unlink()
    return {"write": num_bytes / (written - start), "read": num_bytes / (read - written)}


def layer_rows(bench: Bench, left: float) -> Iterator[Row]:
    """GPTQ W4A16 of the layers by this project."""
    from seqbuild.build import build

    options = bench.options
    model = make_llama(bench.folder / "model", bench.config, layers_per_shard=1, device=options.device)
    bench.artifact = build(model, out=bench.folder).path
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, bench.config["vocab_size"], (options.samples, options.seq_len), generator=generator)
    torch.save(ids, bench.folder / "tokens.pt")
    bench.ours = calibrated(bench, "W4A16", left)
    yield from rows_of_run(bench, "seqbuild, GPTQ W4A16", bench.ours)


def calibrated(bench: Bench, scheme: str, left: float, **options: Any) -> LayerRun:
    """Quantize the layers in a process."""
    out = bench.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    return run_ours(
        bench.artifact,
        bench.folder / "model",
        bench.folder / "tokens.pt",
        recipe_of(scheme),
        out,
        bench.options.device,
        left,
        batch_size=bench.options.batch_size,
        **options,
    )


def rows_of_run(bench: Bench, name: str, run: LayerRun) -> Iterator[Row]:
    """The seconds of a layer and of all, and memory."""
    least = layer_floor(bench.layer, bench.rates) if bench.rates is not None else None
    layers = ", ".join(f"{one:.2f}" for one in run.layers)
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in run.phases.items())
    note = f"each layer: {layers} s" + (f"; by phase: {phases} s" if phases else "")
    yield Row(what=f"{name}: a layer", measured=extrapolated(run.layers, 2) - run.layers[0], floor=least, note=note)
    yield Row(
        what=f"{name}: {NUM_LAYERS} layers",
        measured=extrapolated(run.layers, NUM_LAYERS),
        floor=None if least is None else NUM_LAYERS * least,
        note=f"extrapolated from {len(run.layers)} layers; all else took {run.total - sum(run.layers):.1f} s",
    )
    memory = f"host {run.host_bytes / 1e9:.2f} GB"
    yield Row(what=f"{name}: peak memory of the device", measured=run.device_bytes / 1e9, unit="GB", note=memory)
    for remark in run.remarks:
        yield Row(what=f"{name}: remark", note=remark)


def peer_rows(bench: Bench, left: float) -> Iterator[Row]:
    """The same by llm-compressor, and the ratio."""
    python = bench.options.peer_python
    if python is None and importlib.util.find_spec("llmcompressor") is None:
        yield Row(what="llm-compressor", note="not run: name an interpreter that has it with --peer-python")
        return
    tokens, out = bench.folder / "tokens.pt", bench.folder / "peer"
    recipe = f"quant_stage: {{quant_modifiers: {{{recipe_of('W4A16')}}}}}"
    run = run_peer(python or sys.executable, bench.folder / "model", tokens, recipe, out, bench.options.device, left)
    yield from rows_of_run(bench, "llm-compressor, GPTQ W4A16", run)
    if bench.ours is not None:
        ratio = extrapolated(run.layers, NUM_LAYERS) / extrapolated(bench.ours.layers, NUM_LAYERS)
        yield Row(what=f"llm-compressor / seqbuild, {NUM_LAYERS} layers", measured=ratio, unit="x", note="goal: 5 x")


def hessian_rows(bench: Bench, left: float) -> Iterator[Row]:
    """The sum of a batch, and the factorization, for each width of the model."""
    num_tokens = bench.options.batch_size * bench.options.seq_len
    for width in dict.fromkeys(bench.layer.inputs):
        inputs = torch.randn(num_tokens, width, device=bench.device).to(torch.bfloat16)
        accumulator = HessianAccumulator(width, device=bench.device)
        yield Row(
            what=f"Hessian sum, {num_tokens} tokens of {width}",
            measured=bench.seconds(lambda a=accumulator, x=inputs: a.add(x)),
            floor=bench.floor(num_tokens * width**2, is_narrow=True),
            note="floor: half of a symmetric product",
        )
        options = solve_options(bench, "W4A16")
        hessian = hessian_of(bench, width)
        shape = [width, width]
        yield Row(
            what=f"factorization, {width}",
            measured=bench.seconds(
                lambda h=hessian, o=options, s=shape: gptq.factor_hessian(h, o, s, torch.float32), 2
            ),
            floor=bench.floor(width**3 / 3, is_narrow=False),
            note="with the order of columns",
        )


def hessian_of(bench: Bench, width: int) -> torch.Tensor:
    """A positive definite Hessian of random inputs."""
    inputs = torch.randn(2 * width, width, device=bench.device)
    return inputs.T @ inputs


def solve_options(bench: Bench, scheme: str) -> gptq.SolveOptions:
    """The options of a solve; groups of 128 columns in a tiny model, too."""
    args: QuantizationArgs = preset_name_to_scheme(scheme, ["Linear"]).weights
    return gptq.SolveOptions(args=args, scale_dtype=torch.bfloat16)


def solve_rows(bench: Bench, left: float) -> Iterator[Row]:
    """A solve with known factors, in three schemes, with and without Triton."""
    shapes = {shape: None for shape in bench.layer.shapes if shape[0] >= bench.layer.hidden}
    for rows, width in (next(iter(shapes)), list(shapes)[-1]):
        weight = torch.randn(rows, width, device=bench.device, dtype=torch.bfloat16)
        hessian = hessian_of(bench, width)
        for scheme in ("W4A16", "NVFP4A16", "FP8"):
            for is_plain in (False, True):
                if is_plain and (bench.device.type != "cuda" or width > bench.layer.hidden):
                    continue  # the plain one takes seconds, and is the only one on the CPU
                with (
                    mock.patch.object(gptq_cuda, "is_supported", lambda *_: False)
                    if is_plain
                    else contextlib.nullcontext()
                ):
                    seconds = bench.seconds(solve_of(bench, scheme, weight, hessian), 1 if is_plain else 2)
                yield Row(
                    what=f"solve {scheme}, {rows} x {width}" + (", without Triton" if is_plain else ""),
                    measured=seconds,
                    floor=bench.floor(rows * width**2, is_narrow=False),
                )


def solve_of(bench: Bench, scheme: str, weight: torch.Tensor, hessian: torch.Tensor) -> Callable[[], object]:
    """Factor a Hessian, and return a call that solves a weight with its factors."""
    from runtime.algorithms import grid
    from runtime.algorithms.gptq_tiles import tiles_of

    options = solve_options(bench, scheme)
    found = gptq.factor_siblings([weight], hessian, options)
    options = replace(options, global_scale=grid.shared_global_scale(options.args, None, [weight]))
    tiles = tiles_of([weight.shape], options.args, bench.device.type)
    return lambda: list(gptq.solve_tiles([weight], tiles, found, options))


def scheme_rows(bench: Bench, left: float) -> Iterator[Row]:
    """Other schemes, and CUDA graphs."""
    end = time.monotonic() + left
    for scheme in ("NVFP4A16", "FP8_DYNAMIC"):
        run = calibrated(bench, scheme, end - time.monotonic())
        yield from list(rows_of_run(bench, f"seqbuild, GPTQ {scheme}", run))[:2]
    if bench.device.type == "cuda":
        run = calibrated(bench, "W4A16", end - time.monotonic(), cuda_graphs=True)
        yield from rows_of_run(bench, "seqbuild, GPTQ W4A16, CUDA graphs", run)


def nearest_rows(bench: Bench, left: float) -> Iterator[Row]:
    """Round-to-nearest of the largest weight."""
    rows, width = bench.layer.shapes[-2]
    weight = torch.randn(rows, width, device=bench.device).to(torch.bfloat16)
    for scheme in ("W4A16", "FP8_DYNAMIC"):
        args = preset_name_to_scheme(scheme, ["Linear"]).weights
        yield Row(
            what=f"round-to-nearest {scheme}, {rows} x {width}",
            measured=bench.seconds(lambda a=args: quantize_rtn(weight, a, scale_dtype=torch.bfloat16)),
            floor=6 * rows * width / bench.rates.memory if bench.rates is not None else None,
            note="floor: read bf16, write float32",
        )


def test_rows(bench: Bench, left: float) -> Iterator[Row]:
    """The tests marked gpu, in one process."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
    lines = [line for line in done.stdout.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    failed = [line.removeprefix("FAILED ")[:120] for line in lines if line.startswith("FAILED ")]
    note = "; ".join([lines[-1], *failed[:5]])
    yield Row(what="tests marked gpu", measured=time.perf_counter() - start, note=note)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
