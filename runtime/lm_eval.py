"""lm-eval's own command line with the model `seqbuild`: `python -m runtime.lm_eval --model seqbuild ...`.

lm-eval finds models only in a table of its own, so that a model of another package must be registered first. The
command is lm-eval's in all other ways, except that it stays offline: its options, and its trust in task files.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> int:
    """Run the command line; returns the exit code."""
    from runtime.console import complain
    from runtime.errors import SeqbuildError

    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, "1")
    try:
        from lm_eval.__main__ import cli_evaluate

        from runtime.evaluation.lm_eval_model import SeqbuildLM
    except ImportError as error:
        complain(f"lm_eval: error: lm-eval cannot be imported: {error} (pip install 'seqbuild-llm[eval]')")
        return 2
    _tell_tasks(SeqbuildLM)
    try:
        cli_evaluate()
    except SeqbuildError as error:
        complain(f"lm_eval: error: {error}")
        return 2
    return 0


def _tell_tasks(model_class: Any) -> None:
    """Give the model the tasks as soon as they are loaded: it rejects some, and computes the others together."""
    from lm_eval.tasks import TaskManager

    from runtime.evaluation.task_files import unsupported

    usual = TaskManager.load

    def load(self: Any, names: Any) -> Any:
        loaded, model = usual(self, names), model_class.latest
        if model is not None:
            generating = [name for name, task in loaded["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]
            if generating:
                raise unsupported(generating)
            model.tasks = list(loaded["tasks"].values())
        return loaded

    TaskManager.load = load


if __name__ == "__main__":
    sys.exit(main())
