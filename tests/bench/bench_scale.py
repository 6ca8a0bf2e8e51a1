"""Compile the largest models there are, from nothing but their configs.

For each, two fresh processes: one compiles, one only imports what the first has imported. The difference of their
times is what compiling costs beyond imports, on the clock and of the processor: the work is done by one thread, so the
two agree unless others use the machine. Each is traced down to its layers, and down to what a host builds by itself.
Then Llamas of 16 to 128 layers, to see how the cost grows.

    python tests/bench/bench_scale.py
    python tests/bench/bench_scale.py --rounds 5 --only "DeepSeek-V3 671B"
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import run_process

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"target": (3.0, 1000.0), "linear": (10.0, 1500.0)}  # seconds and MB, by how deep is traced

LLAMA_405B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 1536,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 94,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
# Of the shape of Kimi K2.
TRILLION = DEEPSEEK_V3 | {
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"beta_fast": 1, "factor": 32},
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}
CONFIGS = {
    "Llama 3.1 405B": LLAMA_405B,
    "DeepSeek-V3 671B": DEEPSEEK_V3,
    "Qwen3 MoE 235B": QWEN3_MOE,
    "1 T, 384 experts": TRILLION,
}
DEPTHS = (16, 32, 64, 128)

COMPILE = """
import json, resource, sys
from seqbuild.build import build
done = build(sys.argv[1], out=sys.argv[2], force=True, leaves=sys.argv[4])
facts = {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
         "num_subgraphs": len(done.manifest.subgraphs), "is_portable": done.manifest.is_portable,
         "num_files": len({entry.file for entry in done.manifest.subgraphs}),
         "num_parameters": done.manifest.model.num_parameters}
json.dump(facts | {"modules": list(sys.modules)}, open(sys.argv[3], "w"))
"""
# Lazy modules of transformers import when they are asked for; what asked for them was the compiler, so all are named.
IMPORT = """
import contextlib, importlib, json, sys
for name in json.load(open(sys.argv[1]))["modules"]:
    if name not in sys.modules and name != "__main__":
        with contextlib.suppress(Exception):
            importlib.import_module(name)
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Time:
    """Seconds of a process, from its start to its end."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one compilation took.

    Attributes:
        own: beyond what the imports alone take.
        imports: those of the imports, with the start and the end of the process.
        peak_mb: of resident memory.
        num_subgraphs: of the artifact.
        num_parameters: of the model.
        num_files: of code: layers that do the same share one.
        is_portable: whether the artifact is the whole program.
    """

    own: Time
    imports: Time
    peak_mb: float
    num_subgraphs: int
    num_parameters: int
    num_files: int
    is_portable: bool


def measure(config: dict[str, Any], folder: Path, rounds: int, leaves: str) -> Cost:
    """Medians over the rounds, compilations and imports in turn."""
    path, facts_path = folder / "config.json", folder / "facts.json"
    path.write_text(json.dumps(config))
    compiling, importing = [], []
    for _ in range(rounds):
        compiling.append(run(COMPILE, str(path), str(folder / "out"), str(facts_path), leaves))
        importing.append(run(IMPORT, str(facts_path)))
    facts = json.loads(facts_path.read_text())
    shutil.rmtree(folder / "out")
    whole, imports = median(compiling), median(importing)
    return Cost(
        own=Time(wall_s=whole.wall_s - imports.wall_s, cpu_s=whole.cpu_s - imports.cpu_s),
        imports=imports,
        **{name: facts[name] for name in facts if name != "modules"},
    )


def median(times: list[Time]) -> Time:
    """The median of each figure."""
    return Time(
        wall_s=statistics.median(time.wall_s for time in times), cpu_s=statistics.median(time.cpu_s for time in times)
    )


def run(program: str, *arguments: str) -> Time:
    """Run a program in a fresh process and ask the kernel what it took."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    wall_s, usage = run_process(command, environment)
    return Time(wall_s=wall_s, cpu_s=usage.ru_utime + usage.ru_stime)


def main() -> None:
    """The named models, then the sweep over depths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--leaves", action="append", choices=LIMITS, help="how deep to trace; by default both ways")
    parser.add_argument("--only", help="one of the models, without the sweep over depths")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="seqbuild-bench-"))
    try:
        for label, config in CONFIGS.items():
            if options.only in (None, label):
                for leaves in options.leaves or LIMITS:
                    report(label, measure(config, folder, options.rounds, leaves), leaves)
        if options.only is None:
            for depth in DEPTHS:
                label = f"Llama, {depth} layers"
                config = LLAMA_405B | {"num_hidden_layers": depth}
                for leaves in options.leaves or LIMITS:
                    report(label, measure(config, folder, options.rounds, leaves), leaves)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(label: str, cost: Cost, leaves: str) -> None:
    """One line a model."""
    limit_s, limit_mb = LIMITS[leaves]
    over = "" if cost.own.cpu_s <= limit_s and cost.peak_mb <= limit_mb else "  OVER THE LIMIT"
    over += "  NOT PORTABLE" if leaves == "linear" and not cost.is_portable else ""
    print(
        f"{label}, --leaves {leaves}: {cost.num_parameters / 1e9:.0f} B parameters, "
        f"{cost.num_subgraphs} subgraphs in {cost.num_files} files, "
        f"{cost.own.wall_s:.2f} s, {cost.own.cpu_s:.2f} s of the processor, beyond imports "
        f"({cost.imports.wall_s:.1f} s, {cost.imports.cpu_s:.1f} s); {cost.peak_mb:.0f} MB peak{over}",
        flush=True,
    )


if __name__ == "__main__":
    main()
