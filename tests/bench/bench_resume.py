"""Kill a calibration again and again at random moments, resume it each time, and compare bytes with one never killed.

    python tests/bench/bench_resume.py [--kills 50] [--model DIR] [--data FILE.jsonl] [--samples 32] [--seq-len 256]
                                       [--seed 0]

Each kill is a SIGKILL of the whole process, at a moment drawn evenly from the time that a whole run takes. When a run
comes to its end its bytes are compared, and the next one begins; so there are as many kills as asked for, in as many
runs as that takes. Every other run saves its activations, the others replay.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n"


def digest(directory: Path) -> str:
    """All names and bytes of a checkpoint."""
    total = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def finished(out: Path) -> int:
    """How many subgraphs the interrupted run has in its journal."""
    journal = out.parent / f".{out.name}.run.partial" / "journal"
    return journal.read_text().count('"kind":"step"') if journal.is_file() else 0


def run(command: list[str], seconds: float | None) -> bool:
    """Run a command, killed after some seconds; whether it came to its end."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, complaint = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        sys.exit(f"the run failed: {complaint.decode()[-2000:]}")
    return True


def main() -> None:
    """One whole run, then kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model")
    parser.add_argument("--data", type=Path, default=ROOT / "demo" / "text" / "calib.jsonl")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-"))
    try:
        measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(options: argparse.Namespace, folder: Path) -> None:
    """All runs, and what came of them."""
    from seqbuild.build import build
    from seqbuild.ship.tokens import tokenize_files

    artifact = build(options.model, out=folder).path
    tokens, recipe, out = folder / "calib.safetensors", folder / "recipe.yaml", folder / "out"
    lengths = {"num_samples": options.samples, "seq_len": options.seq_len}
    tokenize_files(options.model, [options.data], pack=True, out=tokens, **lengths)
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "runtime", "calibrate", str(artifact), "--weights", str(options.model)]
    command += ["--data", str(tokens), "--recipe", str(recipe), "-o", str(out), "--device", "cpu", "--resume"]
    command += ["--max-shard-size", "1MB"]
    start = time.perf_counter()
    run(command, None)
    whole = time.perf_counter() - start
    expected = digest(out)
    print(f"a whole run takes {whole:.1f} s")
    moments = random.Random(options.seed)
    kills = runs = equal = 0
    places: dict[int, int] = {}
    while kills < options.kills:
        shutil.rmtree(out)
        saving = ["--checkpoint-activations", "save" if runs % 2 else "replay"]
        while not run([*command, *saving], moments.uniform(0, whole) if kills < options.kills else None):
            kills += 1
            if out.exists():
                break  # whole already: it was killed on its way out
            places[finished(out)] = places.get(finished(out), 0) + 1
        runs += 1
        equal += digest(out) == expected
    where = ", ".join(f"{count} after {place}" for place, count in sorted(places.items()))
    print(f"{kills} kills ({where} finished subgraphs) in {runs} runs: {equal} of {runs} byte for byte equal")
    if equal < runs:
        sys.exit(1)


if __name__ == "__main__":
    main()
