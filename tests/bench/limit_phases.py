"""Run the host's command line in this process, and print the processor seconds of each phase as a line of JSON.

    python tests/bench/limit_phases.py calibrate ARTIFACT --weights DIR ...

A call belongs to the innermost phase that runs it. What no phase covers is `rest`; work of other threads (writing,
reading ahead) is `threads`.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# (phase, module, class or "", name). A name is patched where it is looked up when it is called.
PLACES = (
    ("measuring forwards", "runtime.streaming.passes", "Passes", "measure"),
    ("propagating forwards", "runtime.streaming.passes", "Passes", "go_on"),
    ("Hessians", "runtime.algorithms.hessian", "HessianAccumulator", "add"),
    ("Hessians", "runtime.algorithms.hessian", "HessianAccumulator", "fold_ended_"),
    ("Hessians", "runtime.algorithms.hessian", "HessianAccumulator", "_complete_"),
    ("factorization", "runtime.quantize.solves", "", "factor_hessian"),
    ("reordering", "runtime.algorithms.gptq_factors", "", "_reordered_in_place"),
    ("reordering", "runtime.algorithms.gptq", "", "_columns_as_rows"),
    ("reordering", "runtime.algorithms.gptq", "", "_in_original_order"),
    ("block updates", "runtime.algorithms.gptq", "", "_solve_"),
    ("columns", "runtime.algorithms.gptq", "", "solve_block_"),
    ("output sizes", "runtime.algorithms.gptq", "", "output_squares"),
    ("output sizes", "runtime.quantize.solves", "", "output_size"),
    ("output sizes", "runtime.quantize.statistics", "InputStatistics", "output_square"),
    ("search", "runtime.quantize.smoothing", "", "search_scales"),
    ("clipping", "runtime.quantize.nearest", "", "quantize_clipped"),
    ("rounding to nearest", "runtime.quantize.nearest", "", "quantize_rtn"),
    ("rounding to nearest", "runtime.quantize.solves", "", "round_to_nearest"),
    ("packing", "runtime.quantize.solves", "", "compress_rows"),
    ("packing", "runtime.formats.compressed", "", "decompress_module"),
    ("writing", "runtime.checkpoint.writer", "ShardWriter", "write"),
    ("writing", "runtime.checkpoint.writer", "ShardWriter", "write_bytes"),
    ("writing", "runtime.streaming.committer", "Committer", "commit"),
    ("reading", "runtime.weights.stream", "WeightStream", "load"),
    ("trimming", "runtime.streaming.passes", "", "trim_heap"),
    ("trimming", "runtime.streaming.work", "", "trim_heap"),
)
LIBRARIES = ("torch", "compressed_tensors", "runtime.calibration", "runtime.quantize.solves", "runtime.data.reading")


class Phases:
    """Adds up the processor seconds of the main thread by phase.

    Attributes:
        seconds: of each phase, without the phases that it calls.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stack: list[str] = ["rest"]
        self._since = time.thread_time()
        self._main = threading.get_ident()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as `name`."""
        self._count()
        self._stack.append(name)
        try:
            yield
        finally:
            self._count()
            self._stack.pop()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function, so that its time counts as `name`; of a generator, the time until each value."""

        def run(*args: Any, **options: Any) -> Any:
            if threading.get_ident() != self._main:
                return call(*args, **options)
            with self.phase(name):
                result = call(*args, **options)
            return self._values(name, result) if isinstance(result, Iterator) else result

        return run

    def _values(self, name: str, values: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.phase(name):
                try:
                    value = next(values)
                except StopIteration:
                    return
            yield value

    def _count(self) -> None:
        now = time.thread_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def result(self) -> dict[str, float]:
        """The seconds of all phases, and of other threads."""
        self._count()
        in_all = time.process_time()
        return dict(self.seconds) | {"threads": max(in_all - time.thread_time(), 0.0)}


def main() -> int:
    """Import, patch, run."""
    phases = Phases()
    with phases.phase("imports"):
        from runtime.cli import app, imports
        from runtime.host import own_process

        own_process.claim()
        imports.import_alone()
        for name in LIBRARIES:
            importlib.import_module(name)
    with contextlib.ExitStack() as stack:
        for phase, module, owner, name in PLACES:
            place: Any = importlib.import_module(module)
            place = getattr(place, owner) if owner else place
            stack.enter_context(mock.patch.object(place, name, phases.timed(phase, getattr(place, name))))
        code = app.main(sys.argv[1:], program="runtime")
    print(json.dumps(phases.result()), flush=True)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
