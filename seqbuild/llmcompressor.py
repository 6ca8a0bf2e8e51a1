"""Importing this module registers the pipeline `seqbuild` in llm-compressor: `oneshot(..., pipeline="seqbuild")`."""

from __future__ import annotations

from seqbuild.peer.pipeline import SeqbuildPipeline

__all__ = ["SeqbuildPipeline"]
