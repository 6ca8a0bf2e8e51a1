"""A worker of the tests: the host's command line, in which one worker behaves badly.

The environment variable BEHAVIOR is `RANK:WHAT`: what a worker does when it runs a subgraph for the fourth time.
`messages` as the only argument tests the group itself instead.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

RANK = int(os.environ["RANK"])
FOLDER = Path(os.environ["WORKER_FOLDER"])
WHO, _, WHAT = os.environ["BEHAVIOR"].partition(":")


def misbehave() -> None:
    (FOLDER / f"mark-{RANK}").touch()
    if WHAT == "kill":
        time.sleep(0.5)  # for a heartbeat with the present step
        os.kill(os.getpid(), signal.SIGKILL)
    elif WHAT == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif WHAT == "bug":
        raise ValueError("a bug")
    elif WHAT == "wait":
        time.sleep(60)


def run_command() -> int:
    from runtime.chain import LoadedSubgraph
    from runtime.cli import app
    from runtime.host import own_process

    real, count = LoadedSubgraph.forward, [0]

    def forward(self: LoadedSubgraph, model: Any, **inputs: Any) -> dict[str, Any]:
        count[0] += 1
        if count[0] == 4 and WHO in (str(RANK), "all"):
            misbehave()
        return real(self, model, **inputs)

    own_process.claim()
    if WHAT:
        LoadedSubgraph.forward = forward  # type: ignore[method-assign]
    return app.main(program="runtime")


def exchange_messages() -> None:
    import torch

    from runtime.errors import SeqbuildError, WorkerError
    from runtime.host.memory import is_out_of_memory
    from runtime.workers.agreement import agreed
    from runtime.workers.comparison import require_same
    from runtime.workers.start import current, started

    with started(torch.device("cpu"), 60) as workers:
        assert current() is workers
        rank, size = workers.rank, workers.size
        others = [other for other in range(size) if other != rank]
        values = [0.1, float("inf"), "ü", None, {"a": [rank]}]
        assert workers.exchange(values) == [[*values[:4], {"a": [other]}] for other in range(size)]
        before = workers.bytes_sent
        sends = [(torch.full((3, 5), 10.0 * rank + other, dtype=torch.bfloat16), other) for other in others]
        sends += [(torch.tensor([rank], dtype=torch.int16), other) for other in others]
        sends += [(torch.empty(0), other) for other in others]
        receives = [(torch.empty(3, 5, dtype=torch.bfloat16), other) for other in others]
        receives += [(torch.empty(1, dtype=torch.int16), other) for other in others]
        receives += [(torch.empty(0), other) for other in others]
        workers.swap(sends, receives)
        assert workers.bytes_sent - before == len(others) * (3 * 5 * 2 + 2)
        for index, (tensor, other) in enumerate(receives):
            expected = [10.0 * other + rank] * 15 if index < len(others) else [other] if tensor.numel() else []
            assert tensor.flatten().tolist() == expected
        workers.swap([], [])
        shared = torch.full((2, 2), float(rank), dtype=torch.float8_e4m3fn)
        workers.broadcast(shared, 1)
        assert shared.float().tolist() == [[1.0, 1.0], [1.0, 1.0]]
        workers.step = "layer 3 (measure)"
        raised = failure_of(lambda: agree(agreed(workers), MemoryError("no memory") if rank == 1 else None))
        assert raised is not None and is_out_of_memory(raised), raised
        failures: list[Exception | None] = [SeqbuildError("the first"), MemoryError("no memory"), None]
        raised = failure_of(lambda: agree(agreed(workers), failures[rank]))
        assert type(raised) is (SeqbuildError if rank == 0 else WorkerError), raised
        assert rank == 0 or " stopped in layer 3 (measure): the first" in str(raised)
        with agreed(workers):
            pass
        identity = {"checkpoint": "a" * 64, "dtype": "bfloat16", "times of the weights files": str(rank)}
        assert require_same(workers, identity, torch.device("cpu")) == []
        identity |= {"checkpoint": "b" * 64, "dtype": "float16"} if rank == 2 else {}
        raised = failure_of(lambda: require_same(workers, identity, torch.device("cpu")))
        assert isinstance(raised, WorkerError)
        assert "worker 2 on " in str(raised)
        assert " has other weights and dtype (float16 instead of bfloat16) than worker 0 on " in str(raised)
    print("done")


def agree(block: Any, error: Exception | None) -> None:
    with block:
        if error is not None:
            raise error


def failure_of(call: Any) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def main() -> None:
    (FOLDER / f"pid-{RANK}").write_text(str(os.getpid()))
    if sys.argv[1:] == ["messages"]:
        exchange_messages()
        return
    # A test run in the background may have been told to ignore interruptions, and hands that on to its processes.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if WHAT == "other weights" and str(RANK) == WHO:
        place = sys.argv.index("--weights") + 1
        sys.argv[place] = f"{sys.argv[place]}-other"
    leave = os._exit

    def record(status: int) -> None:
        (FOLDER / f"code-{RANK}").write_text(str(status))
        leave(status)

    os._exit = record  # type: ignore[assignment]
    code = run_command()
    (FOLDER / f"code-{RANK}").write_text(str(code))
    sys.exit(code)


if __name__ == "__main__":
    main()
