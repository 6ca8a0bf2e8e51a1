"""Evaluate tasks with lm-eval: with its backend for transformers, and with ours; prints a JSON line for each run.

    python run_tasks.py JOBS.json

Each job has a name, an artifact, weights, and settings of the evaluation.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import lm_eval
import torch
from lm_eval.tasks import TaskManager

import runtime
from runtime.evaluation.options import PassOptions
from runtime.evaluation.tasks import TaskOptions, evaluate_tasks


def main() -> None:
    """Run all jobs."""
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for job in jobs:
        theirs, ours = with_transformers(job), with_artifact(job)
        own = differences(theirs, with_transformers(job, batch_size=1))["worst"] if job["is_rounded"] else 0.0
        print(json.dumps({"name": job["name"], "own": own, **differences(theirs, ours)}), flush=True)


def with_transformers(job: dict[str, Any], batch_size: int = 8) -> dict[str, Any]:
    """lm-eval's own backend, in float32: in 16 bits it would round log-likelihoods."""
    settings = dict(job["settings"])
    model = {"pretrained": job["weights"], "dtype": "float32", "max_length": settings.pop("max_length", None)}
    # Its cache of logits reads the wrong rows if requests of equal tokens have continuations of different lengths.
    model |= {"add_bos_token": settings.pop("add_bos_token", None), "logits_cache": False}
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={name: value for name, value in model.items() if value is not None},
        tasks=job["tasks"],
        device="cpu",
        batch_size=batch_size,
        task_manager=TaskManager(include_path=job["include_path"], include_defaults=False),
        bootstrap_iters=0,
        **settings,
    )
    return dict(found)


def with_artifact(job: dict[str, Any]) -> dict[str, Any]:
    """Our model, streamed."""
    out = Path(job["out"])
    shutil.rmtree(out, ignore_errors=True)
    settings = dict(job["settings"])
    evaluate_tasks(
        runtime.load(job["artifact"]),
        weights=Path(job["weights"]),
        tokenizer=Path(job["weights"]),
        tasks=TaskOptions(
            names=job["tasks"],
            include_paths=[Path(job["include_path"])],
            log_samples=True,
            **settings,
        ),
        options=PassOptions(device=torch.device("cpu"), dtype=torch.float32, out=out),
    )
    results = json.loads((out / "results.json").read_text())
    results["samples"] = {
        path.stem.removeprefix("samples_"): [json.loads(line) for line in path.read_text().splitlines()]
        for path in out.glob("samples_*.jsonl")
    }
    return results


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """The largest difference of a log-likelihood, and everything else that differs."""
    worst, count, greedy, metrics = 0.0, 0, 0, []
    for task, samples in theirs["samples"].items():
        own = {sample["doc_id"]: sample for sample in ours["samples"][task]}
        assert len(own) == len(samples)
        for sample in samples:
            pairs = zip(_answers(sample["resps"]), _answers(own[sample["doc_id"]]["resps"]), strict=True)
            for (value, is_greedy), (own_value, own_greedy) in pairs:
                # lm-eval adds the tokens of a whole text in float32.
                worst, count = max(worst, abs(value - own_value) / max(abs(value) / 100, 1)), count + 1
                greedy += is_greedy != own_greedy
    for task, row in {**theirs["results"], **theirs.get("groups", {})}.items():
        for metric, value in row.items():
            own_value = {**ours["results"], **ours.get("groups", {})}[task][metric]
            is_number = isinstance(value, float) and "stderr" not in metric
            if is_number and abs(value - own_value) > 1e-4 * max(abs(value), 1):
                metrics.append([task, metric, value, own_value])
    return {"requests": count, "worst": worst, "greedy": greedy, "metrics": metrics}


def _answers(responses: Any) -> list[tuple[float, bool]]:
    """The answers of a document: pairs, or a number for a whole text."""
    found = []
    for (answer,) in responses:
        value, is_greedy = answer if isinstance(answer, (list, tuple)) else (answer, False)
        found.append((float(value), is_greedy in (True, "True")))
    return found


if __name__ == "__main__":
    main()
