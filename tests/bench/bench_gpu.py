"""Where the time of a subgraph goes on a GPU, beside the least that it can take there.

    python tests/bench/bench_gpu.py [--layers 32] [--samples 128] [--seq-len 2048] [--batch-size 8]
    python tests/bench/bench_gpu.py --device cpu --tiny          # the same code, for a machine without a GPU

A Llama of the shape of Llama 3 8B is made on the spot, of random bf16 weights (16 GB of disk under --folder), and
quantized by GPTQ W4A16 twice: once untouched, for the seconds of each subgraph, and once with the device waited for
around each part, for their split. `solve` is what is left: solves, and all that is none of the others. Reading and
writing overlap with the rest, so what is shown of them is what the loop waits for.

The floor of each part is its operations over the rate of a large matrix product, or its bytes over the bandwidth of the
disk, both measured first, on the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from processes import forget
from random_models import LLAMA_8B, TINY, make_llama

import runtime
from runtime.quantize.statistics import HessianAccumulator
from runtime.streaming.committer import Committer
from runtime.streaming.passes import Passes
from runtime.streaming.run import StreamingRun
from runtime.streaming.work import Work
from runtime.weights.stream import WeightStream

RECIPE = "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}"
_CHUNK_BYTES = 2**26


@dataclass(kw_only=True, slots=True)
class Split:
    """Seconds of the parts of a subgraph."""

    read: float = 0.0
    forward: float = 0.0
    statistics: float = 0.0
    solve: float = 0.0
    write: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, entry.name) for entry in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """What the machine can do: operations a second in bf16 and float32, bytes a second from and to the disk."""

    narrow: float
    wide: float
    read: float
    write: float


class Clock:
    """Adds up what parts of a run take, with the device waited for before and after each.

    Args:
        device: where the run is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.splits: list[Split] = []
        self.seconds: list[float] = []
        self._current = Split()

    def tell(self, event: str, **facts: Any) -> None:
        """Take an event of the run: at a subgraph's end its parts are complete."""
        if event == "subgraph":
            split, self._current = self._current, Split()
            split.forward -= split.statistics
            split.solve = max(facts["seconds"] - split.total, 0.0)
            self.splits.append(split)
            self.seconds.append(facts["seconds"])

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Measure parts while the block runs."""
        parts = [
            (WeightStream, "load", "read"),
            (Passes, "measure", "forward"),
            (Passes, "go_on", "forward"),
            (HessianAccumulator, "add", "statistics"),
            (Work, "quantized", "write"),
            (StreamingRun, "_pass_through", "write"),
            (Committer, "commit", "write"),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, part in parts:
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), part)))
            yield

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            synchronize(self.device)
            start = time.perf_counter()
            result = call(*args, **options)
            synchronize(self.device)
            setattr(self._current, part, getattr(self._current, part) + time.perf_counter() - start)
            return result

        return timed


def main() -> None:
    """Make, measure the machine, run twice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="by default the GPU; without one the CPU, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a small model, and little data")
    parser.add_argument("--layers", type=int, help="by default the shape's own")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go; by default a temporary directory")
    options = parser.parse_args()
    if options.device is None:
        options.device, options.tiny = ("cuda", options.tiny) if torch.cuda.is_available() else ("cpu", True)
    config = dict(TINY if options.tiny else LLAMA_8B)
    config["num_hidden_layers"] = options.layers or config["num_hidden_layers"]
    samples = options.samples or (16 if options.tiny else 128)
    seq_len = options.seq_len or (64 if options.tiny else 2048)
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-", dir=options.folder))
    try:
        run(config, torch.device(options.device), samples, seq_len, options.batch_size, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(
    config: Mapping[str, Any], device: torch.device, num_samples: int, seq_len: int, batch_size: int, folder: Path
) -> None:
    """Both runs, and the table."""
    from seqbuild.build import build

    model = make_llama(folder / "model", config, layers_per_shard=2)
    artifact = runtime.load(build(model, out=folder).path)
    rates = measured_rates(model, folder, device)
    print(
        f"{device}: {rates.narrow / 1e12:.2f} Tflop/s in bf16, {rates.wide / 1e12:.2f} in float32; disk "
        f"{rates.read / 1e9:.2f} GB/s from, {rates.write / 1e9:.2f} GB/s to",
        flush=True,
    )
    ids = torch.randint(0, config["vocab_size"], (num_samples, seq_len), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch_size)]

    def calibrate(clock: Clock) -> None:
        forget(model)
        out = folder / "out"
        runtime.calibrate(
            artifact,
            weights=model,
            recipe=runtime.Recipe.from_text(RECIPE, "the bench"),
            batches=batches,
            out=out,
            device=device,
            watchers=[clock],
        )
        shutil.rmtree(out)

    plain, split = Clock(device), Clock(device)
    calibrate(plain)
    with split.watching():
        calibrate(split)
    report(plain.seconds, split.splits, floor(config, num_samples, seq_len, rates), device)


def report(seconds: list[float], splits: list[Split], least: Split, device: torch.device) -> None:
    """A line for each subgraph, the median of the layers, and the floor of one."""
    names = [entry.name for entry in fields(Split)]
    print(f"{'':<10}{'untouched':>12}{''.join(f'{name:>12}' for name in names)}")
    for index, (whole, split) in enumerate(zip(seconds, splits, strict=True)):
        print(f"{index:<10}{whole:>12.3f}{''.join(f'{getattr(split, name):>12.3f}' for name in names)}")
    layers = slice(1, -1) if len(splits) > 3 else slice(0, -1)  # the first brings the embeddings, the last no layer
    medians = [statistics.median(getattr(split, name) for split in splits[layers]) for name in names]
    print(f"{'median':<10}{statistics.median(seconds[layers]):>12.3f}{''.join(f'{m:>12.3f}' for m in medians)}")
    print(f"{'floor':<10}{'':>12}{''.join(f'{getattr(least, name):>12.3f}' for name in names)}")
    print(f"all subgraphs: {sum(seconds):.1f} s", flush=True)
    if device.type == "cuda":
        print(f"peak on the device: {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB")


def floor(config: Mapping[str, Any], num_samples: int, seq_len: int, rates: Rates) -> Split:
    """The least that one layer can take: each batch goes through it twice, four Hessians are summed up, seven weights
    are solved.
    """
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    num_tokens, num_weights = num_samples * seq_len, sum(rows * columns for rows, columns in shapes)
    attention = 2 * 2 * num_tokens * seq_len * hidden
    # A Hessian is symmetric: half of its entries would do. A factorization takes I^3 / 3, a solve O I^2.
    sums = num_tokens * (3 * hidden**2 + inner**2)
    solves = sum(columns**3 / 3 + rows * columns**2 for rows, columns in shapes)
    return Split(
        read=2 * num_weights / rates.read,
        forward=2 * (2 * num_weights * num_tokens + attention) / rates.narrow,
        statistics=sums / rates.narrow,
        solve=solves / rates.wide,
        write=num_weights / 2 / rates.write,
    )


def measured_rates(model: Path, folder: Path, device: torch.device) -> Rates:
    """Of this machine, now."""
    size = 8192 if device.type == "cuda" else 512
    return Rates(
        narrow=product_rate(size, torch.bfloat16, device),
        wide=product_rate(size, torch.float32, device),
        read=read_rate(model),
        write=write_rate(folder / "written"),
    )


def product_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a large product; the best of several."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def read_rate(directory: Path) -> float:
    """Bytes a second of the largest file, which the page cache is asked to forget first."""
    path = max(directory.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    forget(directory)
    buffer, total = bytearray(_CHUNK_BYTES), 0
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total += count
    return total / (time.perf_counter() - start)


def write_rate(path: Path) -> float:
    """Bytes a second until the disk has them."""
    data = os.urandom(_CHUNK_BYTES)
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(4):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rate = 4 * len(data) / (time.perf_counter() - start)
    path.unlink()
    return rate


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
