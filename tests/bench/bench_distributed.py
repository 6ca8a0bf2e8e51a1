"""Calibration by several workers: measured with one and two, predicted for up to 64.

    python tests/bench/bench_distributed.py                          # both
    python tests/bench/bench_distributed.py --only measured --before OLDER_CHECKOUT
    python tests/bench/bench_distributed.py --only predicted

Measured: a Llama with the widths of TinyLlama 1.1B and a mixture, of random bf16 weights, GPTQ W4A16, one thread for
each worker; runs of 1 and 2 workers, and of an older checkout with one, take turns. All figures are medians, beside the
plan of the same run. The serial share is the one that explains the speedup by Amdahl's law; messages are a part of it.
On a machine that others use, compare processor seconds: of all workers, without waiting.

Predicted: Llama 3 8B and 70B and DeepSeek-V3 with GPTQ W4A16, from artifacts of their configs, by the formulas of
`seqbuild plan --workers N`; with the rates of runtime/planning/rates.py, and with other ones.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_scale import DEEPSEEK_V3
from processes import Cost, measure, medians
from random_models import LLAMA_1B, LLAMA_8B, make_llama

if TYPE_CHECKING:
    from runtime.planning.distribution import Distribution

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
RECIPE = "GPTQModifier: {targets: Linear, scheme: W4A16, ignore: [lm_head]}\n"
SLOWER = 0.03  # what one worker may cost, in time and memory, beyond the older checkout

LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
# A mixture that a CPU quantizes in a minute.
MIXTURE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
}
# Tokens per sample of 512 samples, and the speedups that are wanted.
WANTED = {2: 1.9, 4: 3.6, 8: 6.8}
PREDICTED: dict[tuple[str, str], tuple[dict[str, Any], int, dict[int, float]]] = {
    ("Llama 3 8B", "cuda"): (LLAMA_8B, 2048, WANTED),
    ("Llama 3 8B", "cpu"): (LLAMA_8B, 2048, WANTED),
    ("Llama 3 70B", "cuda"): (LLAMA_70B, 2048, {}),
    ("DeepSeek-V3", "cuda"): (DEEPSEEK_V3, 4096, {}),
}
SIZES = (2, 4, 8, 16, 32, 64)
NODE = 8  # workers of a node
NETWORK_LINK = 50e9  # 400 Gbit/s for each GPU
HOURS_WANTED = 1.0  # DeepSeek-V3 on 8
FP8_RATE = 0.22e9  # bytes of bf16 per second that a thread dequantizes from FP8 blocks (measured: an AMD EPYC)


def main() -> None:
    """Measure, then predict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["measured", "predicted"])
    parser.add_argument("--before", type=Path, help="an older checkout, to compare one worker with")
    parser.add_argument("--model", choices=["llama", "mixture"], help="measure only this one")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-"))
    try:
        if options.only != "predicted":
            for name in [options.model] if options.model else ["llama", "mixture"]:
                measured(name, options, folder / name)
        if options.only != "measured":
            for name, device_type in PREDICTED:
                predicted(name, device_type, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# Measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One calibration: what its processes took, and what it said of itself."""

    cost: Cost
    calibrating_s: float
    sent_bytes: int
    digest: str


def measured(name: str, options: argparse.Namespace, folder: Path) -> None:
    """Runs in turn, then a line for each number of workers."""
    from seqbuild.build import build
    from seqbuild.ship.tokens import tokenize_files

    model = make_llama(folder / "model", LLAMA_1B | {"num_hidden_layers": options.layers}) if name == "llama" else None
    model = model or make_mixture(folder / "model", options.layers)
    artifact = build(model, out=folder).path
    tokens, recipe = folder / "calib.safetensors", folder / "recipe.yaml"
    text = ROOT / "demo" / "text" / "calib.jsonl"
    tokenize_files(model, [text], pack=True, out=tokens, num_samples=options.samples, seq_len=options.seq_len)
    recipe.write_text(RECIPE)
    command = ["calibrate", str(artifact), "--weights", str(model), "--data", str(tokens), "--recipe", str(recipe)]
    command += ["--device", "cpu", "--batch-size", str(options.batch_size)]
    checkouts = [(size, ROOT) for size in options.workers] + ([(1, options.before)] if options.before else [])
    runs: dict[tuple[int, Path], list[Run]] = {key: [] for key in checkouts}
    for _ in range(options.rounds):
        for size, checkout in checkouts:
            runs[size, checkout].append(calibrate(command, size, checkout, folder / "out"))
    report(name, options, artifact, {size: runs[size, ROOT] for size in options.workers})
    if options.before:
        compare(runs[1, ROOT], runs[1, options.before])


def make_mixture(directory: Path, layers: int) -> Path:
    """Write a Qwen3 mixture with random bf16 weights."""
    import torch
    import transformers
    from random_models import TOKENIZER

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**MIXTURE | {"num_hidden_layers": layers})
    transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    for path in TOKENIZER.glob("token*.json"):
        shutil.copy(path, directory)
    return directory


def calibrate(command: Sequence[str], size: int, checkout: Path, out: Path) -> Run:
    """One run in processes of its own."""
    shutil.rmtree(out, ignore_errors=True)
    log = out.with_suffix(".log")
    log.unlink(missing_ok=True)
    start = [sys.executable, "-m"]
    if size > 1:
        # Without "--", torchrun takes --log for one of its own options.
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "-m", "--"]
    cost = measure([*start, "runtime", *command, "-o", str(out), "--log", str(log)], threads=1, cwd=checkout)
    events = [event for event in map(json.loads, log.read_text().splitlines()) if event["event"] == "subgraph"]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.glob("*.safetensors"))]
    return Run(
        cost=cost,
        calibrating_s=sum(event["seconds"] for event in events if not event.get("rank")),
        sent_bytes=sum(event.get("bytes_sent", 0) for event in events),
        digest=hashlib.sha256("".join(digests).encode()).hexdigest(),
    )


def report(name: str, options: argparse.Namespace, artifact: Path, runs: Mapping[int, Sequence[Run]]) -> None:
    """Print what was measured beside the plan."""
    assert len({run.digest for own in runs.values() for run in own}) == 1, "the checkpoints differ"
    alone_s = statistics.median(run.calibrating_s for run in runs[min(runs)])
    print(f"{name}: {options.layers} layers, {options.samples} samples of {options.seq_len} tokens, equal checkpoints")
    for size, own in runs.items():
        cost = medians([run.cost for run in own])
        seconds = statistics.median(run.calibrating_s for run in own)
        speedup = alone_s / seconds
        line = (
            f"  {size} workers: {cost.wall_s:.1f} s, {seconds:.1f} s in subgraphs, {cost.cpu_s:.1f} s of processors, "
        )
        line += f"{cost.peak_bytes / 1e6:.0f} MB in all"
        if size > 1:
            serial, plan = (size / speedup - 1) / (size - 1), planned(options, artifact, size)
            line += f"; speedup {speedup:.2f} ({plan['speedup']:.2f} planned), serial share {serial:.1%} "
            line += f"({plan['serial_share']:.1%} and messages), sent {own[0].sent_bytes / 1e6:.1f} MB "
            line += f"({plan['sent_bytes'] / 1e6:.1f})"
        print(line, flush=True)


def compare(after: Sequence[Run], before: Sequence[Run]) -> None:
    """Print what one worker costs beside the older checkout."""
    one, two = medians([run.cost for run in after]), medians([run.cost for run in before])
    for what, ratio in {
        "wall time": one.wall_s / two.wall_s,
        "processor time": one.cpu_s / two.cpu_s,
        "peak memory": one.peak_bytes / two.peak_bytes,
    }.items():
        print(
            f"  1 worker, {what}: {ratio:.3f} of before{'' if ratio <= 1 + SLOWER else '  OVER THE LIMIT'}", flush=True
        )


def planned(options: argparse.Namespace, artifact: Path, size: int) -> dict[str, Any]:
    """What the command line predicts."""
    command = [sys.executable, "-m", "runtime", "plan", str(artifact), "--json", "--device", "cpu"]
    command += ["--workers", str(size), "--samples", str(options.samples), "--seq-len", str(options.seq_len)]
    command += ["--batch-size", str(options.batch_size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(said)["distribution"])


# Predicted


def predicted(name: str, device_type: str, folder: Path) -> None:
    """A table: numbers of workers, with the stated rates and with others."""
    import runtime
    from seqbuild.build import build

    config, seq_len, wanted = PREDICTED[name, device_type]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    artifact = runtime.load(build(path, out=folder / name).path)
    found = runtime.plan_artifact(
        artifact, num_samples=512, seq_len=seq_len, batch_size=8, device_type=device_type, workers=NODE
    ).plan.distribution
    assert found is not None, "there are several workers"
    device = "H100s" if device_type == "cuda" else "CPU cores"
    print(f"{name}, 512 samples of {seq_len} tokens, GPTQ W4A16, {device}: {found.alone_s / 3600:.3f} h with one")
    for size in SIZES:
        print(f"  {size:>3} workers: {described(of_size(found, size), wanted.get(size))}", flush=True)
    for what, changed in variants(found).items():
        speedups = ", ".join(f"{of_size(changed, size).speedup:.2f}" for size in (2, 4, 8))
        print(f"  {what}: {changed.alone_s / 3600:.3f} h with one; speedup on 2, 4 and 8: {speedups}", flush=True)
    if name == "DeepSeek-V3":
        print_hours("with bf16 weights", of_size(found, NODE))
        for threads in (1, 4, 16):  # of each worker, which dequantizes all weights
            read = replace(found, rates=replace(found.rates, loading=FP8_RATE * threads))
            print_hours(f"with FP8 weights and {threads} threads per worker", of_size(read, NODE))


def print_hours(what: str, found: Distribution) -> None:
    """A line for the run that is to take less than an hour."""
    hours = found.seconds / 3600
    missed = "" if hours < HOURS_WANTED else "  MISSED"
    print(f"  {what}: {hours:.2f} h on {NODE}, {HOURS_WANTED:g} wanted{missed}", flush=True)


def of_size(found: Distribution, size: int) -> Distribution:
    """The same run by another number of workers; beyond a node they are linked by the network, if that is slower."""
    link = found.rates.link if size <= NODE else min(found.rates.link, NETWORK_LINK)
    return replace(found, num_workers=size, rates=replace(found.rates, link=link))


def described(found: Distribution, wanted: float | None) -> str:
    """One row: hours, speedup, bytes, and where work is not divided."""
    phases = sorted(found.undivided_s.items(), key=lambda entry: -entry[1])[:2]
    messages = found.phase_s["messages"]
    parts = [f"{name} {seconds:.0f} s" for name, seconds in (*phases, ("messages", messages)) if seconds >= 0.5]
    missed = f" ({wanted} wanted{'' if found.speedup >= wanted else ', MISSED'})" if wanted is not None else ""
    return (
        f"{found.seconds / 3600:.3f} h, speedup {found.speedup:.2f}{missed}, serial share {found.serial_share:.1%}, "
        f"{found.sent_bytes / 1e9:.0f} GB sent; not divided: {', '.join(parts)}"
    )


def variants(found: Distribution) -> dict[str, Distribution]:
    """The same run with rates that are half and twice as high."""
    rates = found.rates
    return {
        f"{name} {factor:g} times as fast": replace(
            found, rates=replace(rates, **{name: getattr(rates, name) * factor})
        )
        for name in ("products", "factorization", "link")
        for factor in (0.5, 2.0)
    }


if __name__ == "__main__":
    main()
