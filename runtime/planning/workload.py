"""The workload of a planned calibration, and the memory that a process needs besides it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from runtime.streaming.activations import Budget

# Round numbers for what the process holds before it loads anything, and CUDA's own share of a device.
PROCESS_BYTES, CONTEXT_BYTES = 400 * 10**6, 600 * 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is asked for.

    Attributes:
        num_samples, batch_size: of the calibration data.
        sizes: of the manifest's dims for a full batch, by name.
        dtype: of weights and activations in the run.
        device_type: `cpu`, or that of an accelerator.
        budget: what values between subgraphs may take on the device and on the host; what is more lies on disk.
        process_bytes: what the process holds before it loads a weight.
        statistics_bytes: what the statistics of a layer's experts may take at a time; None for no bound.
        all_tokens: whether experts are measured on all tokens, as in `calibrate`.
        is_padded: whether samples are filled up to a common length, so that masks differ from batch to batch.
    """

    num_samples: int
    batch_size: int
    sizes: Mapping[str, int]
    dtype: torch.dtype
    device_type: str
    budget: Budget = field(default_factory=Budget)
    process_bytes: int = PROCESS_BYTES
    statistics_bytes: int | None = None
    all_tokens: bool = True
    is_padded: bool = False
