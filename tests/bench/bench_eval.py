"""Time and peak memory of tasks: streamed through an artifact, and with lm-eval's backend for transformers.

    python tests/bench/bench_eval.py [--model DIR] [--artifact DIR] [--documents 12] [--rounds 3] [--python PYTHON]

Both run in processes of their own, in alternation; the interpreter needs lm-eval. Processor seconds
and memory are those of the operating system for the whole process, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from tests.local_tasks import TASKS, write_tasks  # noqa: E402

OURS = """
import sys, torch, runtime
from pathlib import Path
from runtime.evaluation.options import PassOptions
from runtime.evaluation.tasks import TaskOptions, evaluate_tasks
artifact, weights, include, names = sys.argv[1:]
tasks = TaskOptions(names=names.split(","), include_paths=[Path(include)])
options = PassOptions(device=torch.device("cpu"))
evaluate_tasks(
    runtime.load(artifact), weights=Path(weights), tokenizer=Path(weights), tasks=tasks, options=options
)
"""
THEIRS = """
import sys, lm_eval
from lm_eval.tasks import TaskManager
artifact, weights, include, names = sys.argv[1:]
lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": weights}, tasks=names.split(","), device="cpu", batch_size=16,
    task_manager=TaskManager(include_path=include),
)
"""


def run(python: str, program: str, arguments: list[str]) -> tuple[float, float, float]:
    """Return processor seconds, seconds, and the peak of memory in GB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    begin = os.times().elapsed
    process = subprocess.Popen(
        [python, "-c", program, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(complaint.decode()[-2000:])
    return usage.ru_utime + usage.ru_stime, os.times().elapsed - begin, usage.ru_maxrss / 1e6


def main() -> None:
    """Measure both, in alternation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model")
    parser.add_argument("--artifact", type=Path, help="of the model; compiled if missing")
    parser.add_argument("--documents", type=int, default=12, help="of each task")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable)
    chosen = parser.parse_args()
    if subprocess.run([chosen.python, "-c", "import lm_eval"], stderr=subprocess.DEVNULL).returncode:
        print("lm-eval is not installed: nothing is measured")
        return
    texts = [json.loads(line)["text"] for line in (ROOT / "demo/text/eval.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        include = write_tasks(Path(folder) / "local", texts, chosen.documents)
        artifact = chosen.artifact
        if artifact is None:
            from seqbuild.build import build

            artifact = build(chosen.model, out=Path(folder) / "artifacts").path
        arguments = [str(artifact), str(chosen.model), str(include), ",".join(TASKS)]
        found: dict[str, list[tuple[float, float, float]]] = {"lm-eval hf": [], "streamed": []}
        for _ in range(chosen.rounds):
            for name, program in (("lm-eval hf", THEIRS), ("streamed", OURS)):
                found[name].append(run(chosen.python, program, arguments))
                processor_s, wall_s, memory = found[name][-1]
                print(f"{name:10} {processor_s:7.1f} processor s {wall_s:7.1f} s {memory:6.2f} GB", flush=True)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
    for index, what in enumerate(("processor seconds", "seconds", "peak memory")):
        ours, theirs = medians["streamed"][index], medians["lm-eval hf"][index]
        print(f"{what}: {ours:.2f} against {theirs:.2f}, ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
