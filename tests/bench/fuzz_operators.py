"""Call every operator that artifacts may use with hostile arguments: `python tests/bench/fuzz_operators.py [seconds]`.

Each operator runs in a process of its own for so many seconds (1 by default). What ends by a signal believes sizes or
indices that it is handed, or runs without end (SIGALRM): the former must not be in `runtime/language/operators.py`.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from runtime.language.operators import ALLOWED, is_allowed

INTEGERS = [0, 1, -1, 2, 3, 5, -5, 100, 2**31 - 1, -(2**31), 2**31, 2**62, -(2**63), 2**63 - 1, 1000003]
FLOATS = [0.0, 1.0, -1.0, 0.5, 1e30, float("inf"), float("nan")]
WORDS = [
    "sum",
    "mean",
    "amax",
    "prod",
    "tanh",
    "none",
    "constant",
    "reflect",
    "circular",
    "floor",
    "right",
    "same",
    "xy",
]
WORDS += ["ortho", "fro", "nuc", "ab,bc->ac", "...", "x"]
LIMIT_BYTES = 6 * 2**30


def tensor(chance: random.Random) -> torch.Tensor:
    shape = [chance.choice([0, 1, 1, 2, 3, 4, 7]) for _ in range(chance.choice([0, 1, 1, 2, 2, 3, 4, 5]))]
    kind = chance.randrange(12)
    if kind < 6:
        return torch.randn(shape)
    if kind < 9:
        return torch.randint(-3, 9, shape)
    if kind == 9:
        return torch.full(shape, chance.choice([2**62, -(2**63), 99999999, -1]))
    return torch.full(shape, chance.choice(FLOATS)) if kind == 10 else torch.zeros(shape, dtype=torch.bool)


def value(kind: str, chance: random.Random) -> Any:
    """Something of a schema's type."""
    if kind.startswith("Optional["):
        return None if chance.random() < 0.3 else value(kind[9:-1], chance)
    if kind.startswith("List[Optional["):
        return [chance.choice([None, tensor(chance)]) for _ in range(chance.randrange(4))]
    if kind.startswith("List["):
        return [value(kind[5:-1], chance) for _ in range(chance.randrange(5))]
    makers: dict[str, Any] = {
        "Tensor": lambda: tensor(chance),
        "int": lambda: chance.choice(INTEGERS) if chance.random() < 0.4 else chance.randrange(-2, 6),
        "float": lambda: chance.choice(FLOATS),
        "number": lambda: chance.choice([*FLOATS, 2, 2**62]),
        "bool": lambda: chance.random() < 0.5,
        "str": lambda: chance.choice(WORDS),
    }
    return makers.get(kind.replace("SymInt", "int"), lambda: None)()


def attack(name: str, seconds: float, log: Path) -> None:
    """Call one operator until the time is over; what is called is written down before."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads() if is_allowed(name, overload)]
    overloads = [operator for operator in overloads if "Tensor" in str(operator._schema)]
    end, seed = time.monotonic() + seconds, time.time_ns()
    with log.open("w") as file:
        while overloads and time.monotonic() < end:
            seed += 1
            chance = random.Random(seed)
            torch.manual_seed(seed)
            operator = chance.choice(overloads)
            file.seek(0)
            file.write(f"{operator} with seed {seed}".ljust(160))
            file.flush()
            positional, named = [], {}
            for entry in operator._schema.arguments:
                if entry.kwarg_only:
                    if entry.name not in ("dtype", "layout", "device", "pin_memory", "generator", "memory_format"):
                        named[entry.name] = value(str(entry.type), chance)
                else:
                    positional.append(value(str(entry.type), chance))
            try:
                operator(*positional, **named)
            except Exception:
                continue


def main() -> int:
    seconds, found = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0, 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(name for name in ALLOWED if hasattr(torch.ops.aten, name)):
            log = Path(folder, name)
            child = os.fork()
            if not child:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                signal.alarm(int(seconds * 4) + 8)
                attack(name, seconds, log)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.WIFSIGNALED(status):
                number = os.WTERMSIG(status)
                found += number != signal.SIGALRM
                print(f"{name}: {signal.Signals(number).name} in {log.read_text().strip()}", flush=True)
    print(f"{found} operators believe what they are handed")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
