"""Evaluate a checkpoint, streamed through the subgraphs: perplexity, tasks, and the comparison of two checkpoints."""

from runtime.evaluation.perplexity import Evaluation, evaluate, require_predicting

__all__ = ["Evaluation", "evaluate", "require_predicting"]
