"""The workload of a planned calibration, and the forecast of its cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from runtime.data.lanes import lane_borders
from runtime.planning.distribution import Distribution
from runtime.planning.machine import Machine
from runtime.planning.rates import Rates
from runtime.planning.seconds import RunSeconds
from runtime.streaming.activations import Budget
from runtime.streaming.options import FLOAT32

# The process before it loads anything, and CUDA's own share of a device, in round numbers.
PROCESS_BYTES, CONTEXT_BYTES = 400 * 10**6, 600 * 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """The work that is planned.

    Attributes:
        num_samples, batch_size: of the calibration data.
        sizes: of the manifest's dims for a full batch, by name.
        dtype: of weights and activations in the run.
        device_type: `cpu`, or the type of an accelerator.
        budget: memory for values between subgraphs, on the device and on the host; the rest goes to disk.
        process_bytes: memory of the process before it loads a weight.
        statistics_bytes: the largest size of the experts' statistics at a time; None for no bound.
        all_tokens: whether experts are measured on all tokens, as in `calibrate`.
        is_padded: whether samples are padded to a common length, so that masks differ from batch to batch.
        workers: the number of processes that share the run; memory and values are those of one of them.
        is_divided: whether messages, times and the speedup are predicted.
        bandwidth: bytes per second from worker to worker; None for the usual link of the device.
        machine: measured rates; None to assume them.
        solve_products: the dtype of most products of a GPTQ solve.
        has_graphs: whether CUDA graphs replay the passes that go on.
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
    workers: int = 1
    is_divided: bool = False
    bandwidth: float | None = None
    machine: Machine | None = None
    solve_products: str = FLOAT32
    has_graphs: bool = False

    @property
    def is_cpu(self) -> bool:
        """Whether subgraphs run in host memory."""
        return self.device_type == "cpu"

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return self.num_samples * max(self.sizes.values(), default=1)

    @property
    def num_lanes(self) -> int:
        """Lanes that the samples are divided into."""
        return len(lane_borders(self.num_samples, self.num_tokens)) - 1

    @property
    def own_samples(self) -> int:
        """The samples of the worker that has most."""
        lanes = self.num_lanes
        return -(-self.num_samples * -(-lanes // self.workers) // lanes)

    @property
    def rates(self) -> Rates:
        """The rates of a worker."""
        if self.machine is None:
            return Rates.of(self.device_type, self.dtype, self.bandwidth)
        return self.machine.rates(self.dtype, self.bandwidth)

    def split(self, activations: int) -> tuple[int, int]:
        """The bytes of values between subgraphs that are on the device, and on the host."""
        on_device = 0 if self.is_cpu else _within(activations, self.budget.device_bytes)
        return on_device, _within(activations - on_device, self.budget.host_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubgraphForecast:
    """The cost of one subgraph, in bytes.

    Attributes:
        label: its targets.
        weights, statistics, working: see `planning.predict`; `working` includes the copies of inputs.
        solve: the peak of rescaling and solving, statistics included.
        activations: values of all batches that wait while it runs.
        read, written: of the original and the new checkpoint.
        device, host: peaks.
        num_modules: number of modules that are quantized.
        runs: whether batches run through it.
        is_estimated: whether its working memory is a guess, because its code depends on values.
        seconds: by phase, see `planning.seconds`.
        sent: by all workers to each other.
        most_sent: by the worker that sends most.
        saved: statistics on disk.
    """

    label: str
    weights: int
    statistics: int
    solve: int
    working: int
    activations: int
    read: int
    written: int
    device: int
    host: int
    num_modules: int
    runs: bool
    is_estimated: bool
    seconds: Mapping[str, float]
    sent: int = 0
    most_sent: int = 0
    saved: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """The predicted cost of a run. Totals are peaks for memory, and sums for traffic.

    Attributes:
        work: the planned work.
        steps: one for each subgraph.
        read_bytes: of the original checkpoint.
        output_bytes: of the new one.
        seconds: of the run.
        remarks: assumptions behind the figures.
        warnings: shortages of a run that continues in spite of them.
        distribution: how the work divides among several workers; None for one.
    """

    work: Workload
    steps: tuple[SubgraphForecast, ...]
    read_bytes: int
    output_bytes: int
    seconds: RunSeconds
    remarks: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    distribution: Distribution | None = None

    @property
    def device_bytes(self) -> int:
        """Peak on the device that subgraphs run on; on the CPU this is part of the host's."""
        return max(step.device for step in self.steps)

    @property
    def host_bytes(self) -> int:
        """Peak resident memory of the process."""
        return max(step.host for step in self.steps)

    @property
    def activation_bytes(self) -> int:
        """Peak of the values between subgraphs, in memory and on disk."""
        return max(step.activations for step in self.steps)

    @property
    def statistics_bytes(self) -> int:
        """Peak of the statistics."""
        return max(step.statistics for step in self.steps)

    @property
    def held_bytes(self) -> int:
        """The part of the values between subgraphs that is in host memory."""
        return self.work.split(self.activation_bytes)[1]

    @property
    def spilled_bytes(self) -> int:
        """The part of the values between subgraphs that is on disk."""
        return self.activation_bytes - sum(self.work.split(self.activation_bytes))

    @property
    def disk_bytes(self) -> int:
        """Disk space of the run."""
        return self.output_bytes + self.spilled_bytes + self.saved_bytes

    @property
    def saved_bytes(self) -> int:
        """Size of the statistics that are kept on disk."""
        return sum(step.saved for step in self.steps)


def _within(size: int, limit: int | None) -> int:
    return size if limit is None else min(size, limit)
