"""llm-compressor's sequential pipeline with subgraphs from a compiled artifact instead of a trace.

The loop is llm-compressor's own, with all its options: offloading, prefetching, `propagate_error`, loss masks. It gets
its subgraphs from one function, which is replaced while the pipeline runs. Hooks of modifiers see the same modules as
usual, because the artifact is cut at the layers and calls them as modules of the user's model.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

try:
    from llmcompressor.args.dataset_arguments import DatasetArguments
    from llmcompressor.pipelines.registry import CalibrationPipeline
    from llmcompressor.pipelines.sequential import pipeline as sequential
    from llmcompressor.utils.helpers import calibration_forward_context
except ImportError as error:
    raise ImportError(
        f"the pipeline of seqbuild requires llm-compressor 0.14 or newer ({error}); pip install llmcompressor"
    ) from error

from runtime.errors import UsageError
from seqbuild.peer.subgraphs import OneshotSubgraph, load_subgraphs

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

_TRACE = "trace_subgraphs"


@CalibrationPipeline.register("seqbuild")
class SeqbuildPipeline(CalibrationPipeline):  # type: ignore[misc]  # llm-compressor has no annotations
    """The pipeline `seqbuild`."""

    @staticmethod
    def __call__(model: torch.nn.Module, dataloader: DataLoader[Any], dataset_args: DatasetArguments) -> None:
        """Calibrate a model, subgraph by subgraph.

        Args:
            model: the model that llm-compressor quantizes.
            dataloader: its inputs.
            dataset_args: the options of llm-compressor.
        """
        if not hasattr(sequential, _TRACE):
            version = importlib.metadata.version("llmcompressor")
            raise UsageError(
                f"llm-compressor {version} has another sequential pipeline than 0.14", hint='use pipeline="sequential"'
            )
        with patch.object(sequential, _TRACE, _compiled):
            sequential.SequentialPipeline()(model, dataloader, dataset_args)


def _compiled(
    model: Any, sample: dict[str, Any], targets: Sequence[str], ignore: Sequence[str], targets_per_subgraph: int = 1
) -> list[OneshotSubgraph]:
    """Return the subgraphs of a model, in place of llm-compressor's function with these arguments."""
    # Its own list contains functions that its tracer cannot record.
    usual = DatasetArguments().tracing_ignore
    with calibration_forward_context(model):
        attention = model.config._attn_implementation  # which the context changes
    return load_subgraphs(
        model,
        sample,
        targets=tuple(targets),
        ignore=tuple(name for name in ignore if name not in usual),
        targets_per_subgraph=targets_per_subgraph,
        attention=attention,
    )
