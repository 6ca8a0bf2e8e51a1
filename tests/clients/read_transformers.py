"""Run by the interpreter of an environment with transformers: what it computes from each checkpoint of a job.

    PYTHON read_transformers.py JOB.json RESULTS.jsonl

A job has the windows of token ids and the cases; a line of the results has, for each window, the log-probability of
every token after the first, or the error.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402


def main() -> None:
    job, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    transformers.utils.logging.disable_progress_bar()
    for case in job["cases"]:
        windows = job["windows"][case["windows"]]
        try:
            found: dict[str, Any] = {"logprobs": logprobs(case["directory"], windows)}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        line = {"name": case["name"], "version": transformers.__version__, **found}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")


def logprobs(directory: str, windows: list[list[int]]) -> list[list[float]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    ids_BS = torch.tensor(windows)
    with torch.no_grad():
        logits = model(input_ids=ids_BS, use_cache=False).logits.float()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits are not finite")
    found = logits[:, :-1].log_softmax(-1).gather(-1, ids_BS[:, 1:, None])[..., 0]
    return [[float(value) for value in row] for row in found]


if __name__ == "__main__":
    main()
