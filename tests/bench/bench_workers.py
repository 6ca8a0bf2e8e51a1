"""Calibrate with many numbers of workers, kill some of them at random moments, and compare all bytes.

    python tests/bench/bench_workers.py [--sizes 1,2,3] [--data even,uneven,few] [--kills 6] [--seed 0]

Every recipe of tests/runtime/workshop.py runs on every data set with every number of workers. Then runs are started
without torchrun, and SIGKILL or SIGSTOP is sent to random workers at a random moment; the others have to end alone.
Each run is resumed with a random number of workers until it is complete. The full matrix is `--sizes 1,2,3,5,8,16
--data even,uneven,ragged,few,one --kills 50`.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.runtime.worker_runs import Call, end_all, run_workers, start_workers, write_calls  # noqa: E402
from tests.runtime.workshop import GPTQ, LENGTHS, ROUTED, Workshop, files_of, unfinished  # noqa: E402

DATA = {
    "even": (256,) * 68,  # 16 lanes
    "uneven": LENGTHS,
    "ragged": tuple(17 + (37 * number) % 190 for number in range(41)),
    "few": (250, 40, 250),
    "one": (200,),
}
TIMEOUT_S = 20


@dataclass
class Kills:
    """Runs in which workers are hit by signals, and what came of them.

    Attributes:
        shop: what is calibrated.
        sizes: the numbers of workers that a start can have.
        moments: draws who is hit, when, and how many workers continue.
        hits: the number of starts that each signal hit.
        num_runs: the runs that came to their end.
        num_equal: those with the expected bytes.
        steps: how many finished subgraphs the journal had at the moment of a hit, with the number of such hits.
        longest_s: the seconds of a whole run by the number of workers, without the start of the processes.
        ends_s: the seconds after a hit until the last other worker had ended.
        faults: what was not as it has to be.
    """

    shop: Workshop
    sizes: Sequence[int]
    moments: random.Random
    hits: Counter[str] = field(default_factory=Counter)
    num_runs: int = 0
    num_equal: int = 0
    steps: Counter[int] = field(default_factory=Counter)
    ends_s: list[float] = field(default_factory=list)
    longest_s: dict[int, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def run(self, count: int) -> None:
        """Start runs until so many starts were hit; every run is resumed until it is complete."""
        while self.hits.total() < count and not self.faults:
            name = (GPTQ, ROUTED)[self.num_runs % 2]
            out = self.shop.folder / f"{name} hit"
            shutil.rmtree(out, ignore_errors=True)
            while not out.is_dir() and not self.faults:
                self.start(name, out, self.moments.choice(list(self.sizes)), is_hit=self.hits.total() < count)
            self.num_runs += 1
            self.num_equal += out.is_dir() and files_of(out) == files_of(self.shop.out(name, 0))

    def start(self, name: str, out: Path, size: int, *, is_hit: bool) -> None:
        """Start the workers of a run, hit some after a while, and await the others."""
        saving = self.moments.choice(["replay", "save"])
        log = self.shop.folder / "events.jsonl"
        log.unlink(missing_ok=True)
        options = [
            "--resume",
            "--checkpoint-activations",
            saving,
            "--worker-timeout",
            f"{TIMEOUT_S}s",
            "--log",
            str(log),
        ]
        path = write_calls([Call(self.shop.command(name, out, *options))], self.shop.folder)
        processes = start_workers(path, size, None)
        hit: list[int] = []
        try:
            # The first start of a size is not hit: it measures how long a run takes.
            if is_hit and size in self.longest_s:
                if self.moments.random() < 0.8:
                    await_events(log, processes)
                time.sleep(self.moments.uniform(0, self.longest_s[size]))
                hit = self.hit(processes)
                self.steps[finished(out)] += 1
            elif not unfinished(out).exists():
                await_events(log, processes)
                start = time.monotonic()
                processes[0].wait()
                self.longest_s[size] = time.monotonic() - start
            self.await_others([process for rank, process in enumerate(processes) if rank not in hit], bool(hit))
        finally:
            for rank in hit:
                processes[rank].kill()
                processes[rank].communicate()
            end_all(processes)

    def hit(self, processes: Sequence[subprocess.Popen[str]]) -> list[int]:
        """Send a signal to random workers that run, and return their ranks."""
        chosen = self.moments.sample(range(len(processes)), self.moments.randint(1, len(processes)))
        kind = self.moments.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP])
        running = [rank for rank in chosen if processes[rank].poll() is None]
        for rank in running:
            processes[rank].send_signal(kind)
        self.hits[kind.name] += bool(running)
        return running

    def await_others(self, others: Sequence[subprocess.Popen[str]], are_hit: bool) -> None:
        """Wait for workers that were not hit, and note what is wrong with their end."""
        start = time.monotonic()
        for process in others:
            try:
                _, text = process.communicate(timeout=TIMEOUT_S * 4)
            except subprocess.TimeoutExpired:
                self.faults.append(f"a worker did not end {TIMEOUT_S * 4} s after others were hit")
                return
            is_one_line = re.fullmatch(r"runtime: error: .*worker.*\n", text) is not None
            if process.returncode and not (are_hit and process.returncode == 2 and is_one_line):
                self.faults.append(f"a worker ended with {process.returncode}: {text[-1500:]}")
        if are_hit:
            self.ends_s.append(time.monotonic() - start)


def main() -> None:
    """Run the matrix and the kills, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,2,3", help="numbers of workers")
    parser.add_argument("--data", default="even,uneven,few", help=f"data sets, of {', '.join(DATA)}")
    parser.add_argument("--kills", type=int, default=6, help="starts in which workers are killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sizes = [int(size) for size in options.sizes.split(",")]
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-"))
    try:
        shops = dict(workshops(folder, options.data.split(",")))
        faults = compare(shops, sizes)
        kills = Kills(next(iter(shops.values())), sizes, random.Random(options.seed))
        kills.run(options.kills)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_kills(kills)
    if faults or kills.faults or kills.num_equal < kills.num_runs:
        sys.exit("\n".join([*faults, *kills.faults]) or 1)


def workshops(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Workshop]]:
    """Make the models, and a folder for each data set, with the checkpoints of a single process."""
    import torch

    import runtime.cli.app

    torch.set_num_threads(1)  # as in a worker: bytes depend on it
    from tests.runtime.small import EXPERTS, WIDTHS, make_small

    tied = {**WIDTHS, "tie_word_embeddings": True, "num_hidden_layers": 8}
    dense = make_small(folder / "dense", "LlamaForCausalLM", "LlamaConfig", tied, dtype=torch.bfloat16)
    experts = {**EXPERTS, "num_hidden_layers": 5, "num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8}
    mixture = make_small(folder / "mixture", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", experts)
    for name in names:
        (folder / name).mkdir()
        shop = Workshop(folder / name, dense, mixture, DATA[name])
        for recipe in shop.models:
            with quiet():
                code = runtime.cli.app.main(shop.command(recipe, shop.out(recipe, 0)))
            assert code == 0, f"the single process fails with {recipe} on {name}"
        yield name, shop


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the summary that a run in this process prints."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def compare(shops: dict[str, Workshop], sizes: Sequence[int]) -> list[str]:
    """Print a row for each recipe and data set, and return what differs."""
    faults = []
    print(f"| recipe | data | {' | '.join(map(str, sizes))} |\n|---|---|{'---|' * len(sizes)}")
    for data, shop in shops.items():
        for size in sizes:
            calls = [Call(shop.command(name, shop.out(name, size))) for name in shop.models]
            outcome = run_workers(calls, size, shop.folder)
            if outcome.codes != (0,):
                faults.append(f"{data}, {size} workers: {outcome.errors[0][-1500:]}")
        for name in shop.models:
            cells = ["equal" if is_equal(shop, name, size) else "DIFFERENT" for size in sizes]
            faults += [f"{name}, {data}, {size}" for size, cell in zip(sizes, cells, strict=True) if cell != "equal"]
            print(f"| {name} | {data} | {' | '.join(cells)} |", flush=True)
    return faults


def is_equal(shop: Workshop, name: str, size: int) -> bool:
    """Whether a run has written all bytes of the single process."""
    out = shop.out(name, size)
    return out.is_dir() and files_of(out) == files_of(shop.out(name, 0))


def await_events(log: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until the workers have begun with a run, or have ended."""
    while not (log.exists() and log.stat().st_size) and any(process.poll() is None for process in processes):
        time.sleep(0.02)


def finished(out: Path) -> int:
    """How many subgraphs an interrupted run has in its journal."""
    journal = unfinished(out) / "journal"
    return journal.read_text().count('"kind":"step"') if journal.is_file() else 0


def print_kills(found: Kills) -> None:
    """Print what came of the kills."""
    steps = ", ".join(f"{count} after {steps}" for steps, count in sorted(found.steps.items()))
    hits = ", ".join(f"{count} starts hit by {name}" for name, count in sorted(found.hits.items()) if count)
    print(f"{hits or 'no start was hit'} ({steps or 0} finished subgraphs)")
    if found.ends_s:
        print(f"the other workers ended after {max(found.ends_s):.1f} s at the latest")
    print(f"{found.num_equal} of {found.num_runs} runs byte for byte equal")


if __name__ == "__main__":
    main()
