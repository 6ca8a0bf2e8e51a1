"""GPTQ of a few layers in a process of its own, by this project or llm-compressor, with the seconds of each layer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_RESULT = "RESULT "

# The kernel's mark of the peak is of this program alone; that of getrusage begins with the process that started it.
_HOST_PEAK = """
def host_peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))
"""
OURS = """
import json, sys, time
import torch
import runtime
artifact, model, tokens, recipe, out, device, options = sys.argv[1:]
options = json.loads(options)
batch_size = options.pop("batch_size")
seconds, labels, phases = [], [], {}
class Watch:
    phase, since = None, time.perf_counter()
    def tell(self, event, **facts):
        if event == "phase":
            now = time.perf_counter()
            if self.phase is not None:
                phases[self.phase] = phases.get(self.phase, 0.0) + now - self.since
            self.phase, self.since = facts["phase"], now
        if event == "subgraph":
            seconds.append(facts["seconds"])
            labels.append(facts["label"])
loaded = runtime.load(artifact)
ids = torch.load(tokens)
batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch_size)]
begin = time.perf_counter()
done = runtime.calibrate(loaded, weights=model, recipe=runtime.Recipe.from_text(recipe, "the benchmark"),
                         batches=batches, out=out, device=device, watchers=[Watch()], **options)
total = time.perf_counter() - begin
peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
print("RESULT " + json.dumps({
    "layers": [one for one, label in zip(seconds, labels) if ".layers." in label],
    "total": total, "phases": phases, "device_bytes": peak,
    "host_bytes": host_peak(), "remarks": list(done.remarks)}))
"""

PEER = """
import json, os, sys, time
model_dir, tokens, recipe, out, device = sys.argv[1:]
if device == "cpu":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import LifecycleCallbacks
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.load(tokens)
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(model_dir)
ends, end = [], LifecycleCallbacks.sequential_epoch_end
def ended(*args, **options):
    found = end(*args, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    ends.append(time.perf_counter())
    return found
LifecycleCallbacks.sequential_epoch_end = ended
begin = time.perf_counter()
oneshot(model=model, processor=tokenizer, dataset=data, recipe=recipe, max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids), shuffle_calibration_samples=False)
quantized = time.perf_counter()
model.save_pretrained(out, save_compressed=True)
total = time.perf_counter() - begin
count = len(model.model.layers)
steps = [b - a for a, b in zip([begin, *ends], ends)][:count]
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print("RESULT " + json.dumps({
    "layers": steps, "total": total, "phases": {}, "device_bytes": peak,
    "host_bytes": host_peak(), "remarks": []}))
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRun:
    """What a run took.

    Attributes:
        layers: seconds of each decoder layer.
        total: seconds from the loaded model to the checkpoint on disk.
        phases: seconds by the phase of a step; only of our own runs.
        device_bytes: the most memory that torch had allocated on the device.
        host_bytes: the most resident memory of the process.
        remarks: warnings of the run.
    """

    layers: Sequence[float]
    total: float
    phases: Mapping[str, float]
    device_bytes: int
    host_bytes: int
    remarks: Sequence[str]


def run_ours(
    artifact: Path, model: Path, tokens: Path, recipe: str, out: Path, device: str, timeout: float, **options: Any
) -> LayerRun:
    """Calibrate in a process; `options` are those of `runtime.calibrate`, and `batch_size`."""
    command = [
        sys.executable,
        "-c",
        _HOST_PEAK + OURS,
        str(artifact),
        str(model),
        str(tokens),
        recipe,
        str(out),
        device,
    ]
    return _run([*command, json.dumps(options)], timeout)


def run_peer(python: str, model: Path, tokens: Path, recipe: str, out: Path, device: str, timeout: float) -> LayerRun:
    """Run llm-compressor's oneshot in a process of its interpreter."""
    return _run([python, "-c", _HOST_PEAK + PEER, str(model), str(tokens), recipe, str(out), device], timeout)


def _run(command: Sequence[str], timeout: float) -> LayerRun:
    """Run a program, and read the last line of its result.

    Raises:
        RuntimeError: with the end of its messages, when it fails.
        TimeoutExpired: when it takes longer.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if done.returncode or not lines:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-400:]}")
    return LayerRun(**json.loads(lines[-1].removeprefix(_RESULT)))
