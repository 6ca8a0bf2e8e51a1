"""Compare tasks of lm-eval with its backend for transformers and streamed through artifacts, in an environment.

    python tests/clients/tasks.py [--folder .clients] [--python PYTHON] [--model DIR ...]

The exit code is 1 if a log-likelihood differs by 1e-4, a greedy continuation is not the same, or a metric differs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from clients.environments import python_of  # noqa: E402
from clients.schemes import recipe_text  # noqa: E402

import runtime  # noqa: E402
from runtime.data.inputs import model_inputs  # noqa: E402
from seqbuild.build import build  # noqa: E402
from tests.local_tasks import TASKS, write_tasks  # noqa: E402

DEMO = ROOT / "demo" / "model"
SCHEMES = ("W4A16", "W8A8", "FP8_DYNAMIC")  # transformers 5.17 rounds inputs as we do, and 5.24 does not
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Where inputs are rounded, the last bit of a sum decides how some are, and transformers differs from itself by more
# than the limit as soon as a batch has another size. There, the difference may be a few times that one.
ROUNDED, TIMES_OWN = ("W8A8", "FP8_DYNAMIC"), 4
LIMIT = 1e-4
CHAT: dict[str, Any] = {"apply_chat_template": True, "system_instruction": "Answer."}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "short": {"max_length": 40, "num_fewshot": 1},
    "bos": {"add_bos_token": True, "limit": 4},
    "no bos": {"add_bos_token": False, "limit": 4},
    "chat": {**CHAT, "fewshot_as_multiturn": True, "limit": 4},
    "chat in one turn": {**CHAT, "fewshot_as_multiturn": False, "limit": 4},
}


def main() -> int:
    """Make the checkpoints, run both, and judge each line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".clients", help="environments and models")
    parser.add_argument("--python", type=Path, help="an interpreter that has lm-eval")
    parser.add_argument("--model", type=Path, action="append", default=[], help="another model besides the demo's")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    work = folder / "work" / "tasks"
    shutil.rmtree(work, ignore_errors=True)
    texts = [json.loads(line)["text"] for line in (ROOT / "demo/text/eval.jsonl").read_text().splitlines()]
    include = write_tasks(work, texts)
    jobs = [job for model in (DEMO, *arguments.model) for job in jobs_of(model, work, include)]
    (work / "jobs.json").write_text(json.dumps(jobs))
    command = [arguments.python or python_of("lm-eval", folder), Path(__file__).with_name("run_tasks.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, work / "jobs.json"], env=environment, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-3000:])
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    num_wrong = 0
    for result in results:
        is_wrong = result["worst"] > max(LIMIT, TIMES_OWN * result["own"])
        is_wrong |= not result["own"] and bool(result["greedy"] or result["metrics"])
        num_wrong += is_wrong
        detail = f"{result['greedy']} greedy, metrics {result['metrics']}" if is_wrong else ""
        worst = f"worst {result['worst']:.1e} (own {result['own']:.1e})"
        print(f"{result['name']:42} {result['requests']:4} requests, {worst} {detail}")
    print(f"{len(results)} comparisons, {num_wrong} unexpected")
    return int(done.returncode != 0 or num_wrong > 0 or len(results) != len(jobs))


def jobs_of(model: Path, work: Path, include: Path) -> list[dict[str, Any]]:
    """The evaluations of a model: the original with all settings, and quantized ones."""
    source = work / "models" / model.name
    shutil.copytree(model, source)
    # In float32, because other programs add products of 16-bit matrices in another order, and round scales to 16 bits.
    transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(source)
    (source / "chat_template.jinja").write_text(TEMPLATE)
    artifact = build(source, out=work / "artifacts").path
    shared = {"artifact": str(artifact), "include_path": str(include), "tasks": list(TASKS)}
    jobs = [
        {**shared, "name": f"{model.name}, {name}", "weights": str(source), "settings": settings}
        for name, settings in SETTINGS.items()
    ]
    for scheme in SCHEMES:
        weights = quantized(artifact, source, scheme, work / f"{model.name}-{scheme}")
        jobs.append({**shared, "name": f"{model.name} {scheme}", "weights": str(weights), "settings": {}})
    for number, job in enumerate(jobs):
        job["out"] = str(work / "results" / f"{model.name}-{number}")
        job["is_rounded"] = job["name"].endswith(ROUNDED)
    return jobs


def quantized(artifact: Path, source: Path, scheme: str, out: Path) -> Path:
    """Quantize a model."""
    loaded = runtime.load(artifact)
    samples = runtime.load_tokens(ROOT / "demo/text/calib.jsonl", tokenizer_dir=source, num_samples=8, seq_len=128)
    batches = [model_inputs(loaded.manifest, batch) for batch in runtime.batches(samples.samples, 4)]
    recipe = runtime.Recipe.from_text(recipe_text(scheme, ("lm_head", "re:.*mlp.gate$")), "recipe.yaml")
    runtime.calibrate(loaded, weights=source, recipe=recipe, batches=batches, out=out)
    return out


if __name__ == "__main__":
    sys.exit(main())
