"""Time calls on a device, and fit their seconds as a sum of parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from runtime.planning.rates import CPU_CORE, H100

_ALIKE = 0.1  # how much parts that differ in slowness weigh, relative to a call whose seconds are not met
_ENOUGH_S = 0.3  # of one call, after which it is not repeated
_TIMES = 3  # calls, of which the quickest counts: other processes only add to the time


class Stopwatch:
    """Times calls, and makes their operands.

    Args:
        device: what computes.

    Attributes:
        assumed: the usual rates of such a device.
        narrow, wide: sizes of matrices for which the device takes long enough to be timed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.assumed = CPU_CORE if device.type == "cpu" else H100
        self.narrow, self.wide = (256, 2048) if device.type == "cpu" else (1024, 8192)
        # With one thread, processor time does not count the time in which other processes run.
        is_alone = device.type == "cpu" and torch.get_num_threads() == 1
        self._clock = time.thread_time if is_alone else time.perf_counter
        self._generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int) -> torch.Tensor:
        """Return normally distributed numbers in float32."""
        return torch.randn(*shape, generator=self._generator).to(self.device)

    def best(self, call: Callable[[], Any]) -> float:
        """The fewest seconds of several calls, after one that prepares."""
        found = []
        for _ in range(1 + _TIMES):
            self._wait()
            start = self._clock()
            call()
            self._wait()
            found.append(self._clock() - start)
            if sum(found[1:]) > _ENOUGH_S:
                break
        return max(min(found[1:]), 1e-9)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)


def fitted(parts: Sequence[Sequence[float]], seconds: Sequence[float], assumed: Sequence[float]) -> list[float]:
    """Find the seconds of each part for which their sums differ least, relatively, from the measured seconds.

    All parts are slowed down or sped up alike where the calls do not tell them apart.

    Args:
        parts: of each call, the size of each part.
        seconds: of each call.
        assumed: seconds of each part for its size, as far as they are known.
    """
    count = len(assumed)
    rows = [
        [size * unit / total for size, unit in zip(own, assumed, strict=True)]
        for own, total in zip(parts, seconds, strict=True)
    ]
    alike = [[_ALIKE * ((index == one) - 1 / count) for index in range(count)] for one in range(count)]
    left = torch.tensor(rows + alike, dtype=torch.float64)
    right = torch.tensor([1.0] * len(rows) + [0.0] * count, dtype=torch.float64)
    found = torch.linalg.lstsq(left, right[:, None]).solution.flatten()
    usual = max(float(found.mean()), 1e-3)
    return [unit * max(float(slowness), usual / 4) for unit, slowness in zip(assumed, found, strict=True)]
