"""Calibrate as one of several workers, and count the bytes that it sends. As a program, what each worker executes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(path: str) -> int:
    """Execute the calls of `runtime.calibrate` in a file; rank 0 writes the bytes of each worker in each call to it."""
    import torch

    import runtime
    from runtime.workers.start import started

    torch.set_num_threads(1)
    calls, counts = json.loads(Path(path).read_text()), []
    with started(torch.device("cpu")) as workers:
        texts = [0]
        real = workers.exchange

        def exchange(facts: Any) -> list[Any]:
            before = workers.bytes_sent
            found = real(facts)
            texts[0] += workers.bytes_sent - before
            return found

        setattr(workers, "exchange", exchange)  # noqa: B010 - a method cannot be assigned to
        for call in calls:
            before, texts[0] = workers.bytes_sent, 0
            given = torch.load(call["batches"], weights_only=True)
            runtime.calibrate(
                runtime.load(call["artifact"]),
                weights=call["weights"],
                recipe=runtime.Recipe.from_text(call["recipe"], "recipe.yaml"),
                batches=given,
                out=call["out"],
                workers=workers,
            )
            counts.append(real({"tensors": workers.bytes_sent - before - texts[0], "texts": texts[0]}))
        if workers.rank == 0:
            Path(path).write_text(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
