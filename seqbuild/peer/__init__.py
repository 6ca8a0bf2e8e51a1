"""Subgraphs of an artifact inside llm-compressor."""
