"""How fast a device computes and moves data: assumed in round numbers, or measured (`planning.measure`).

With assumed rates, predicted times are rough; a predicted speedup depends only on the ratios of the rates.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch

from runtime.console import parse_bytes
from runtime.errors import UsageError

ASSUMED = "assumed"
Kinds = tuple[tuple[str, float], ...]  # a rate of each kind of grid


@dataclass(frozen=True, kw_only=True, slots=True)
class PassRates:
    """Rates of the model's own operators in one dtype, per second.

    Attributes:
        products: operations of matrix products.
        attention: operations of fused attention.
        moving: bytes that other operators read or write.
    """

    products: float
    attention: float
    moving: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates of one worker's device, per second. Operations of a product count as 2, those of half a product as 1.

    Attributes:
        passes: of the model's own operators, in the dtype of the run.
        call_s: seconds that each operator of the model takes besides.
        rounding_inputs: numbers of inputs that are rounded, by kind of grid.
        sums: operations of Hessians, and of the sizes of outputs.
        gathering: numbers of inputs that are converted for a Hessian.
        completing: numbers of Hessians that get their memory, and their other half.
        channels: numbers of inputs whose ranges are measured.
        factorization: operations of factorizations.
        ordering: numbers of Hessians that are checked, sorted and copied.
        products: operations of the products in a solve.
        columns: weights that are rounded column by column, and packed.
        block_s: seconds that each block of columns of a tile takes besides.
        nearest: weights that are rounded to nearest and packed, by kind of grid.
        unpacking: weights, by kind of grid.
        clipping: weights whose ranges are searched on a Gram matrix.
        searching: operations of the products of AWQ's search.
        trying: weights that AWQ's search rounds.
        memory: bytes that are read or written.
        reading: bytes of the checkpoint, from the page cache.
        loading: bytes of weights in the run's dtype, from memory to the device.
        writing: bytes of the new checkpoint, to the page cache.
        flushing: bytes to the disk.
        hashing: bytes of files whose digest is computed beside the run.
        link: bytes from worker to worker, in each direction.
        start_s: seconds from the start of a process to the end of its imports, and of its end.
        parameter_s: seconds that each parameter takes before the first subgraph.
        step_s, module_s: seconds that each subgraph, and each quantized module, takes besides.
        in_a_run: how many times as long a function takes in a run as alone.
        reads_ahead: whether weights are loaded while the subgraph before computes.
        origin: `assumed`, or what they were measured on.
    """

    passes: PassRates
    call_s: float
    rounding_inputs: Kinds
    sums: float
    gathering: float
    completing: float
    channels: float
    factorization: float
    ordering: float
    products: float
    columns: float
    block_s: float
    nearest: Kinds
    unpacking: Kinds
    clipping: float
    searching: float
    trying: float
    memory: float
    reading: float
    loading: float
    writing: float
    flushing: float
    hashing: float
    link: float
    start_s: float
    parameter_s: float
    step_s: float
    module_s: float
    reads_ahead: bool
    in_a_run: float = 1.0
    origin: str = ASSUMED

    @classmethod
    def of(cls, device_type: str, dtype: torch.dtype, link: float | None = None) -> Rates:
        """The assumed rates of a type of device, with another link between workers if it is given."""
        found = CPU_CORE if device_type == "cpu" else H100
        if dtype in (torch.float32, torch.float64):
            found = replace(found, passes=CPU_FLOAT32 if device_type == "cpu" else H100_FLOAT32)
        return found if link is None else replace(found, link=link)


def rate_of(kinds: Kinds, kind: str) -> float:
    """The rate of a kind, or else of the most similar one: rather its observer, then its type, bits and groups."""

    def similarity(known: str) -> tuple[bool, bool, bool, bool]:
        own, other = ([*name.split("-"), ""] for name in (known, kind))
        return own[2:] == other[2:], own[0][:3] == other[0][:3], own[0] == other[0], own[1] == other[1]

    return max(kinds, key=lambda entry: similarity(entry[0]))[1]


# One core of a server with AVX-512 (measured: an AMD EPYC, OMP_NUM_THREADS=1), gloo between processes of one machine.
CPU_FLOAT32 = PassRates(products=100e9, attention=70e9, moving=10e9)
CPU_CORE = Rates(
    passes=PassRates(products=400e9, attention=40e9, moving=6e9),
    call_s=8e-6,
    rounding_inputs=(("int8-channel", 350e6), ("float4-tensor_group", 30e6)),
    sums=190e9,
    gathering=1.5e9,
    completing=300e6,
    channels=0.5e9,
    factorization=110e9,
    ordering=250e6,
    products=170e9,
    columns=70e6,
    block_s=0.3e-3,
    nearest=(
        ("int4-group", 400e6),
        ("int8-channel", 370e6),
        ("float8-channel", 360e6),
        ("float4-tensor_group", 110e6),
        ("float4-group", 280e6),
        ("float8-group", 130e6),
        ("int4-group-mse", 10e6),
    ),
    unpacking=(("int4-group", 600e6), ("int8-channel", 3e9), ("float8-channel", 250e6), ("float4-group", 140e6)),
    clipping=30e6,
    searching=480e9,
    trying=150e6,
    memory=30e9,
    reading=4e9,
    loading=5e9,
    writing=1.5e9,
    flushing=0.5e9,
    hashing=1.2e9,
    link=2e9,
    start_s=1.5,
    parameter_s=0.1e-3,
    step_s=0.02,
    module_s=1e-3,
    reads_ahead=False,
)
# An H100 or H200 (assumed: half of the data sheet for products, NVLink between workers).
H100_FLOAT32 = PassRates(products=35e12, attention=35e12, moving=2.5e12)
H100 = Rates(
    passes=PassRates(products=450e12, attention=300e12, moving=2.5e12),
    call_s=8e-6,
    rounding_inputs=(("int8-channel", 20e9),),
    sums=150e12,
    gathering=200e9,
    completing=50e9,
    channels=100e9,
    factorization=12e12,
    ordering=50e9,
    products=35e12,
    columns=15e9,
    block_s=0.25e-3,
    nearest=(("int4-group", 4e9), ("int4-group-mse", 0.4e9)),
    unpacking=(("int4-group", 50e9),),
    clipping=2e9,
    searching=150e12,
    trying=20e9,
    memory=2.5e12,
    reading=4e9,
    loading=10e9,
    writing=1.5e9,
    flushing=1e9,
    hashing=1.2e9,
    link=450e9,
    start_s=5.0,
    parameter_s=0.1e-3,
    step_s=0.02,
    module_s=1e-3,
    reads_ahead=True,
)


def optional_bandwidth(text: str | None, *, option: str) -> float | None:
    """Parse bytes per second, such as 25GB/s; None for an option that was not given.

    Raises:
        UsageError: if the text is not a size per second above 0.
    """
    if text is None:
        return None
    size, per, unit = text.rpartition("/")
    with contextlib.suppress(UsageError):
        if per and unit == "s" and (found := parse_bytes(size, option=option)):
            return float(found)
    raise UsageError(f"{option} must be bytes per second; got {text!r}", hint="write it as 25GB/s")
