"""How fast a device computes and moves data, in round numbers: for a plan without a measurement.

Rates are assumptions. Predicted times are rough; a predicted speedup depends only on the ratios of the rates.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch

from runtime.console import parse_bytes
from runtime.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Rates of one worker's device, per second. Operations of a product count as 2, those of half a product as 1.

    Attributes:
        forward: operations of the model's own products.
        forward_float32: the same in float32.
        sums: operations of Hessians.
        factorization: operations of factorizations.
        products: operations of the products in a solve.
        columns: weights that are rounded column by column.
        block_s: seconds that each block of columns of a tile takes besides.
        nearest: weights that are rounded to nearest, with the search of a range.
        packing, unpacking: weights.
        memory: bytes that are read or written.
        loading: bytes of weights from the page cache to the device.
        link: bytes from worker to worker, in each direction.
        step_s, module_s: seconds that each subgraph, and each quantized module, takes besides.
        reads_ahead: whether weights are loaded while the subgraph before computes.
    """

    forward: float
    forward_float32: float
    sums: float
    factorization: float
    products: float
    columns: float
    block_s: float
    nearest: float
    packing: float
    unpacking: float
    memory: float
    loading: float
    link: float
    step_s: float
    module_s: float
    reads_ahead: bool

    @classmethod
    def of(cls, device_type: str, dtype: torch.dtype, link: float | None = None) -> Rates:
        """The rates of a type of device, with another link between workers if it is given."""
        found = CPU_CORE if device_type == "cpu" else H100
        if dtype in (torch.float32, torch.float64):
            found = replace(found, forward=found.forward_float32)
        return found if link is None else replace(found, link=link)


# One core of a server with AVX-512 (measured: an AMD EPYC, OMP_NUM_THREADS=1), gloo between processes of one machine.
CPU_CORE = Rates(
    forward=250e9,
    forward_float32=100e9,
    sums=170e9,
    factorization=110e9,
    products=140e9,
    columns=100e6,
    block_s=0.4e-3,
    nearest=400e6,
    packing=1.2e9,
    unpacking=1.3e9,
    memory=30e9,
    loading=5e9,
    link=2e9,
    step_s=0.02,
    module_s=1e-3,
    reads_ahead=False,
)
# An H100 or H200 (assumed: half of the data sheet for products, NVLink between workers).
H100 = Rates(
    forward=450e12,
    forward_float32=35e12,
    sums=150e12,
    factorization=12e12,
    products=35e12,
    columns=100e9,
    block_s=0.25e-3,
    nearest=5e9,
    packing=20e9,
    unpacking=50e9,
    memory=2.5e12,
    loading=10e9,
    link=450e9,
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
